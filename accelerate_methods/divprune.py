"""DivPrune: diversity-based visual token pruning for large multimodal models (CVPR 2025, arXiv 2503.02175).

Of all tokens of an image or a video, as the language model would get them, those stay that are most different from each
other: one after the other, each the farthest from those picked before by cosine distance. Nothing is merged, and
neither the question nor any attention is looked at.

What is kept counts what the language model gets: of a layout with newlines one stays, as the last row, because newlines
are all the same and a set of different tokens holds one of them. The rules: docs/methods/divprune.md.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from accelerate_methods.ops.diversity import farthest_first
from accelerate_methods.registry import register
from accelerate_methods.stages.compress import Compressed, CompressMethod, VisualItem, selection
from accelerate_methods.stages.fields import integer, share
from accelerate_methods.stages.shapes import ItemShape


@register("divprune")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DivPrune(CompressMethod):
    """Hyper-parameters of DivPrune.

    Attributes:
        retention_ratio: r, share of the rows of an image or video that stay, newlines counted; the nearest count, half
            to even, as in the released code (its tables: 0.098).
        tokens_per_image: K, their number instead, of an image with all its crops or a whole video.
    """

    title: ClassVar[str] = "DivPrune"
    paper: ClassVar[str] = "arXiv 2503.02175"
    code: ClassVar[str] = "vbdi/divprune@799e2d950aa01ba7860907f5a6d86061f885dca6"
    licence: ClassVar[str] = "CC BY-NC 4.0"
    positions: ClassVar[str] = "compact"

    retention_ratio: float | None = share(0.098, budget=True, aliases=("subset_ratio",))
    tokens_per_image: int | None = integer(None, low=1, budget=True)

    def count(self, shape: ItemShape) -> int:
        rows = shape.length
        kept = keep_count(rows, self.retention_ratio) if self.tokens_per_image is None else self.tokens_per_image
        if kept >= rows:
            return shape.num_tokens
        newline = rows > shape.num_tokens
        return max(1, min(kept - newline, shape.num_tokens))

    def compress(self, item: VisualItem) -> Compressed:
        count = self.count(item.shape)
        if count == item.num_tokens:
            return selection(item, torch.arange(count, device=item.features.device))
        order = farthest_first(item.features.flatten(0, 1), count)
        compressed = selection(item, order.sort().values, {"order": order}, order="given")  # ascending
        compressed.newlines = "last"
        return compressed


def keep_count(total: int, ratio: float) -> int:
    """The released code's count: the float64 product to the nearest integer, half to even."""
    return round(ratio * total)
