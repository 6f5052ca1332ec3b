"""HiPrune: training-free visual token pruning via hierarchical attention in vision-language models (arXiv 2508.00553).

Every view of an image, and every frame of a video, keeps

1. **anchors**: the tokens that receive most attention in a middle layer of the vision encoder;
2. **buffers**: their neighbours to the left and right, above and below;
3. **registers**: of the others, those that receive most attention in the layer whose output is the visual feature.

Nothing is merged, the question is not looked at, and no CLS token is needed. The rules, what we extend and the
differences to the official code: docs/methods/hiprune.md.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from accelerate_methods.ops.select import by_score, row_numbers, top_indices, top_mask
from accelerate_methods.registry import register
from accelerate_methods.stages.budget import ViewBudgetedMethod
from accelerate_methods.stages.compress import Compressed, ViewCompressMethod, VisualItem, everything, selection
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.fields import choice, real, share
from accelerate_methods.stages.shapes import ItemShape
from accelerate_methods.stages.signals import Signal
from accelerate_methods.stages.views import CompressedViews, Views, view_selection

DEEP = Signal("received_attention")


@register("hiprune")
@dataclasses.dataclass(frozen=True, kw_only=True)
class HiPrune(ViewBudgetedMethod, ViewCompressMethod):
    """Hyper-parameters of HiPrune.

    Attributes:
        retention_ratio: share of the tokens of each view or frame that stay, to the nearest count, half to even (192,
            128 and 64 of 576 are 0.3333, 0.2222 and 0.1111); 1 changes nothing.
        tokens_per_image: N', their number instead: of an image with all its views, which have equal parts of it
            (rounded down, at least one), or of a whole video.
        tokens_per_view: their number instead, of each view or frame.
        alpha: share of them that anchors with all their neighbours make up.
        object_layer: encoder layer of the anchors. Below 1: a share of the encoder's depth, rounded up (0.375 of 24
            layers is the 9th, as in the paper; where some layers attend to windows only, the next that sees whole
            frames). Otherwise its number, counted from 1.
        neighbours: "released" takes a row's end and the next row's beginning for neighbours, and the first or last
            token for what would be above or below the grid; "grid" takes what lies in the grid.
        exclude: of images and videos whose tokens are compressed after the projector. "exact" chooses registers among
            the others; "released" does as the release for Qwen2.5-VL: those of high attention are chosen again, and
            fewer tokens stay.
    """

    title: ClassVar[str] = "HiPrune"
    paper: ClassVar[str] = "arXiv 2508.00553"
    code: ClassVar[str] = "Danielement321/HiPrune@6e83a124"
    licence: ClassVar[str] = "MIT"
    signals: ClassVar[frozenset[str]] = frozenset({DEEP, Signal("received_attention", 0.375)})
    positions: ClassVar[str] = "compact"

    retention_ratio: float | None = share(0.3333, budget=True)
    alpha: float = real(0.1, low=0, high=1)
    object_layer: float = real(0.375, low=0)
    neighbours: str = choice("released", "released", "grid")
    exclude: str = choice("exact", "exact", "released")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.object_layer == 0 or (self.object_layer > 1 and self.object_layer != int(self.object_layer)):
            raise MethodError(
                f"hiprune: object_layer={self.object_layer!r} must be a share of the depth in (0, 1), or a layer's "
                "number, counted from 1."
            )
        self.asks_for(DEEP, self.object_signal)

    @property
    def object_signal(self) -> Signal:
        layer = self.object_layer if self.object_layer < 1 else int(self.object_layer) - 1
        return Signal("received_attention", layer)

    def count(self, shape: ItemShape) -> int | None:
        budget = self.view_budget(shape.tokens_per_frame, shape.num_frames)
        if budget >= shape.tokens_per_frame:
            return shape.dense
        fewer = self.exclude == "released" and not shape.on_views
        return None if fewer else shape.num_frames * budget

    def compress_views(self, views: Views) -> CompressedViews | None:
        count = self.view_budget(views.tokens_per_view, views.num_views)
        if count >= views.tokens_per_view:
            return None
        middle, deep = views.signal(self.object_signal), views.signal(DEEP)
        anchors, rank = self._anchors(middle, count, views.grid)
        compressed = view_selection(views, with_registers(deep, rank, 5 * anchors.shape[1], count))
        compressed.info = {"anchor": anchors}
        return compressed

    def compress(self, item: VisualItem) -> Compressed:
        per_frame, grid = item.tokens_per_frame, item.grid or (1, item.tokens_per_frame)
        count = self.view_budget(per_frame, item.num_frames)
        if count >= per_frame:
            return everything(item)
        middle, deep = item.signal(self.object_signal), item.signal(DEEP)
        anchors, rank = self._anchors(middle, count, grid)
        taken = 5 * anchors.shape[1]
        if self.exclude == "released":
            kept = registers_as_released(deep, rank < taken, count).flatten().nonzero().squeeze(1)
        else:
            kept = row_numbers(with_registers(deep, rank, taken, count), per_frame)
        return selection(item, kept, {"anchor": anchors}, order="given")  # ascending

    def _anchors(self, scores: Tensor, count: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        anchors = by_score(scores)[:, : anchor_count(count, self.alpha)]
        return anchors, rank_of_objects(anchors, grid, self.neighbours == "grid")


def anchor_count(count: int, alpha: float) -> int:
    """k, half to even."""
    return round(count * alpha / 5)


def rank_of_objects(anchors: Tensor, grid: tuple[int, int], inside: bool) -> Tensor:
    """[V, N] when each token is taken as an anchor or a neighbour of one, 5k for those that are neither.

    First the anchors [V, k] in their order, then, anchor by anchor, what is left, right, above and below.

    Args:
        inside: neighbours that lie outside of the grid, or in another row, are none.
    """
    size, columns = grid[0] * grid[1], grid[1]
    column = anchors % columns
    beside = torch.stack([anchors - 1, anchors + 1, anchors - columns, anchors + columns], dim=2)
    if inside:
        there = torch.stack(
            [column > 0, column < columns - 1, anchors >= columns, anchors < size - columns], dim=2
        )
        beside = torch.where(there, beside, anchors[..., None])
    taken = torch.cat([anchors, beside.clamp(0, size - 1).flatten(1)], dim=1)
    turn = torch.arange(taken.shape[1], device=anchors.device).expand_as(taken)
    rank = torch.full((anchors.shape[0], size), taken.shape[1], device=anchors.device)
    return rank.scatter_reduce_(1, taken, turn, reduce="amin")


def with_registers(scores: Tensor, rank: Tensor, taken: int, count: int) -> Tensor:
    """[V, count] ascending: objects, by their ``rank`` [V, N] below ``taken``; then the others by score [V, N]."""
    sets, size = scores.shape
    turn = torch.empty_like(rank).scatter_(1, by_score(scores), torch.arange(size, device=rank.device).expand(sets, -1))
    return top_indices(-torch.where(rank < taken, rank - size, turn), count)


def registers_as_released(scores: Tensor, objects: Tensor, count: int) -> Tensor:
    """[V, N] bool: the objects [V, N], and the best of all tokens, one subtracted from the scores of objects.

    Scores are scaled to a mean of one, as sums over query rows are; an object above one may be chosen again.
    """
    scaled = scores.float() * (scores.shape[1] / scores.float().sum(1, keepdim=True))
    left = (count - objects.sum(1)).clamp(min=0)
    return objects | top_mask(scaled - objects.float(), left)
