"""AKS: adaptive keyframe sampling for long video understanding (CVPR 2025, arXiv 2502.21271).

An image-text model scores one frame per second of a video against the question. The video is then split in halves
again and again: a part whose best frames stand out is not split any further ("judge"), and every part is given its
share of the frames, for which its best ones are taken. So the frames are relevant, and still cover the video. It acts
where the video is read; the model and whatever compresses its tokens are as they were. All rules and the differences to
the official code: docs/methods/aks.md.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from accelerate_methods.ops.select import top_mask
from accelerate_methods.registry import register
from accelerate_methods.stages.fields import choice, integer, real, text
from accelerate_methods.stages.sample import SampleMethod


@register("aks")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AKS(SampleMethod):
    """Hyper-parameters of AKS.

    Attributes:
        max_num_frames: M, frames to choose; by default as many as the model is to get.
        mode: the strategies of the paper. "ada": judge and split; "top": the best frames of the whole video; "bin":
            always split down to the last level; "uni": evenly spaced frames, without scores.
        t1: a part is not split if the mean of its best M normalised scores exceeds the mean of all by more than this
            (the paper's s_thr).
        t2: and if the standard deviation of its scores exceeds this; -100 switches that off.
        all_depth: levels of splitting, L in the paper.
        depth_rule: "fit": at most floor(log2 M) levels, so that every part may have a frame; "as_released": all_depth
            whatever M is, which chooses nothing where M is below 2^all_depth.
        ratio: only every so-manyth candidate is looked at (2: one every two seconds).
        scorer: "blip": the matching head of BLIP; "clip": cosine in CLIP's space.
        scorer_checkpoint: its checkpoint (name on the hub or folder), by default the one of the paper.
    """

    title: ClassVar[str] = "AKS"
    paper: ClassVar[str] = "arXiv 2502.21271"
    code: ClassVar[str] = "ncTimTang/AKS@46675011"
    licence: ClassVar[str] = "none stated"
    modalities: ClassVar[frozenset[str]] = frozenset({"video"})
    needs_question: ClassVar[bool] = False  # it is read with the video, not with the prompt

    max_num_frames: int | None = integer(None, low=1)
    mode: str = choice("ada", "ada", "top", "bin", "uni")
    t1: float = real(0.8)
    t2: float = real(-100.0)
    all_depth: int = integer(5, low=0)
    depth_rule: str = choice("fit", "fit", "as_released")
    ratio: int = integer(1, low=1)
    scorer: str = choice("blip", "blip", "clip")
    scorer_checkpoint: str | None = text(None)

    def frames(self, scores: Tensor, count: int) -> Tensor:
        count = self.max_num_frames or count
        if self.mode == "uni":
            return torch.empty(0, dtype=torch.long)
        thinned = scores[:: self.ratio][: scores.shape[0] // self.ratio]
        if thinned.shape[0] < count:
            return torch.arange(thinned.shape[0]) * self.ratio
        return keyframes(normalised(thinned), count, *self._splitting(count)) * self.ratio

    def _splitting(self, count: int) -> tuple[int, float, float]:
        """Levels, t1 and t2 that the mode makes of the parameters."""
        depth = self.all_depth if self.depth_rule == "as_released" else min(self.all_depth, int(math.log2(count)))
        return {"top": (0, self.t1, self.t2), "bin": (depth, math.inf, self.t2)}.get(
            self.mode, (depth, self.t1, self.t2)
        )


def normalised(scores: Tensor) -> Tensor:
    """[N] scores from 0 to 1 over the whole video, float64; 0 everywhere where they are all alike.

    What is not a number counts as the lowest score.
    """
    scores = scores.double()
    finite = scores[scores.isfinite()]
    if not finite.numel():
        return torch.zeros_like(scores)
    low, high = finite.aminmax()
    scores = scores.nan_to_num(nan=low.item(), posinf=high.item(), neginf=low.item())
    return (scores - low) / (high - low) if high > low else torch.zeros_like(scores)


def keyframes(scores: Tensor, count: int, depth: int, t1: float, t2: float) -> Tensor:
    """Ascending indices of the frames that judge-and-split chooses, by normalised ``scores`` [N].

    A part at level d may have floor(count / 2^d) frames, and gives all it has if these are fewer; ties go to the
    earlier frame. So there may be fewer than ``count`` in all.
    """
    starts, lengths, levels = split(scores, count, depth, t1, t2)
    part, inside = rows_of(scores, starts, lengths, -math.inf)
    share = torch.minimum(count // 2**levels, lengths)
    which, place = (top_mask(part, share) & inside).nonzero(as_tuple=True)
    return (starts[which] + place).sort().values


def split(scores: Tensor, count: int, depth: int, t1: float, t2: float) -> tuple[Tensor, Tensor, Tensor]:
    """The parts [S] of a video that are left, in the order of time: first frame, length and level of each.

    A level at a time: all parts of it are judged at once. The judge looks at the ``count`` best scores of a part
    whatever its level, so a part of at most ``count`` frames never stands out.
    """
    starts, lengths = torch.zeros(1, dtype=torch.long), torch.tensor([scores.shape[0]])
    found: list[Tensor] = []
    for level in range(depth + 1):
        stops = torch.ones_like(starts, dtype=torch.bool)
        if level < depth:
            stops = judged(scores, starts, lengths, count, t1, t2)
        found.append(torch.stack([starts, lengths, torch.full_like(starts, level)])[:, stops])
        starts, lengths = starts[~stops], lengths[~stops]
        half = lengths // 2
        starts = torch.stack([starts, starts + half], 1).flatten()
        lengths = torch.stack([half, lengths - half], 1).flatten()
    parts = torch.cat(found, 1)
    starts, lengths, levels = parts[:, (parts[0] * 2 + (parts[1] > 0)).argsort(stable=True)]
    return starts, lengths, levels


def judged(scores: Tensor, starts: Tensor, lengths: Tensor, count: int, t1: float, t2: float) -> Tensor:
    """[S] whether the best scores of each part stand out so far that it is not split."""
    part, inside = rows_of(scores, starts, lengths, 0.0)
    size = lengths.clamp(min=1)
    mean = part.sum(1) / size
    deviation = ((part - mean[:, None]).masked_fill(~inside, 0).square().sum(1) / size).sqrt()
    best = part.masked_fill(~inside, -math.inf).topk(min(count, part.shape[1])).values
    top = best.masked_fill(best == -math.inf, 0).sum(1) / size.clamp(max=count)
    return (top - mean > t1) & (deviation > t2)


def rows_of(scores: Tensor, starts: Tensor, lengths: Tensor, fill: float) -> tuple[Tensor, Tensor]:
    """[S, W] the scores of each part, filled up to the longest, and where they are scores."""
    place = torch.arange(max(1, int(lengths.max()))) if lengths.numel() else torch.arange(1)
    inside = place < lengths[:, None]
    at = (starts[:, None] + place).clamp(max=scores.shape[0] - 1)
    return scores[at].masked_fill(~inside, fill), inside
