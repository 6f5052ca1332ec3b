"""LLaVA-PruMerge+: PruMerge with evenly spaced tokens beside the outliers (ICCV 2025, arXiv 2403.15388).

As PruMerge (``prumerge``): tokens whose attention is an outlier take in the 32 most similar others, and one more token
is the weighted sum of the rest. Beside the outliers, tokens at an even stride are chosen, the closer together the more
outliers there are. This is what the released code runs. The rules, what we extend and the differences to the official
code: docs/methods/prumerge_plus.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from accelerate_methods.ops.neighbours import above_whisker, fold_into, outlier_ratio
from accelerate_methods.ops.select import by_score, on_device
from accelerate_methods.registry import register
from accelerate_methods.stages.budget import nearest_share
from accelerate_methods.stages.compress import Compressed, ViewCompressMethod, VisualItem, everything, frame_merge
from accelerate_methods.stages.fields import share
from accelerate_methods.stages.shapes import ItemShape
from accelerate_methods.stages.signals import Signal
from accelerate_methods.stages.views import CompressedViews, Views, view_merge

CLS = Signal("cls_attention", "next", "joined")
RECEIVED = Signal("received_attention", "next", "joined")
KEYS = Signal("key_states", "next", "joined")


@register("prumerge_plus")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PruMergePlus(ViewCompressMethod):
    """Hyper-parameters of PruMerge+. Without a budget the outliers of the attention decide how many tokens stay.

    Attributes:
        reduction_ratio: the release's fixed form: this share of the tokens of each view by attention, about as many at
            an even stride, and one for the rest. What both choose is there twice (in a video: once).
        retention_ratio: share of the tokens of each view or frame that stay, to the nearest count, the token for the
            rest counted; outliers first, then tokens at an even stride, as EffiVLM-Bench does it.
    """

    title: ClassVar[str] = "PruMerge+"
    paper: ClassVar[str] = "arXiv 2403.15388"
    code: ClassVar[str] = "42Shawn/LLaVA-PruMerge@097c04116a58465e4bcb58cec44a94018a68ff1a"
    licence: ClassVar[str] = "Apache-2.0"
    signals: ClassVar[frozenset[str]] = frozenset({CLS, KEYS})
    substitutes: ClassVar[Mapping[str, str]] = {"cls_attention": "received_attention"}
    budget_required: ClassVar[bool] = False
    positions: ClassVar[str] = "compact"

    reduction_ratio: float | None = share(None, budget=True)
    retention_ratio: float | None = share(None, budget=True)

    def view_budget(self, per_view: int) -> int | None:
        """Tokens of each view or frame of ``per_view`` tokens, the one for the rest counted; None if not known."""
        if self.retention_ratio is not None:
            return nearest_share(per_view, self.retention_ratio)
        if self.reduction_ratio is not None:
            top, grid = fixed_choice(per_view, self.reduction_ratio)
            return top + len(grid) + 1 if top + len(grid) < per_view else None
        return None

    def count(self, shape: ItemShape) -> int | None:
        budget = self.view_budget(shape.tokens_per_frame)
        if budget is None or (self.reduction_ratio is not None and not shape.on_views):
            return None
        return shape.of_each(budget)

    def compress_views(self, views: Views) -> CompressedViews | None:
        if self._keeps_all(views.tokens_per_view):
            return None
        scores = views.signal(CLS, RECEIVED)
        folded = fold_into(views.features, views.signal(KEYS), scores, self._chosen(scores, twice=True))
        last = folded.places.shape[1] < views.tokens_per_view
        return view_merge(views, folded.tokens, folded.places, folded.slot, last=int(last))

    def compress(self, item: VisualItem) -> Compressed:
        if self._keeps_all(item.tokens_per_frame):
            return everything(item)
        scores = item.signal(CLS, RECEIVED)
        folded = fold_into(item.features, item.signal(KEYS), scores, self._chosen(scores, twice=False))
        return frame_merge(item, folded.tokens, folded.places, folded.slot)

    def _keeps_all(self, per_view: int) -> bool:
        return self.retention_ratio is not None and self.view_budget(per_view) >= per_view

    def _chosen(self, scores: Tensor, twice: bool) -> Tensor:
        """[V, K] outliers by falling attention, then evenly spaced tokens in raster order (step 2).

        Without a fixed budget the scores are read once; what they decide is decided on the host.
        """
        size, device = scores.shape[1], scores.device
        if self.reduction_ratio is not None:
            top, grid = fixed_choice(size, self.reduction_ratio)
            if twice:
                even = on_device(torch.tensor(grid), device).expand(len(scores), -1)
                return torch.cat([by_score(scores)[:, :top], even], dim=1)
            scores = scores.detach().cpu()
            return on_device(with_even(scores, top, grid), device)
        scores = scores.detach().float().cpu()
        if self.retention_ratio is not None:
            budget = self.view_budget(size) - 1
            return on_device(budgeted_choice(scores, budget), device)
        ratio = outlier_ratio(scores)
        return on_device(with_even(scores, int(size * ratio), adaptive_grid(size, ratio)), device)


def adaptive_grid(size: int, ratio: float) -> Sequence[int]:
    """Evenly spaced tokens for a share of outliers below 1/4; none where there are no outliers."""
    return range(0, size - 1, max(1, int(int(1 / ratio) / 3))) if ratio else ()


def fixed_choice(size: int, ratio: float) -> tuple[int, Sequence[int]]:
    """How many tokens are chosen by attention, and the evenly spaced ones, in the release's fixed form."""
    step = int(1 / ratio)
    return int(size * ratio), range(step // 2, size - 1, step)


def budgeted_choice(scores: Tensor, budget: int) -> Tensor:
    """[V, budget]: the outliers, as many as a view has on average, then evenly spaced tokens from the beginning."""
    size = scores.shape[1]
    if budget == 0:
        return torch.zeros(len(scores), 0, dtype=torch.long)
    ratios = above_whisker(scores).sum(1).double() / size
    top = min(max(int(size * ratios.mean().item()), 1), budget)
    return with_even(scores, top, range(0, size, max(1, int(size / budget))), budget)


def with_even(scores: Tensor, top: int, grid: Sequence[int], count: int | None = None) -> Tensor:
    """[V, K] the ``top`` of the scores [V, N] by rank, and those of the ``grid`` that are not among them, ascending.

    Args:
        count: K; None: as many as the view with the most. What a view lacks is filled up by rank.
    """
    sets, size = scores.shape
    rank = torch.empty(sets, size, dtype=torch.long)
    rank.scatter_(1, by_score(scores), torch.arange(size).expand(sets, -1))
    even = torch.zeros(size, dtype=torch.bool)
    even[list(grid)] = True
    more = even & (rank >= top)
    if count is None:
        count = top + int(more.sum(1).max())
    turn = torch.where(rank < top, rank, torch.where(more, torch.arange(size) + size, rank + 2 * size))
    return turn.argsort(dim=1)[:, :count]
