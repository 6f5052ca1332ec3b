"""Prefill methods that merge the visual rows of least attention into the most similar others, before one layer."""

from __future__ import annotations

import torch
from torch import Tensor

from accelerate_methods.ops.diversity import directions
from accelerate_methods.ops.merge import running_means
from accelerate_methods.ops.select import by_score
from accelerate_methods.stages.prefill import PrefillMethod, PrefillStep, Selection, last_token_scores, same_depth


class LeastAttendedMerge(PrefillMethod):
    """What HoliTom does inside the LLM, and methods that build on it.

    The visual rows to which the last prompt token attends least, in the layer before, are merged one after the other
    into the most similar of those that stay. Newlines count as visual rows. A method has fields of these names.

    Attributes:
        retention_ratio: of what happens before the LLM; at 1 nothing happens here either.
        inner: whether it acts at all.
        k: decoder layer before which it acts; None for layer 18 of 28, or that at the same depth.
        r: share of the rows that is merged into the others.
        causal_score_layer: False lets every row of layer k - 1 see those behind it, as the released codes do.

    Source: HoliTom (cokeshao/HoliTom@e9b2972f); the rules are in docs/methods/holitom.md, step 6.
    """

    retention_ratio: float | None
    inner: bool
    k: int | None
    r: float
    causal_score_layer: bool

    def stages_off(self) -> tuple[str, ...]:
        return () if self.inner else ("prefill",)

    def prefill_layers(self, num_layers: int) -> tuple[int, ...]:
        layers = same_depth((18,), num_layers, depth=28) if self.k is None else (self.k,)
        self.check_depth("k", layers, num_layers)
        return layers

    def unmasked_layers(self, num_layers: int) -> tuple[int, ...]:
        return () if self.causal_score_layer or self.retention_ratio == 1 else (self.prefill_layers(num_layers)[0] - 1,)

    def prefill(self, step: PrefillStep) -> Selection | None:
        left = step.left().block
        kept = [max(min(n, 1), round(n * (1 - self.r))) for n in left]  # halves to even, in float64
        if kept == left or self.retention_ratio == 1:
            return None
        length, device = step.block.shape[1], step.block.device
        order = by_score(last_token_scores(step).masked_fill(~step.block, -torch.inf))
        goes_on = step.text.clone()
        hidden, owner = step.hidden_states.clone(), torch.arange(length, device=device).repeat(len(left), 1)
        for sample, (count, total) in enumerate(zip(kept, left, strict=True)):
            best, rest = order[sample, :count], order[sample, count:total].sort().values
            goes_on[sample].index_fill_(0, best, True)
            if total > count:
                hidden[sample, best], into = merge_into_nearest(hidden[sample], best, rest)
                owner[sample, rest] = best[into]
        chosen = step.keep(goes_on, kept, hidden_states=hidden)
        slot = goes_on.cumsum(1) - 1 + (chosen.indices.shape[1] - goes_on.sum(1, keepdim=True))
        chosen.owner = slot.masked_fill(~goes_on, -1).gather(1, owner)
        return chosen


def merge_into_nearest(hidden: Tensor, best: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Merge rows into the most similar of others, one after the other, each time half and half.

    Args:
        hidden: [L, D]; best: [K] rows that take others in, of equally similar ones the first does; rest: [M] rows that
            are merged, in this order.

    Returns:
        [K, D] what the rows become; [M] the number (0..K-1) of the one that each is merged into.
    """
    keeps, goes = hidden[best], hidden[rest]
    # the length of a row that is merged does not matter to whom it is most similar
    into = (goes.detach().float() @ directions(keeps)[0].T).max(1).indices
    return running_means(keeps, goes, into), into
