"""VidCom2: video compression commander, plug-and-play inference acceleration for video LLMs (EMNLP 2025, arXiv
2505.14454).

Of a video's tokens, between projector and decoder layer 0, those stay that resemble the video and their frame least.
A frame that resembles the video least as a whole gets a larger share of the budget. Nothing is merged, and neither
the question nor any attention is looked at. The steps named below are those of docs/methods/vidcom2.md.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from accelerate_methods.ops.diversity import finite_rows
from accelerate_methods.ops.select import mask_to_indices, top_mask
from accelerate_methods.registry import register
from accelerate_methods.stages.budget import floor_share
from accelerate_methods.stages.compress import Compressed, CompressMethod, VisualItem, everything, selection
from accelerate_methods.stages.fields import flag, share
from accelerate_methods.stages.shapes import ItemShape

ALPHAS = (0.125, 0.25, 0.5, 1.0, 2.0)  # widths of the Gaussians, constants of the released code
CHANNELS = 0.5  # share of the channels that tokens are compared by
TEMPERATURE = 0.01  # of the frames' shares


@register("vidcom2")
@dataclasses.dataclass(frozen=True, kw_only=True)
class VidCom2(CompressMethod):
    """Hyper-parameters of VidCom2.

    Attributes:
        retention_ratio: r, share of a video's tokens that stays (published: 0.25 and 0.15); 1 changes nothing.
        exact: keep floor(F * N * r) tokens of the video exactly, as vLLM does; the released code rounds the count of
            each frame, of which at least one token stays.
    """

    title: ClassVar[str] = "VidCom2"
    paper: ClassVar[str] = "arXiv 2505.14454"
    code: ClassVar[str] = "xuyang-liu16/VidCom2@944a17d1"
    licence: ClassVar[str] = "Apache-2.0"
    modalities: ClassVar[frozenset[str]] = frozenset({"video"})
    positions: ClassVar[str] = "compact"

    retention_ratio: float | None = share(0.25, budget=True)
    exact: bool = flag(False)

    def count(self, shape: ItemShape) -> int | None:
        if self.retention_ratio == 1:
            return shape.num_tokens
        return self._target(shape.num_frames, shape.num_tokens) if self.exact else None

    def _target(self, frames: int, total: int) -> int:
        return max(frames, min(floor_share(total, self.retention_ratio), total))

    def compress(self, item: VisualItem) -> Compressed:
        if self.retention_ratio == 1:
            return everything(item)
        scores = token_scores(item.features)
        scales = frame_scales(scores.video, self.retention_ratio)
        counts = (scales * item.tokens_per_frame).round().long().clamp(1, item.tokens_per_frame)  # half to even
        alike = (scores.video + scores.frame).nan_to_num(nan=torch.inf)
        info: dict[str, object] = {"video_score": scores.video, "frame_score": scores.frame, "scales": scales}
        keep = top_mask(-alike, counts)
        if self.exact:
            kept = fitted(keep, alike, self._target(item.num_frames, item.num_tokens))
        else:
            # the one read: how many tokens there are is for the frames to say
            kept = mask_to_indices(keep.view(1, -1), sum(counts.tolist()))[0]
        out = selection(item, kept, info, order="given")
        out.newlines = "behind"
        return out


@dataclasses.dataclass
class Scores:
    """[F, N] float32: how much each token resembles the whole video, and its frame."""

    video: Tensor
    frame: Tensor


def token_scores(features: Tensor) -> Scores:
    """Sums of Gaussians of each token's distance to the mean of the video and to that of its frame (steps 1 and 2).

    The channels that vary least are compared by masks: tokens are read as they are, nothing is copied.

    Args:
        features: [F, N, D]; of tokens that are not a number both scores are not.
    """
    states, finite = finite_rows(features)
    with torch.autocast(states.device.type, enabled=False):
        return _scores(states, finite)


def _scores(states: Tensor, finite: Tensor | None) -> Scores:
    frames, per_frame, width = states.shape
    flat = states.flatten(0, 1)
    # some tokens at a time, whose squares then stay in the cache of a CPU
    parts = flat.split(256 if flat.device.type == "cpu" else len(flat))
    ones = flat.new_ones(len(flat))
    mean = ones @ flat / len(flat)
    variance = sum(ones[: len(part)] @ (part - mean).square_() for part in parts)
    calm = top_mask(-variance[None], max(1, int(width * CHANNELS)))[0].float()
    squared = torch.cat([part.square() @ calm for part in parts])
    length = squared.sqrt().clamp(min=1e-12)
    inverse = length.reciprocal().view(frames, 1, per_frame)
    centres = torch.bmm(inverse, states)[:, 0] / per_frame * calm
    both = torch.stack([centres.mean(0).expand_as(centres), centres], dim=2)
    inner = torch.bmm(states, both) * inverse.mT
    own = (squared.view(frames, per_frame, 1) * inverse.mT.square()) + both.square().sum(1)[:, None]
    distance = (own - 2 * inner).clamp(min=0)
    score = sum(torch.exp(distance * (-1 / (2 * alpha))) for alpha in ALPHAS)
    if finite is not None:
        score = torch.where(finite[..., None], score, torch.nan)
    return Scores(*score.unbind(2))


def frame_scales(video: Tensor, ratio: float) -> Tensor:
    """[F] share of each frame's tokens that stays (step 3): frames that resemble the video less get more.

    Args:
        video: [F, N] how much each token resembles the video.
    """
    unique = (-video.nanmean(1)).nan_to_num(nan=-torch.inf)
    share_of = ((unique - unique.amax()) / TEMPERATURE).softmax(0).nan_to_num(nan=1 / len(unique))
    return (ratio * (1 + share_of - share_of.mean())).clamp(max=1)


def fitted(keep: Tensor, alike: Tensor, count: int) -> Tensor:
    """[count] ascending: of the tokens kept so far the least alike; where they are fewer, the least alike others, too.

    Args:
        keep: [F, N]; alike: [F, N].
    """
    order = torch.sort(alike.flatten(), stable=True).indices
    first = torch.sort(keep.flatten()[order].to(torch.uint8), descending=True, stable=True).indices
    return order[first[:count]].sort().values
