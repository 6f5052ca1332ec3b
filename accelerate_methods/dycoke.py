"""DyCoke: dynamic compression of tokens for fast video large language models (CVPR 2025, arXiv 2411.15024).

Two steps that work without training and can each be switched off:

1. **TTM** (temporal token merging), before the LLM: frames are compared in windows of four; a compressed frame keeps
   the tokens that resemble the same place of its reference frame least. In spite of the name nothing is averaged.
2. **DP** (dynamic pruning), in every decode step: layers from ``l`` on see only those visual keys to which layer
   ``l - 1`` pays most attention in this very step. The cache stays whole, so hidden tokens can come back.

As in the official code, the last frame of an odd number is dropped, the last complete window keeps its third frame
whole, tokens of a compressed frame go on by rising similarity, and the last visual token counts as text for DP. On
layouts with a newline per row or frame, where the official code cannot run, kept tokens stay in place. All rules and
the differences to the official code: docs/methods/dycoke.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from accelerate_methods.ops.segment import cosines, window_products
from accelerate_methods.ops.select import numbers_first
from accelerate_methods.registry import register
from accelerate_methods.stages.budget import floor_share
from accelerate_methods.stages.compress import Compressed, CompressMethod, VisualItem, selection
from accelerate_methods.stages.decode import DecodeMethod, DecodeStep
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.fields import flag, integer, real
from accelerate_methods.stages.shapes import ItemShape

WINDOW = 4  # frames compared with each other, a constant of the paper's code
REFERENCES = ((1, 0), (2, 0), (3, 2))  # which frame of a window is compared with which


@register("dycoke")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DyCoke(CompressMethod, DecodeMethod):
    """Hyper-parameters of DyCoke, defaults as in the paper's strongest setting.

    Attributes:
        k: TTM, share of a compressed frame's tokens that is dropped.
        p: DP, share of the visual keys that is hidden.
        l: DP, first decoder layer (0-based) with the reduced view; from the number of layers on there is no DP.
        threshold: DP, hide nothing in a step whose attention resembles that of the step before at least this much
            (cosine); above 1 hides in every step.
        ttm, dp: switch the two steps off.
    """

    title: ClassVar[str] = "DyCoke"
    paper: ClassVar[str] = "arXiv 2411.15024"
    code: ClassVar[str] = "KD-TAO/DyCoke@dd746349"
    licence: ClassVar[str] = "none stated"
    modalities: ClassVar[frozenset[str]] = frozenset({"video"})
    misleading: ClassVar[Mapping[str, str]] = {
        "merging_ratio": "give k, the share of a compressed frame's tokens that is dropped (others may mean kept)",
        "pruning_ratio": "give p, the share of the visual keys that is hidden (others may mean kept)",
        "pruning_layer": "give l, the first decoder layer (0-based) with the reduced view",
    }
    positions: ClassVar[str] = "compact"

    k: float = real(0.7, low=0, high=1, aliases=("dycoke_k",))
    p: float = real(0.7, low=0, high=1, aliases=("dycoke_p",))
    l: int = integer(3, low=1, aliases=("dycoke_l",))  # noqa: E741 (the paper's name)
    threshold: float = real(0.9, low=-1)
    ttm: bool = flag(True)
    dp: bool = flag(True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.ttm or self.dp):
            raise MethodError("dycoke: ttm and dp are both off; use no method at all instead.")

    @property
    def needs_grid(self) -> bool:
        return self.ttm  # tokens are compared with those at the same place in other frames

    def stages_off(self) -> tuple[str, ...]:
        return tuple(stage for stage, on in (("compress", self.ttm), ("decode", self.dp)) if not on)

    def count(self, shape: ItemShape) -> int:
        short = compressed_frames(shape.num_frames) if shape.num_frames > 1 else [False]
        keep = floor_share(shape.tokens_per_frame, 1 - self.k)
        return sum(keep if is_short else shape.tokens_per_frame for is_short in short)

    def compress(self, item: VisualItem) -> Compressed:
        kept, counts = temporal_tokens(item.features, self.k)
        # Only where no newline stands between the tokens can they leave their place.
        ends_once = item.layout in ("one_token", "no_token", "flat")
        info: dict[str, object] = {"tokens_per_frame": counts}
        return selection(item, kept, info, order="given" if ends_once else "layout")

    def decode_layer(self, num_layers: int) -> int:
        return min(self.l, num_layers)

    def decode(self, step: DecodeStep) -> Tensor | None:
        scores = step.attention().mean(1, dtype=torch.float32)
        rank = step.visual.cumsum(1)
        total = rank[:, -1:]
        shown = ~step.visual | (rank == total)  # the last visual token never hides
        scores = scores.masked_fill(shown, 0.0)
        similarity = similarity_to_previous(scores, step.memory.get("dycoke.scores"))
        step.memory["dycoke.scores"], step.memory["dycoke.similarity"] = scores, similarity
        if self.p == 0:
            return None
        kept = ((total - 1).clamp(min=0).double() * (1 - self.p)).long()  # int(count * (1 - p)), without a device read
        best = best_share(scores.masked_fill(shown, -torch.inf), kept, 1 - self.p)
        return shown | best | (similarity >= self.threshold)[:, None]


def best_share(scores: Tensor, counts: Tensor, share: float) -> Tensor:
    """:func:`top_mask` where nothing but the device knows the counts, and no row has more than this share of them.

    That bounds them, so that the best need not be told from all others by sorting everything.

    Args:
        scores: [B, S] float32, -inf where nothing may be taken; counts: [B, 1], at most ``int(S * share)``.
    """
    most = min(scores.shape[1], int(scores.shape[1] * share) + 1)
    scores = numbers_first(scores)
    ordered = scores.topk(most, dim=1).values
    least = ordered.gather(1, (counts - 1).clamp(min=0))
    above, equal = scores > least, scores == least
    spare = counts - above.sum(1, keepdim=True)  # of the equal ones the first
    return above | (equal & (equal.cumsum(1) <= spare))


def temporal_tokens(features: Tensor, k: float) -> tuple[Tensor, list[int]]:
    """TTM: which tokens of a video go on.

    With U frames (the last of an odd number is dropped): frame f is compared with f - 1 if f is odd, the third frame of
    a window with the first one if the window starts before F - 4; all others stay whole.

    Args:
        features: [F, N, D], any float dtype; similarities are computed in float32 and better.
        k: share of a compressed frame that is dropped.

    Returns:
        Flat indices [K] (frame*N + token), frame by frame, within a compressed frame by rising similarity (the lower
        index first among equals); and the number of tokens of each of the F frames.
    """
    frames, per_frame, _ = features.shape
    rows = torch.arange(frames * per_frame, device=features.device)
    if frames == 1:
        return rows, [per_frame]
    keep = floor_share(per_frame, 1 - k)
    short = compressed_frames(frames)
    rows = rows.view(frames, per_frame)[: len(short)]
    order = torch.sort(reference_similarity(features[: len(short)]), dim=1, stable=True).indices[:, :keep]
    chosen = rows.gather(1, order)
    kept = torch.cat([chosen[f] if is_short else rows[f] for f, is_short in enumerate(short)])
    return kept, [keep if is_short else per_frame for is_short in short] + [0] * (frames - len(short))


def compressed_frames(frames: int) -> list[bool]:
    """Whether each of the first U of at least two frames is compressed; U is even, later frames are dropped."""
    used = frames - frames % 2
    return [f % 2 == 1 or (f % WINDOW == 2 and f - 2 < frames - WINDOW) for f in range(used)]


def reference_similarity(features: Tensor) -> Tensor:
    """[F, N] float64 cosine of each token with the same place of the frame's reference; 0 in a window's first frame.

    Args:
        features: [F, N, D], F even.
    """
    gram = window_products(features, WINDOW, WINDOW)
    squares = gram.diagonal(dim1=2, dim2=3)
    inner = torch.stack([gram[..., frame, reference] for frame, reference in REFERENCES], dim=1)
    both = torch.stack([squares[..., frame] * squares[..., reference] for frame, reference in REFERENCES], dim=1)
    return torch.nn.functional.pad(cosines(inner, both), (0, 0, 1, 0)).flatten(0, 1)[: features.shape[0]]


def similarity_to_previous(scores: Tensor, previous: Tensor | None) -> Tensor:
    """[B] cosine of this step's scores [B, S] with those of the step before (shorter rows end in zeros); 0 without."""
    if previous is None:
        return scores.new_zeros(scores.shape[0])
    grown = scores.shape[1] - previous.shape[1]  # negative where generate has cropped the cache
    previous = torch.nn.functional.pad(previous, (0, grown))
    return torch.nn.functional.cosine_similarity(scores, previous, dim=1)
