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

from accelerate_methods.registry import register
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.fields import integer, reals, share
from accelerate_methods.stages.prefill import PrefillStep, Selection, VisualSpan, last_token_scores
from accelerate_methods.stages.staged import StagedPrefillMethod


@register("pdrop")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidDrop(StagedPrefillMethod):
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
    released_layers: ClassVar[tuple[int, ...]] = (8, 16, 24)

    image_token_ratio_list: tuple[float, ...] | None = reals((0.5, 0.25, 0.125), low=0, high=1, budget=True)
    retention_ratio: float | None = share(None, budget=True)
    tokens_per_image: int | None = integer(None, low=1, budget=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = self.image_token_ratio_list
        if shares is None:
            return
        self.check_shares("image_token_ratio_list", shares)
        if list(shares) != sorted(shares, reverse=True):
            raise MethodError(
                f"{self.name}: image_token_ratio_list {list(shares)} must not rise: shares are of all visual tokens."
            )

    def prefill(self, step: PrefillStep) -> Selection | None:
        left, stage = step.left().block, self.stage_of(step)
        kept = [min(n, self.keep_count(spans, stage)) for n, spans in zip(left, step.spans, strict=True)]
        if kept == left:
            return None
        return step.keep_best(last_token_scores(step, upcoming=True), kept, positions="compact")

    def keep_count(self, spans: Sequence[VisualSpan], stage: int) -> int:
        """Rows of a sample's images and videos that go on behind stage number ``stage``, 0-based."""
        total = sum(span.length for span in spans)
        if self.image_token_ratio_list is not None:
            return int(total * self.image_token_ratio_list[stage])  # the product in float64, truncated
        return max(min(total, 1), self.rows_behind(stage, spans))
