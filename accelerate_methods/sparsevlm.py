"""SparseVLM: text-guided token sparsification inside the LLM (ICML 2025, arXiv 2410.04417).

Text tokens that are related to the picture ("raters") are found once, on the input embeddings. Behind a few decoder
layers the visual tokens are scored by the attention that the raters paid to them in that very layer; a fixed number
stays for the layers to come. Of those that go, the best are clustered and come back as one mean each ("recycling"),
behind the tokens that stay. Three behaviours were published under one name:

* 1.5, the default, gives the numbers of the ICML paper: a fixed budget per layer, recycling, positions counted anew;
* 1.0 (and the video branch) derives the budget from the rank of the raters' attention;
* 2.0, "SparseVLM+", divides the attention by what the rotary embedding alone gives at its distance, asks the 14 heads
  that look at the picture most, recycles nothing and keeps the positions.

Ours needs one row of attention per text token instead of whole maps, takes batches, several images, GQA and any rotary
embedding, and is deterministic. All rules and differences: docs/methods/sparsevlm.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from accelerate_methods.ops.density import dpc_knn
from accelerate_methods.ops.select import by_score, mask_to_indices, on_device, top_mask
from accelerate_methods.registry import register
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.fields import choice, integer, integers, real, share
from accelerate_methods.stages.prefill import PrefillMethod, PrefillStep, Selection, VisualSpan, num_items, same_depth

#: tokens of 576 that a published setting stands for -> how many are kept behind layers 2, 6 and 15, merged ones apart
_BUDGETS = {
    "1.5": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "2.0": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
#: the same for version 1.0: scale and bias of the rank
_RANKS = {192: (13.5, 0.0), 128: (9.0, 6.0), 64: (0.8, 0.0)}
#: to what number of tokens per image all of these refer
_TABLE_TOKENS = 576
_LAYERS = {"1.5": (2, 6, 15), "2.0": (2, 6, 15), "1.0": (2, 6, 15, 19)}
#: share of the tokens that go which are merged, and how many of them make up a cluster
_RECYCLED, _PER_CLUSTER = 0.3, 10
#: by how much a row must be above the mean to be more than rounding
_ROUNDING = 1e-6
#: rows of text whose attention is computed at a time
_ROWS_AT_ONCE = 256


@register("sparsevlm")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseVLM(PrefillMethod):
    """Hyper-parameters of SparseVLM, defaults as released for 192 of 576 tokens.

    Attributes:
        version: which of the published behaviours, see above.
        pruning_layers: decoder layers (0-based) behind which tokens go; None for the released ones, 2, 6, 15 (and 19),
            or, where a decoder has no such layers, those at the same depth.
        tokens_per_image: which row of the published table: the mean over the 32 layers of the paper's model. Counts
            between the rows (192, 128, 96, 64 of 576) are interpolated and scaled with the number of tokens.
        retention_ratio: the same as a share of the tokens; 1 leaves everything as it is.
        budgets: how many of an image's tokens stay behind each pruning layer instead, merged ones not counted.
        scale, bias: version 1.0: int(rank * scale + bias) tokens stay.
        heads: version 2.0: attention heads that are asked.
    """

    title: ClassVar[str] = "SparseVLM"
    paper: ClassVar[str] = "arXiv 2410.04417"
    code: ClassVar[str] = "Gumpest/SparseVLMs@26a5f488"
    licence: ClassVar[str] = "Apache-2.0"

    version: str = choice("1.5", "1.5", "1.0", "2.0")
    pruning_layers: tuple[int, ...] | None = integers(None, low=0)
    tokens_per_image: int | None = integer(192, low=1, budget=True, aliases=("retained_tokens",))
    retention_ratio: float | None = share(None, budget=True)
    budgets: tuple[int, ...] | None = integers(None, low=1, budget=True)
    scale: float | None = real(None, low=0, budget="rank")
    bias: float | None = real(None, budget="rank")
    heads: int = integer(14, low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pruning_layers is not None:
            self.check_rising("pruning_layers", self.pruning_layers)
        if self.version == "1.0":
            if self.scale is None and self.tokens_per_image not in _RANKS:
                known = ", ".join(map(str, _RANKS))
                raise MethodError(
                    f"{self.name}: version 1.0 keeps as many tokens as a rank says; give scale and bias, or "
                    f"tokens_per_image out of {known}."
                )
            return
        if self.scale is not None:
            raise MethodError(f"{self.name}: scale and bias belong to version 1.0, not {self.version}.")
        layers = len(self.pruning_layers or _LAYERS[self.version])
        if layers != (3 if self.budgets is None else len(self.budgets)):
            raise MethodError(
                f"{self.name}: {layers} pruning_layers need as many budgets; the published ones are three, so give "
                "budgets."
            )

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Decoder layers behind which tokens go."""
        layers = self.pruning_layers or same_depth(_LAYERS[self.version], num_layers, first=0)
        if layers[-1] >= num_layers:
            raise MethodError(
                f"{self.name}: pruning layer {layers[-1]} is outside the allowed range [0, {num_layers - 1}]: "
                f"the decoder has {num_layers} layers."
            )
        return layers

    def prefill_layers(self, num_layers: int) -> tuple[int, ...]:
        # what a layer puts out is what goes into the next
        return 0, *(layer + 1 for layer in self.layers(num_layers))

    def prefill(self, step: PrefillStep) -> Selection | None:
        if step.layer == 0:
            step.memory["prompt"] = _Prompt.read(step)
            return None
        prompt: _Prompt = step.memory["prompt"]
        if not prompt.longest_tail:
            return None
        if step.cuts != prompt.cuts:  # another method has dropped tokens in between
            prompt.counts = step.block.sum(1).tolist()
        paid = self._paid(step, prompt)
        kept = self._kept(step, prompt, paid)
        if kept == prompt.counts:
            return None
        if self.version == "2.0":
            total = paid.masked_fill(~step.block[:, None], 0).sum(-1)
            paid = paid * top_mask(total, min(self.heads, step.num_heads))[..., None]
        return self._pruned(step, prompt, paid.mean(1), kept)

    # -- how many ----------------------------------------------------------------------------------------------------

    def _kept(self, step: PrefillStep, prompt: _Prompt, paid: Tensor) -> list[int]:
        """Tokens of each sample that stay, merged ones apart: at least one goes, as in the release."""
        if self.version == "1.0":
            scale, bias = (self.scale, self.bias) if self.scale is not None else _RANKS[self.tokens_per_image]
            ranks = zip(prompt.ranks(step), prompt.counts, strict=True)
            kept = [n if rank >= n else max(0, int(rank * scale + bias)) for rank, n in ranks]
            stay = [k if k == n else max(0, min(k, n - 1)) for k, n in zip(kept, prompt.counts, strict=True)]
        else:
            stage = self.layers(step.num_layers).index(step.layer - 1)
            budgets = [self.keep_count(spans, stage) for spans in step.spans]
            stay = [
                n if budget is None else max(0, min(budget, n - 1))
                for budget, n in zip(budgets, prompt.counts, strict=True)
            ]
        return [k if tail else n for k, n, tail in zip(stay, prompt.counts, prompt.tails, strict=True)]

    def keep_count(self, spans: Sequence[VisualSpan], stage: int) -> int | None:
        """Tokens of a sample's images that stay behind the pruning layer number ``stage``, merged ones apart.

        None for all of them: where as many are asked for as there are.
        """
        total, items = sum(span.length for span in spans), num_items(spans)
        if self.budgets is not None:
            return self.budgets[stage] * items
        ratio = self.retention_ratio
        if ratio is None:
            ratio = self.tokens_per_image * items / max(total, 1)
        if ratio >= 1:
            return None
        budget = published_budgets(ratio * _TABLE_TOKENS, self.version)[stage]
        return max(1, round(budget * total / _TABLE_TOKENS))

    # -- which -------------------------------------------------------------------------------------------------------

    def _paid(self, step: PrefillStep, prompt: _Prompt) -> Tensor:
        """[B, H, L] float32: what the raters of each sample pay to every row, their mean."""
        raters, length = prompt.raters, step.block.shape[1]
        weights = raters.float() / raters.sum(1, keepdim=True).clamp(min=1)
        paid = weights.new_zeros(len(raters), step.num_heads, length)
        prompt.rated = []
        for first in range(0, raters.shape[1], _ROWS_AT_ONCE):
            rows = torch.arange(length - raters.shape[1], length, device=raters.device)[first : first + _ROWS_AT_ONCE]
            part = step.attention(rows).float()
            if self.version == "2.0":
                part = part / rotary_decay(step.rotary, rows)[:, None]
            if self.version == "1.0":
                prompt.rated.append(part.mean(1))
            paid += torch.einsum("bhrl,br->bhl", part, weights[:, first : first + _ROWS_AT_ONCE])
        return paid

    def _pruned(self, step: PrefillStep, prompt: _Prompt, scores: Tensor, kept: list[int]) -> Selection:
        """Text and the ``kept`` best of every sample, and what the best of the others are merged into."""
        scores = scores.masked_fill(~step.block, -torch.inf)
        stays = (top_mask(scores, kept) & step.block) | step.text
        order, length = by_score(scores), step.block.shape[1]
        hidden = step.hidden_states if self.version == "2.0" else step.hidden_states.clone()
        rows, owners, counts = [], [], []
        for row, (count, stay, tail) in enumerate(zip(prompt.counts, kept, prompt.tails, strict=True)):
            before = mask_to_indices(stays[row : row + 1, : length - tail], prompt.texts[row] - tail + stay)[0]
            behind = torch.arange(length - tail, length, device=order.device)
            centres = before[:0]
            if self.version != "2.0" and stay < count:
                best = order[row, stay : stay + int(_RECYCLED * (count - stay)) + 1]
                merged, labels, peaks = cluster_and_merge(hidden[row, best], len(best) // _PER_CLUSTER + 1)
                centres = best[peaks]
                hidden[row, centres] = merged
            rows.append(torch.cat([before, centres, behind]))
            owner = torch.full((length,), -1, device=order.device)
            owner[rows[-1]] = torch.arange(len(rows[-1]), device=order.device)
            if len(centres):
                owner[best] = labels + len(before)
            owners.append(owner)
            counts.append(stay + len(centres))
        prompt.counts, prompt.cuts = counts, step.cuts + 1
        if self.version == "2.0":
            return Selection.of_rows(rows)
        return Selection.of_rows(rows, owners, hidden_states=hidden, positions="compact", order="given")


@dataclasses.dataclass
class _Prompt:
    """What is known of a batch of prompts from its embeddings on.

    Attributes:
        raters: [B, R] which of the last R rows of each prompt are raters; none in a prompt without pictures.
        tails: rows of text behind the last picture of each sample, 0 without one; texts: all of its rows of text.
        counts: visual rows of each sample that are left.
        cuts: ``PrefillStep.cuts`` behind the last selection of ours.
        rated: [B, r, L] attention of the last rows, version 1.0, in parts.
    """

    raters: Tensor
    tails: list[int]
    texts: list[int]
    counts: list[int]
    cuts: int = 0
    rated: list[Tensor] = dataclasses.field(default_factory=list)

    @classmethod
    def read(cls, step: PrefillStep) -> _Prompt:
        length = step.block.shape[1]
        tails = [length - max(span.end for span in spans) if spans else 0 for spans in step.spans]
        counts = [sum(span.length for span in spans) for spans in step.spans]
        longest = max(tails)
        behind = on_device([longest - tail for tail in tails], step.block.device)[:, None]
        text = torch.arange(longest, device=step.block.device) >= behind
        raters = select_raters(step.hidden_states, step.block, text)[1]
        texts = [total - count for total, count in zip(step.lengths, counts, strict=True)]
        return cls(raters, tails, texts, counts)

    @property
    def longest_tail(self) -> int:
        return self.raters.shape[1]

    def ranks(self, step: PrefillStep) -> list[int]:
        """Rank of the attention that each sample's raters pay to visual rows. Reads the device."""
        rated = torch.cat(self.rated, dim=1)
        return [
            int(torch.linalg.matrix_rank(rated[row][self.raters[row]][:, step.block[row]])) if count and tail else count
            for row, (count, tail) in enumerate(zip(self.counts, self.tails, strict=True))
        ]


def select_raters(hidden: Tensor, visual: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """How related each of the last rows of a prompt is to its visual rows, and which are raters: more than the mean.

    Args:
        hidden: [B, L, D] input embeddings; visual: [B, L] the visual rows.
        text: [B, R] True at those of the last R rows that are text behind the picture.

    Returns:
        relevance [B, R] float32, 0 outside of ``text``; raters [B, R]. Where none is above the mean (a single row) all
        text is.
    """
    if not text.shape[1]:
        return text.float(), text
    states = hidden.detach().float()
    products = states @ states[:, -text.shape[1] :].transpose(1, 2)
    products = products.masked_fill(~text[:, None], torch.finfo(products.dtype).min)
    weights = visual.float() / visual.sum(1, keepdim=True).clamp(min=1)
    relevance = torch.einsum("blr,bl->br", products.softmax(-1), weights) * text
    mean = relevance.sum(1, keepdim=True) / text.sum(1, keepdim=True).clamp(min=1)
    raters = (relevance > mean * (1 + _ROUNDING)) & text
    return relevance, torch.where(raters.any(1, keepdim=True), raters, text)


def cluster_and_merge(tokens: Tensor, clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means of clusters around density peaks.

    Args:
        tokens: [M, D]; clusters: K, which is also the number of neighbours that a density counts.

    Returns:
        merged [K, D], the densest peak first; labels [M] of the tokens; centres [K], each a token of its own cluster.
    """
    labels, centres = dpc_knn(tokens[None], clusters, clusters, exact=True)
    member = torch.nn.functional.one_hot(labels[0], centres.shape[1]).T.float()
    merged = (member @ tokens.float()) / (member.sum(1, keepdim=True) + 1e-6)
    return merged.to(tokens.dtype), labels[0], centres[0]


def rotary_decay(rotary: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
    """[B, R, L] what the rotary embedding alone makes of the product of two equal states, by their distance.

    Args:
        rotary: (cos, sin), [B, L, d] each; rows: [R] of the queries.
    """
    cos, sin = (table.float() for table in rotary)
    half = cos.shape[-1] // 2
    ones = torch.cat([cos[..., :half] - sin[..., :half], cos[..., half:] + sin[..., half:]], dim=-1)
    return ones[:, rows] @ ones.transpose(1, 2) / cos.shape[-1] ** 0.5


def published_budgets(tokens: float, version: str) -> tuple[float, ...]:
    """Tokens of 576 behind each pruning layer for a mean of ``tokens``: a published row, or between two of them."""
    rows = {0: (0.0,) * 3, **dict(sorted(_BUDGETS[version].items())), _TABLE_TOKENS: (float(_TABLE_TOKENS),) * 3}
    for low, high in pairwise(rows):
        if tokens <= high:
            part = (tokens - low) / (high - low)
            return tuple(a + part * (b - a) for a, b in zip(rows[low], rows[high], strict=True))
    return rows[_TABLE_TOKENS]
