"""FastV: an image is worth 1/2 tokens after layer 2 (ECCV 2024, arXiv 2403.06764).

Decoder layers 0..K-1 see the whole prompt. Before layer K every visual token is scored by the attention that the last
prompt token pays to it in layer K-1, averaged over the query heads, and the share R with the lowest scores is dropped
for the layers to come. Text always stays; kept tokens keep order and position ids.

This is the KV-cache release (the Hugging Face fork): tokens are dropped once, at prefill; layers below K cache the
whole prompt, the others what was left, and decode steps attend to everything cached. The paper scores by the attention
from all later tokens; the code, which we follow, by the last one alone. The official code further fixes where the image
stands, takes one image and one sample; here the visual rows come from the prompt, several images or videos compete for
one budget, and each sample of a batch has its own scores. All rules and the differences to the official code:
docs/methods/fastv.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from accelerate_methods.ops.select import random_mask, top_mask
from accelerate_methods.registry import register
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.fields import integer, real, share
from accelerate_methods.stages.prefill import (
    PrefillMethod,
    PrefillStep,
    Selection,
    counted_selection,
    last_token_scores,
    num_items,
)


@register("fastv")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FastV(PrefillMethod):
    """Hyper-parameters of FastV, defaults as the paper recommends (K=2, R=50 %).

    Exactly one of ``r``, ``retention_ratio`` and ``tokens_per_image`` says how many of a prompt's n visual rows (the
    newlines inside an image or video are among them) go on.

    Attributes:
        k: K, number of decoder layers that see everything; 0 keeps random tokens, as in the paper's K=0 rows.
        r: R, share that is dropped: round(n * (1 - R)) stay, halves to even; 1 drops all. Beware that other code bases
            call the kept share "r".
        retention_ratio: 1 - R instead, the share that is kept, rounded likewise; at least one stays.
        tokens_per_image: the number that stays instead ("attention rank" of the official scripts), per image or video.
        seed: k=0 only: the same seed keeps the same tokens.
    """

    title: ClassVar[str] = "FastV"
    paper: ClassVar[str] = "arXiv 2403.06764"
    code: ClassVar[str] = "pkunlp-icler/FastV@d1659729"
    licence: ClassVar[str] = "none stated"
    misleading: ClassVar[Mapping[str, str]] = {
        "fastv_r": "some code bases mean the share that is dropped, others the one that is kept; give r (dropped) or "
        "retention_ratio (kept)"
    }
    positions: ClassVar[str] = "original"

    k: int = integer(2, low=0, aliases=("fastv_k",))
    r: float | None = real(0.5, low=0, high=1, budget=True)
    retention_ratio: float | None = share(None, budget=True)
    tokens_per_image: int | None = integer(None, low=0, budget=True, aliases=("fast_v_attention_rank",))
    seed: int = integer(0, low=0)

    def prefill_layers(self, num_layers: int) -> tuple[int, ...]:
        if self.k >= num_layers:
            raise MethodError(
                f"{self.name}: k={self.k} is outside the allowed range [0, {num_layers - 1}]: "
                f"the decoder has {num_layers} layers."
            )
        return (self.k,)

    def prefill(self, step: PrefillStep) -> Selection | None:
        totals = visual_rows(step)
        kept = [self.keep_count(total, num_items(spans)) for total, spans in zip(totals, step.spans, strict=True)]
        if kept == totals:
            return None
        if self.k == 0:
            keep = ~step.block | random_mask(step.block, totals, kept, self.seed)
        else:
            keep = keep_best(last_token_scores(step), step.block, kept)
        return counted_selection(step, keep, totals, kept)

    def keep_count(self, total: int, items: int = 1) -> int:
        """How many of the ``total`` visual rows of some items go on, 0 <= count <= total."""
        if self.r is not None:
            return round(total * (1 - self.r))  # Python's round is the reference: float64, halves to even
        if self.retention_ratio is not None:
            return min(total, max(1, round(total * self.retention_ratio)))
        return min(total, self.tokens_per_image * items)


def visual_rows(step: PrefillStep) -> list[int]:
    """Visual rows per sample, newlines included."""
    if step.rows is not None:  # rows have gone since the prompt: only the device knows which
        return step.block.sum(1).tolist()
    return [sum(span.length for span in sample) for sample in step.spans]


def keep_best(scores: Tensor, block: Tensor, kept: Sequence[int]) -> Tensor:
    """[B, L] True outside the visual rows and at the ``kept`` best of each sample's visual rows.

    Args:
        scores: [B, L]; block: [B, L] True at visual rows.
        kept: counts per sample.
    """
    return ~block | top_mask(scores.masked_fill(~block, -torch.inf), kept)
