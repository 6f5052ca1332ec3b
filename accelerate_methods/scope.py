"""SCOPE: saliency-coverage oriented token pruning for efficient multimodal LLMs (NeurIPS 2025, arXiv 2510.24214).

Every view of an image, and every frame of a video, keeps tokens that are attended to and that together stand for all
of it: one after the other, each the one with the largest product of what it newly covers (by the cosine similarity of
all tokens to it) and the attention that the CLS token of the vision encoder pays it.

Nothing is merged and the question is not looked at. The rules, what we extend (encoders without a CLS token, videos)
and the differences to the official code: docs/methods/scope.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from accelerate_methods.ops.coverage import greedy_coverage
from accelerate_methods.ops.diversity import directions
from accelerate_methods.ops.select import row_numbers
from accelerate_methods.registry import register
from accelerate_methods.stages.budget import ViewBudgetedMethod
from accelerate_methods.stages.compress import Compressed, ViewCompressMethod, VisualItem, everything, selection
from accelerate_methods.stages.fields import choice, integer, real, share
from accelerate_methods.stages.shapes import ItemShape
from accelerate_methods.stages.views import CompressedViews, Views, view_selection


@register("scope")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SCOPE(ViewBudgetedMethod, ViewCompressMethod):
    """Hyper-parameters of SCOPE.

    Attributes:
        retention_ratio: share of the tokens of each view or frame that stay, to the nearest count, half to even (192,
            128 and 64 of 576 are 0.3333, 0.2222 and 0.1111); 1 changes nothing.
        tokens_per_image: their number instead: of an image with all its views, which have equal parts of it (rounded
            down, at least one), or of a whole video.
        tokens_per_view: their number instead, of each view or frame.
        alpha: exponent of the attention; 0 leaves coverage alone.
        combine: how attention and coverage come together: "multiply" as in the paper; "add" is in the released code.
        heads: attention heads of the encoder, over which the release sums (16 in CLIP-L). It matters with "add" alone.
    """

    title: ClassVar[str] = "SCOPE"
    paper: ClassVar[str] = "arXiv 2510.24214"
    code: ClassVar[str] = "kinredon/SCOPE@6bf73069"
    licence: ClassVar[str] = "Apache-2.0 (setup.py)"
    signals: ClassVar[frozenset[str]] = frozenset({"cls_attention"})
    substitutes: ClassVar[Mapping[str, str]] = {"cls_attention": "received_attention"}
    positions: ClassVar[str] = "compact"

    retention_ratio: float | None = share(0.2222, budget=True)
    alpha: float = real(1.0, low=0)
    combine: str = choice("multiply", "multiply", "add")
    heads: int = integer(16, low=1)

    def count(self, shape: ItemShape) -> int:
        budget = self.view_budget(shape.tokens_per_frame, shape.num_frames)
        return shape.of_each(budget)

    def compress_views(self, views: Views) -> CompressedViews | None:
        count = self.view_budget(views.tokens_per_view, views.num_views)
        if count >= views.tokens_per_view:
            return None
        tokens = views.features if "cls_attention" in views.signals else views.project(views.features)
        order = self._order(tokens, views, count)
        compressed = view_selection(views, order.sort(1).values, newlines="single")
        compressed.info = {"order": order}
        return compressed

    def compress(self, item: VisualItem) -> Compressed:
        per_frame = item.tokens_per_frame
        count = self.view_budget(per_frame, item.num_frames)
        if count >= per_frame:
            return everything(item)
        order = self._order(item.features, item, count)
        kept = row_numbers(order.sort(1).values, per_frame)
        return selection(item, kept, {"order": order}, order="given")  # ascending

    def _order(self, tokens: Tensor, source: Views | VisualItem, count: int) -> Tensor:
        saliency = source.signal("cls_attention", "received_attention").float() * self.heads
        return salient_coverage(tokens, saliency, count, self.alpha, self.combine == "add")[0]


def salient_coverage(
    tokens: Tensor, saliency: Tensor, count: int, alpha: float, add: bool = False
) -> tuple[Tensor, Tensor]:
    """Tokens that cover all others and are salient, within each view at once.

    Args:
        tokens: [V, N, D]; those without a direction (zero, or not a number) cover nothing.
        saliency: [V, N] at least 0; 0 to the power of 0 is 1.

    Returns:
        [V, min(count, N)] indices in the order of the picks, and [V, min(count, N)] what each gained.
    """
    unit, _ = directions(tokens)
    weights = saliency.float().nan_to_num(posinf=0).clamp(min=0) ** alpha
    return greedy_coverage(unit @ unit.mT, count, weights, add=add)
