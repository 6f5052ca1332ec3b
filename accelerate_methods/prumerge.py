"""LLaVA-PruMerge: adaptive token reduction for efficient large multimodal models (ICCV 2025, arXiv 2403.15388).

Every view of an image, and every frame of a video, becomes

1. the tokens whose attention is an **outlier**: above the upper whisker of a box plot; how many that are follows from
   what is seen. Each takes in the 32 tokens with the most similar keys, weighted by their attention;
2. **one more token**, the weighted sum of all others.

Attention and keys are those of one full-width head in the encoder layer that the visual feature goes into. The question
is not looked at. PruMerge+ adds evenly spaced tokens: ``prumerge_plus``. The rules, what we extend and the differences
to the official code: docs/methods/prumerge.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from accelerate_methods.ops.neighbours import fold_into, outlier_ratio
from accelerate_methods.ops.select import by_score
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


@register("prumerge")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PruMerge(ViewCompressMethod):
    """Hyper-parameters of PruMerge. Without a budget the outliers of the attention decide how many tokens stay.

    Attributes:
        reduction_ratio: the release's fixed form: this share of the tokens of each view or frame, rounded down, and one
            token for the rest (training: 0.125).
        retention_ratio: share of the tokens of each view or frame that stay, to the nearest count, the token for the
            rest counted.
    """

    title: ClassVar[str] = "PruMerge"
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
        """Tokens chosen in each view or frame of ``per_view`` tokens; None: the attention decides."""
        if self.reduction_ratio is not None:
            return int(per_view * self.reduction_ratio)
        if self.retention_ratio is not None:
            total = nearest_share(per_view, self.retention_ratio)
            return total if total == per_view else total - 1
        return None

    def count(self, shape: ItemShape) -> int | None:
        chosen = self.view_budget(shape.tokens_per_frame)
        if chosen is None:
            return None
        return shape.dense if chosen == shape.tokens_per_frame else shape.num_frames * (chosen + 1)

    def compress_views(self, views: Views) -> CompressedViews | None:
        if self.view_budget(views.tokens_per_view) == views.tokens_per_view:
            return None
        scores = views.signal(CLS, RECEIVED)
        folded = fold_into(views.features, views.signal(KEYS), scores, self._chosen(scores))
        return view_merge(views, folded.tokens, folded.places, folded.slot, last=1)

    def compress(self, item: VisualItem) -> Compressed:
        if self.view_budget(item.tokens_per_frame) == item.tokens_per_frame:
            return everything(item)
        scores = item.signal(CLS, RECEIVED)
        folded = fold_into(item.features, item.signal(KEYS), scores, self._chosen(scores))
        return frame_merge(item, folded.tokens, folded.places, folded.slot)

    def _chosen(self, scores: Tensor) -> Tensor:
        """[V, n] by falling attention. Adaptive: one device read, of how many outliers all views together have."""
        count = self.view_budget(scores.shape[1])
        if count is None:
            count = int(scores.shape[1] * outlier_ratio(scores))
        return by_score(scores)[:, :count]
