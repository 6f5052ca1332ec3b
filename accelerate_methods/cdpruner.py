"""CDPruner: maximizing conditional diversity for token pruning in MLLMs (NeurIPS 2025, arXiv 2506.10967).

Every view of an image, and every frame of a video, keeps the subset of its tokens that is most diverse given the
question: greedy MAP inference of a determinantal point process whose kernel is the similarity of the tokens as the
language model gets them, weighted by how relevant each is to the question. Nothing is merged.

Relevance comes from CLIP's image-text space. Vision encoders without a text tower are an extension of ours: there a
token is compared with the mean of the prompt's text tokens in the language model's space. All rules and the differences
to the official code: docs/methods/cdpruner.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from accelerate_methods.ops.dpp import greedy_map_of
from accelerate_methods.ops.select import row_numbers
from accelerate_methods.registry import register
from accelerate_methods.stages.budget import nearest_share
from accelerate_methods.stages.compress import Compressed, ViewCompressMethod, VisualItem, everything, selection
from accelerate_methods.stages.fields import choice, integer, share, text
from accelerate_methods.stages.shapes import ItemShape
from accelerate_methods.stages.views import CompressedViews, Views, view_selection

_FLOOR = 1e-6  # of a relevance, before it is scaled
_TINY = 1e-12  # length by which a vector without one is divided


@register("cdpruner")
@dataclasses.dataclass(frozen=True, kw_only=True)
class CDPruner(ViewCompressMethod):
    """Hyper-parameters of CDPruner.

    Attributes:
        visual_token_num: m, tokens of each view or frame that stay (the paper: 128, 64, 32; of the five views of
            LLaVA-NeXT that makes 640, 320, 160).
        retention_ratio: their share instead, rounded to the nearest count.
        relevance: "question": tokens are weighted by their relevance to the question; "none": all alike, so that
            diversity alone decides.
        text_tower: checkpoint (name on the hub or folder) whose text tower and projections are used; by default that
            of the model's own vision tower.
    """

    title: ClassVar[str] = "CDPruner"
    paper: ClassVar[str] = "arXiv 2506.10967"
    code: ClassVar[str] = "Theia-4869/CDPruner@9541616c"
    licence: ClassVar[str] = "Apache-2.0"
    signals: ClassVar[frozenset[str]] = frozenset({"image_embeds", "text_embeds"})
    substitutes: ClassVar[Mapping[str, str]] = {"image_embeds": "prompt_mean", "text_embeds": "prompt_mean"}
    positions: ClassVar[str] = "compact"

    visual_token_num: int | None = integer(64, low=1, budget=True, aliases=("tokens_per_view",))
    retention_ratio: float | None = share(None, budget=True)
    relevance: str = choice("question", "question", "none")
    text_tower: str | None = text(None)

    def view_budget(self, per_view: int) -> int:
        """m for views or frames of ``per_view`` tokens, 1 <= m <= per_view."""
        if self.visual_token_num is not None:
            return min(self.visual_token_num, per_view)
        return nearest_share(per_view, self.retention_ratio)

    def count(self, shape: ItemShape) -> int:
        return shape.of_each(self.view_budget(shape.tokens_per_frame))

    def compress_views(self, views: Views) -> CompressedViews | None:
        count = self.view_budget(views.tokens_per_view)
        if count >= views.tokens_per_view:
            return None
        tokens = views.project(views.features)
        return view_selection(views, diverse_tokens(tokens, self._relevance(tokens, views.signals), count))

    def compress(self, item: VisualItem) -> Compressed:
        count = self.view_budget(item.tokens_per_frame)
        if count >= item.tokens_per_frame:
            return everything(item)
        kept = diverse_tokens(item.features, self._relevance(item.features, item.signals), count)
        return selection(item, row_numbers(kept, item.tokens_per_frame), order="given")  # ascending

    def _relevance(self, tokens: Tensor, signals: Mapping[str, Tensor]) -> Tensor | None:
        if self.relevance == "none":
            return None
        if "image_embeds" in signals:
            return scaled(-similarity(signals["image_embeds"], signals["text_embeds"]))
        return scaled(similarity(tokens, signals["prompt_mean"][None]))


def similarity(images: Tensor, texts: Tensor) -> Tensor:
    """[V, N] cosine of ``images`` [V, N, C] and each of ``texts`` [M, C], averaged over these; float32.

    CLIP's patches resemble what the image does not show rather than what it does, so the release takes the negative of
    this, in CLIP's space alone.
    """
    texts = functional.normalize(texts.float(), dim=-1).mean(0)
    images = images.float()
    return (images @ texts).div_(torch.linalg.vector_norm(images, dim=-1).clamp(min=_TINY))


def scaled(relevance: Tensor) -> Tensor:
    """[V, N] relevance over all views -> about 0 to 1; 1 everywhere where it is the same everywhere."""
    relevance = relevance.nan_to_num()
    low, high = relevance.aminmax()
    spread = high - low
    return torch.where(spread > 0, (relevance - low + _FLOOR) / spread, 1.0)


def diverse_tokens(tokens: Tensor, relevance: Tensor | None, count: int) -> Tensor:
    """Ascending indices [V, count] of what stays of ``tokens`` [V, N, D] by ``relevance`` [V, N] (None: 1 for all).

    The kernel is diag(r) S diag(r), S the cosines of the tokens; tokens without a direction are like no other.
    """
    return greedy_map_of(tokens.float(), relevance, count).sort(1).values
