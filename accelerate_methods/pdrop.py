"""PyramidDrop: fewer visual tokens from stage to stage of the LLM (CVPR 2025, arXiv 2410.17247).

The decoder is cut into stages. Where one ends, visual tokens are ranked by the attention that the last prompt token is
about to pay to them in the layer that comes next, averaged over the query heads; a fixed share of the prompt's tokens
goes on. Text always stays, kept tokens keep their order, positions are counted anew, and nothing is dropped later.

The official code projects queries, keys and values of all tokens for a ranking that reads one row; it takes one image,
decoders with one key head per query head, and one sample as soon as tokens are generated. Here one row is computed,
several images and videos share the budget, and batches work. All rules and differences: docs/methods/pdrop.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from accelerate_methods.registry import register
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.fields import integer, integers, reals, share
from accelerate_methods.stages.prefill import PrefillMethod, PrefillStep, Selection, VisualSpan, same_depth

#: the released layers, of a decoder of 32
_LAYERS = (8, 16, 24)


@register("pdrop")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidDrop(PrefillMethod):
    """Hyper-parameters of PyramidDrop, defaults as released: four stages with half of the tokens of the one before.

    Exactly one of ``image_token_ratio_list``, ``retention_ratio`` and ``tokens_per_image`` says how many of a prompt's
    n visual rows (the newlines inside an image or video are among them) go on.

    Attributes:
        layer_list: decoder layers (0-based) before which tokens go; None for the released ones, 8, 16, 24, or, where a
            decoder has no such layers, those at the same depth.
        image_token_ratio_list: for each of them the share of the n rows that goes on, int(n * share); shares of the
            whole, not of what the stage before has left.
        retention_ratio: the share that is left in the last stage instead, at least one row; every stage leaves the same
            share of the one before ("lambda" of the paper).
        tokens_per_image: the number that is left in the last stage instead, per image or video.
    """

    title: ClassVar[str] = "PyramidDrop"
    paper: ClassVar[str] = "arXiv 2410.17247"
    code: ClassVar[str] = "Cooperx521/PyramidDrop@6444f304"
    licence: ClassVar[str] = "see its LICENSE file"

    layer_list: tuple[int, ...] | None = integers(None, low=1)
    image_token_ratio_list: tuple[float, ...] | None = reals((0.5, 0.25, 0.125), low=0, high=1, budget=True)
    retention_ratio: float | None = share(None, budget=True)
    tokens_per_image: int | None = integer(None, low=1, budget=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer_list is not None:
            self.check_rising("layer_list", self.layer_list)
        shares = self.image_token_ratio_list
        if shares is None:
            return
        if len(shares) != self.num_drops:
            raise MethodError(
                f"{self.name}: {self.num_drops} layers in layer_list need as many shares in "
                f"image_token_ratio_list, got {len(shares)}."
            )
        if list(shares) != sorted(shares, reverse=True):
            raise MethodError(
                f"{self.name}: image_token_ratio_list {list(shares)} must not rise: shares are of all visual tokens."
            )

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Decoder layers before which tokens go."""
        layers = self.layer_list or same_depth(_LAYERS, num_layers)
        self.check_depth("layer_list", layers, num_layers)
        return layers

    @property
    def num_drops(self) -> int:
        """How often tokens go."""
        return len(self.layer_list or _LAYERS)

    def prefill_layers(self, num_layers: int) -> tuple[int, ...]:
        return self.layers(num_layers)

    def prefill(self, step: PrefillStep) -> Selection | None:
        left, stage = step.left().block, self.layers(step.num_layers).index(step.layer)
        kept = [min(n, self.keep_count(spans, stage)) for n, spans in zip(left, step.spans, strict=True)]
        if kept == left:
            return None
        return step.keep_best(upcoming_scores(step), kept, positions="compact")

    def keep_count(self, spans: Sequence[VisualSpan], stage: int) -> int:
        """Rows of a sample's images and videos that go on behind stage number ``stage``, 0-based."""
        total = sum(span.length for span in spans)
        if self.image_token_ratio_list is not None:
            return int(total * self.image_token_ratio_list[stage])  # the product in float64, truncated
        if not total:
            return 0
        ratio = self.retention_ratio
        if ratio is None:
            ratio = min(1.0, self.tokens_per_image * len({span.item for span in spans}) / total)
        return max(1, round(total * ratio ** ((stage + 1) / self.num_drops)))


def upcoming_scores(step: PrefillStep) -> Tensor:
    """[B, L] float32: attention of the last prompt token in the layer about to run, mean over the query heads."""
    length = step.block.shape[1]
    last = torch.arange(length - 1, length, device=step.block.device)
    return step.attention(last, upcoming=True)[:, :, 0].float().mean(1)
