"""FrameFusion: merging similar frames, then pruning, inside the LLM (ICCV 2025, arXiv 2501.01986).

Before layer 0 and in every layer behind its attention, a visual token that resembles the token at the same place of the
frame before is merged into it. Once few tokens are alike, merging stops, and in the next layer those to which the last
prompt token pays least are dropped, so many that the whole prefill costs the share ``cost`` of tokens x layers.

Videos only. Text stays where it is; what is left keeps its rotary positions. The official code runs one video of one
sample and takes the newlines of LLaVA-Video's grid for tokens of their frame. So do we; otherwise a place is one of the
layout, whatever the model, and each sample of a batch has its own budget. All rules: docs/methods/framefusion.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from accelerate_methods.ops.merge import group_means
from accelerate_methods.ops.select import mask_to_indices, pick_rows, right_aligned_indices, top_mask
from accelerate_methods.registry import register
from accelerate_methods.stages.fields import integer, real, share
from accelerate_methods.stages.prefill import PrefillMethod, PrefillStep, Selection, last_token_scores


@register("framefusion")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameFusion(PrefillMethod):
    """Hyper-parameters of FrameFusion, defaults as released for LLaVA-Video.

    Attributes:
        cost: share of the prefill that is paid for, visual tokens times layers.
        similarity_lower_bound: cosine similarity from which on a token is merged (0.6 for LLaVA-Video, 0.5 for Qwen2-VL
            and InternVL2.5).
        ratio_lower_bound: merging stops with the call that merges less than this share of the tokens.
        num_layers: layers that the budget counts with; None for those of the decoder (the release counts 28 always).
    """

    title: ClassVar[str] = "FrameFusion"
    paper: ClassVar[str] = "arXiv 2501.01986"
    code: ClassVar[str] = "thu-nics/FrameFusion@fbec1d2e"
    licence: ClassVar[str] = "see its LICENSE file"
    needs_grid: ClassVar[bool] = True
    modalities: ClassVar[frozenset[str]] = frozenset({"video"})

    cost: float | None = share(0.3, budget=True, aliases=("retention_ratio",))
    similarity_lower_bound: float = real(0.6, low=-1, high=1)
    ratio_lower_bound: float = real(0.1, low=0, high=1)
    num_layers: int | None = integer(None, low=1)

    def prefill_layers(self, num_layers: int) -> tuple[int, ...]:
        return (0,)

    def inner_layers(self, num_layers: int) -> tuple[int, ...]:
        return tuple(range(num_layers))

    def prefill(self, step: PrefillStep) -> Selection | None:
        samples: list[_Sample] | None = step.memory.get("samples")
        if samples is not None and not any(sample.merges or sample.prunes for sample in samples):
            return None
        kinds = kinds_of(step)
        if samples is None:
            samples = step.memory["samples"] = [_Sample() for _ in step.spans]
        if step.cuts != step.memory.get("cuts"):  # the first time, or another method has dropped tokens in between
            real = torch.ones_like(kinds, dtype=torch.bool) if step.valid is None else step.valid
            counts = torch.stack([(kinds >= 0).sum(1), real.sum(1)], dim=1)
            for sample, (sample.count, sample.real) in zip(samples, counts.tolist(), strict=True):
                sample.merges &= sample.count > 0
        pruned = self._pruned(step, kinds, samples) if step.inside else None
        hidden, owner, merged = self._merged(step, kinds, samples)
        gone = merged if pruned is None else pruned if merged is None else pruned | merged
        step.memory["cuts"] = step.cuts + (gone is not None)
        if gone is None:
            return None
        keep = ~gone if step.valid is None else ~gone & step.valid
        counts = [sample.real for sample in samples]
        indices, valid = right_aligned_indices(keep, counts)
        place = keep.long().cumsum(1) - 1 + indices.shape[1] - keep.sum(1, keepdim=True)
        holds = place.masked_fill(~keep, -1).gather(1, owner)
        return Selection(indices=indices, valid=valid, hidden_states=hidden, owner=holds)

    def _merged(
        self, step: PrefillStep, kinds: Tensor, samples: Sequence[_Sample]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One merge call: the states, the row that holds each row, and which are merged into another (None: none)."""
        hidden = step.hidden_states
        owner = torch.arange(kinds.shape[1], device=kinds.device).expand_as(kinds)
        if not any(sample.merges for sample in samples):
            return hidden, owner, None
        similarity, order = neighbour_similarity(hidden, kinds)
        alike = (similarity >= self.similarity_lower_bound).sum(1)
        follows = (similarity >= -1.5).sum(1)  # tokens with a neighbour: the rounding of a cosine is far smaller
        wanted = []
        for sample, (above, most) in zip(samples, torch.stack([alike, follows], dim=1).tolist(), strict=True):
            wanted.append(min(self._number_to_merge(sample, above, step.num_layers), most) if sample.merges else 0)
            sample.take(wanted[-1])
        if not any(wanted):
            return hidden, owner, None
        merged = top_mask(similarity, wanted)
        owner = run_owners(merged, order)
        return merge_into(hidden, owner, merged, sum(wanted)), owner, merged

    def _number_to_merge(self, sample: _Sample, above: int, num_layers: int) -> int:
        """How many tokens of a sample this call merges; whether it was the last is noted on the way."""
        most = pruning_ratio(sample.sparsity, self.cost, self.num_layers or num_layers)
        share_merged = above / sample.count
        if share_merged >= most:
            sample.merges = False
            return int(most * sample.count)
        sample.sparsity.append(share_merged)
        if share_merged < self.ratio_lower_bound:
            sample.merges, sample.prunes = False, True
        return above

    def _pruned(self, step: PrefillStep, kinds: Tensor, samples: Sequence[_Sample]) -> Tensor | None:
        """[B, L] tokens to which the last prompt token pays least, where merging had ended before this call."""
        if not any(sample.prunes for sample in samples):
            return None
        counts = []
        for sample in samples:
            kept = sample.count
            if sample.prunes:
                ratio = pruning_ratio(sample.sparsity, self.cost, self.num_layers or step.num_layers)
                kept = round(sample.count * (1 - ratio))  # half to even, as in the release
            sample.prunes = False
            sample.take(sample.count - kept)
            counts.append(kept)
        scores = last_token_scores(step).masked_fill(kinds < 0, -torch.inf)
        return (kinds >= 0) & ~top_mask(scores, counts)


