"""VisPruner: exploiting visual cues for effective token pruning in VLMs (ICCV 2025, arXiv 2412.01818).

Every view of an image, and every frame of a video, keeps

1. **important** tokens: those that the CLS token of the vision encoder attends to most, in the encoder layer whose
   output is the visual feature;
2. **diverse** tokens: of the others, what is left when near duplicates are dropped, a few at a time.

Nothing is merged and the question is not looked at. The rules, what we extend (odd counts, encoders without a CLS
token, videos) and the differences to the official code: docs/methods/vispruner.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from accelerate_methods.ops.diversity import directions
from accelerate_methods.ops.select import by_score, row_numbers
from accelerate_methods.registry import register
from accelerate_methods.stages.budget import nearest_share
from accelerate_methods.stages.compress import Compressed, ViewCompressMethod, VisualItem, everything, selection
from accelerate_methods.stages.fields import integer, real, share
from accelerate_methods.stages.shapes import ItemShape
from accelerate_methods.stages.views import CompressedViews, Views, view_selection

ROUND = 8  # tokens that a round drops, of views of up to FULL patches; in proportion for larger ones
FULL = 576


@register("vispruner")
@dataclasses.dataclass(frozen=True, kw_only=True)
class VisPruner(ViewCompressMethod):
    """Hyper-parameters of VisPruner.

    Attributes:
        retention_ratio: share of the tokens of each view or frame that stay, to the nearest count (192, 128 and 64 of
            576 are 0.3333, 0.2222 and 0.1111); 1 changes nothing.
        tokens_per_view: T, their number instead.
        important_ratio: r, share of them that is chosen by attention; the rest is diverse.
    """

    title: ClassVar[str] = "VisPruner"
    paper: ClassVar[str] = "arXiv 2412.01818"
    code: ClassVar[str] = "Theia-4869/VisPruner@a089bff71ab97b5154d8edcc39f2c1da6fb9d4e2"
    licence: ClassVar[str] = "Apache-2.0"
    signals: ClassVar[frozenset[str]] = frozenset({"cls_attention"})
    substitutes: ClassVar[Mapping[str, str]] = {"cls_attention": "received_attention"}
    positions: ClassVar[str] = "compact"

    retention_ratio: float | None = share(0.2222, budget=True)
    tokens_per_view: int | None = integer(None, low=1, budget=True, aliases=("visual_token_num",))
    important_ratio: float = real(0.5, low=0, high=1)

    def view_budget(self, per_view: int) -> int:
        """T for views or frames of ``per_view`` tokens, 1 <= T <= per_view."""
        if self.tokens_per_view is not None:
            return min(self.tokens_per_view, per_view)
        return nearest_share(per_view, self.retention_ratio)

    def count(self, shape: ItemShape) -> int:
        budget = self.view_budget(shape.tokens_per_frame)
        return shape.of_each(budget)

    def compress_views(self, views: Views) -> CompressedViews | None:
        count = self.view_budget(views.tokens_per_view)
        if count >= views.tokens_per_view:
            return None
        return view_selection(views, self._kept(views.features, views, count))

    def compress(self, item: VisualItem) -> Compressed:
        count = self.view_budget(item.tokens_per_frame)
        if count >= item.tokens_per_frame:
            return everything(item)
        kept = row_numbers(self._kept(item.features, item, count), item.tokens_per_frame)
        return selection(item, kept, order="given")  # ascending

    def _kept(self, features: Tensor, source: Views | VisualItem, count: int) -> Tensor:
        """[V, count] ascending."""
        scores = source.signal("cls_attention", "received_attention")
        important = important_count(count, self.important_ratio)
        return important_and_diverse(features, scores, important, count - important).sort(1).values


def important_count(count: int, ratio: float) -> int:
    """T_imp: truncated."""
    return int(count * ratio)


def important_and_diverse(features: Tensor, scores: Tensor, important: int, diverse: int) -> Tensor:
    """Steps 1 to 3 for all views at once.

    Args:
        features: [V, N, D]; scores: [V, N]; important + diverse <= N.

    Returns:
        [V, important + diverse] indices, the important ones first, by falling score.
    """
    order = by_score(scores)
    left = order[:, important:]
    if diverse == 0:
        return order[:, :important]
    return torch.cat([order[:, :important], without_duplicates(features, left, diverse)], dim=1)


def without_duplicates(features: Tensor, left: Tensor, count: int) -> Tensor:
    """What stays of ``left`` [V, R] in ``features`` [V, N, D] when near duplicates are dropped: [V, count].

    In every round the tokens at even places are compared with those at odd ones; the few that have the most similar
    counterpart go, and the others take their places by falling similarity, before the odd ones.
    """
    views, size, _ = features.shape
    unit, _ = directions(features)
    similarity = (unit @ unit.mT).flatten(0, 1)
    first = torch.arange(0, views * size, size, device=left.device)[:, None]
    aside = similarity.new_full((views, 1, size), -8.0)  # below every similarity
    at_once = max(ROUND, ROUND * size // FULL)
    while left.shape[1] > count:
        even, odd = left[:, 0::2], left[:, 1::2]
        drop = min(at_once, left.shape[1] - count, even.shape[1])
        rows = similarity.index_select(0, (even + first).flatten()).view(views, -1, size)
        nearest = rows.add_(aside.scatter(2, odd[:, None], 0.0)).amax(2)
        by_similarity = nearest.sort(dim=1, descending=True, stable=True).indices
        left = torch.cat([even.gather(1, by_similarity[:, drop:]), odd], dim=1)
    return left
