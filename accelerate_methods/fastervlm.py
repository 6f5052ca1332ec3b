"""FasterVLM: [CLS] attention is all you need for training-free visual token pruning (arXiv 2412.01818).

Every view of an image keeps the patches that the CLS token of the vision encoder attends to most, in the encoder layer
whose output is the visual feature. Nothing is merged, the question is not looked at, and the budget is the same for
every view: the anyres base and each of its tiles. A video keeps the same number of tokens in every frame.

Extensions of ours, which the authors' code does not have: encoders without a CLS token (SigLIP) are scored by the
attention that a patch receives from all others, and videos of models that pool their frames are pruned after pooling.
All rules and the differences to the official code: docs/methods/fastervlm.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from accelerate_methods.ops.select import row_numbers, top_indices
from accelerate_methods.registry import register
from accelerate_methods.stages.budget import nearest_share
from accelerate_methods.stages.compress import Compressed, ViewCompressMethod, VisualItem, everything, selection
from accelerate_methods.stages.fields import choice, integer, share
from accelerate_methods.stages.shapes import ItemShape
from accelerate_methods.stages.views import CompressedViews, Views, view_selection


@register("fastervlm")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FasterVLM(ViewCompressMethod):
    """Hyper-parameters of FasterVLM.

    Attributes:
        retention_ratio: 1 - R, share of the tokens of each view or frame that stay, rounded to the nearest count (the
            paper's tables: 0.75, 0.5, 0.25, 0.1, 0.05); 1 changes nothing.
        tokens_per_view: T, the same as a count instead.
        merge: layout of what is left of an anyres image. "spatial": the kept patches alone, without unpadding and
            newlines, which the official code forces on every checkpoint; "spatial_unpad": the checkpoint's own layout,
            where patches in the padding are lost and every newline stays.
    """

    title: ClassVar[str] = "FasterVLM"
    paper: ClassVar[str] = "arXiv 2412.01818"
    code: ClassVar[str] = "Theia-4869/FasterVLM@f5d5f120"
    licence: ClassVar[str] = "Apache-2.0"
    signals: ClassVar[frozenset[str]] = frozenset({"cls_attention"})
    substitutes: ClassVar[Mapping[str, str]] = {"cls_attention": "received_attention"}
    positions: ClassVar[str] = "compact"

    retention_ratio: float | None = share(0.25, budget=True)
    tokens_per_view: int | None = integer(None, low=1, budget=True, aliases=("visual_token_num",))
    merge: str = choice("spatial", "spatial", "spatial_unpad")

    def view_budget(self, per_view: int) -> int:
        """T for views or frames of ``per_view`` tokens, 1 <= T <= per_view."""
        if self.tokens_per_view is not None:
            return min(self.tokens_per_view, per_view)
        return nearest_share(per_view, self.retention_ratio)

    def count(self, shape: ItemShape) -> int | None:
        budget = self.view_budget(shape.tokens_per_frame)
        if budget >= shape.tokens_per_frame:
            return shape.dense
        # in the checkpoint's layout, what stands in padding is lost
        lossless = self.merge == "spatial" or not shape.on_views
        return shape.num_frames * budget if lossless else None

    def compress_views(self, views: Views) -> CompressedViews | None:
        count = self.view_budget(views.tokens_per_view)
        if count >= views.tokens_per_view:
            return None
        scores = views.signal("cls_attention", "received_attention")
        return view_selection(views, top_indices(scores, count), "none" if self.merge == "spatial" else "checkpoint")

    def compress(self, item: VisualItem) -> Compressed:
        per_frame = item.tokens_per_frame
        count = self.view_budget(per_frame)
        if count >= per_frame:
            return everything(item)
        kept = top_indices(item.signal("cls_attention", "received_attention"), count)
        return selection(item, row_numbers(kept, per_frame), order="given")  # ascending