@dataclasses.dataclass
class _Sample:
    """Where a sample of the batch stands.

    Attributes:
        count: tokens of its videos that are left; real: all rows that are.
        sparsity: shares that the calls so far have merged.
        merges: whether it goes on merging; prunes: whether the next layer prunes it.
    """

    count: int = 0
    real: int = 0
    sparsity: list[float] = dataclasses.field(default_factory=list)
    merges: bool = True
    prunes: bool = False

    def take(self, rows: int) -> None:
        self.count -= rows
        self.real -= rows


def kinds_of(step: PrefillStep) -> Tensor:
    """[B, L] a number for each place of each video, the same in all of its frames; -1 at rows that have no place."""
    where = step.where()
    places = where.place.amax() + 1
    return torch.where(where.place >= 0, where.item * places + where.place, -1)


def pruning_ratio(sparsity: Sequence[float], cost: float, num_layers: int) -> float:
    """Share of the tokens left that has to go for all remaining layers, so that the prefill costs ``cost`` in all.

    Args:
        sparsity: shares that went so far, one entry for every call, each of which counts as a layer.
    """
    kept, used = 1.0, 0.0
    for share_gone in sparsity:
        kept *= 1 - share_gone
        used += kept
    left = num_layers * cost - used
    layers = num_layers - len(sparsity)
    if left <= 0 or layers <= 0 or kept <= 0:  # the release stops with an error
        return 1.0
    return max(0.0, 1 - left / (layers * kept))


def neighbour_similarity(hidden: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine similarity of each row with the row of its kind in front of it.

    Args:
        hidden: [B, L, D]; kinds: [B, L], -1 for rows that have no neighbour.

    Returns:
        [B, L] float32, -2 where there is none in front; [B, L] the rows by kind, each kind in order.
    """
    order = torch.sort(kinds, dim=1, stable=True).indices
    previous = torch.empty_like(order).scatter_(1, order, order.roll(1, dims=1))
    same = (kinds.gather(1, previous) == kinds) & (kinds >= 0)
    first = torch.zeros_like(same).scatter_(1, order[:, :1], True)  # whose "previous" is the last of all
    states = hidden.detach()
    before = pick_rows(states, previous)
    product = (states * before).sum(-1, dtype=torch.float32)
    norm = torch.linalg.vector_norm(states, dim=-1, dtype=torch.float32)
    cosine = product / (norm * norm.gather(1, previous))
    return cosine.masked_fill(~same | first, -2.0), order


def run_owners(merged: Tensor, order: Tensor) -> Tensor:
    """[B, L] the row that holds each row: itself, or of rows that are merged the nearest one in front that is not.

    Args:
        merged: [B, L]; order: as in :func:`neighbour_similarity`.
    """
    slots = torch.arange(order.shape[1], device=order.device).expand_as(order)
    anchor = slots.masked_fill(merged.gather(1, order), -1).cummax(1).values
    return torch.empty_like(order).scatter_(1, order, order.gather(1, anchor.clamp(min=0)))


def merge_into(hidden: Tensor, owner: Tensor, merged: Tensor, count: int) -> Tensor:
    """The states with every row that holds others replaced by their plain mean.

    Args:
        hidden: [B, L, D]; owner: [B, L] row that holds each row; merged: [B, L] rows held by another, ``count`` in all.
    """
    batch, length, width = hidden.shape
    flat = hidden.flatten(0, 1)
    owner = (owner + torch.arange(batch, device=owner.device)[:, None] * length).flatten()
    members = mask_to_indices(merged.flatten()[None], count)[0]
    anchors = owner[members]
    holds = torch.zeros_like(owner).index_fill_(0, anchors, 1)
    group = (holds.cumsum(0) - 1)[anchors]  # anchors numbered; there are ``count`` of them at most
    mean, sizes = group_means(flat, group, count, index=members)
    row = torch.zeros_like(group).scatter_(0, group, anchors)
    # numbers that are not taken do once more what the first member's does
    slot = torch.where(sizes > 0, torch.arange(count, device=group.device), group[0])
    row, mean, sizes = row[slot], mean[slot], sizes[slot, None]
    mean = (mean.float() * sizes + flat[row].float()) / (sizes + 1)
    return flat.index_copy(0, row, mean.to(flat.dtype)).view(batch, length, width)
