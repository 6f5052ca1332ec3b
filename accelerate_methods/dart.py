"""DART: duplication-aware reduction of tokens (EMNLP 2025, arXiv 2502.11494).

Before decoder layer K a few pivots are chosen, visual and text tokens whose key states are largest. Each pivot in turn
then takes the visual tokens that resemble it least; what no pivot takes is a duplicate and goes. No attention is
needed. Text stays, kept tokens keep order and position ids.

Pivots compete for tokens, so their turn matters. The official code iterates over a Python set of their positions, whose
order follows from the interpreter's hash table; :func:`set_order` computes that order where the positions are, without
reading them. Differences to the official code and all rules: docs/methods/dart.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from accelerate_methods.ops.select import by_score, on_device, top_mask
from accelerate_methods.registry import register
from accelerate_methods.stages.fields import integer, real, share
from accelerate_methods.stages.prefill import PrefillMethod, PrefillStep, Selection

#: CPython's hash table of a set: slots at first, neighbours that are tried before it jumps, bits that a jump uses up
_SLOTS, _NEIGHBOURS, _SHIFT = 8, 9, 5
#: positions in a prompt have no more bits
_POSITION_BITS = 30


@register("dart")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DART(PrefillMethod):
    """Hyper-parameters of DART, defaults as released for LLaVA-1.5 at "128" of 576 tokens, which keeps 132.

    Exactly one of ``max_num``, ``reduction_ratio``, ``retention_ratio`` and ``tokens_per_image`` says how many of a
    prompt's n visual rows (the newlines inside an image or video are among them) go on.

    Attributes:
        k: K, number of decoder layers that see everything.
        pivot_image_token: visual tokens that are pivots.
        pivot_text_token: rows of the text behind the last image that are pivots.
        max_num: number for each image or video of which every pivot takes an equal part, rounded down; visual pivots
            come on top, as in the release for LLaVA.
        reduction_ratio: share that is dropped instead, the rest divided likewise, as in the release for Qwen2.5-VL.
        retention_ratio: share that is kept instead, visual pivots among it, rounded; at least one stays.
        tokens_per_image: their number instead, per image or video.
    """

    title: ClassVar[str] = "DART"
    paper: ClassVar[str] = "arXiv 2502.11494"
    code: ClassVar[str] = "ZichenWen1/DART@5a19452f"
    licence: ClassVar[str] = "Apache-2.0"
    positions: ClassVar[str] = "original"

    k: int = integer(2, low=1, aliases=("pruned_layer", "pruning_loc"))
    pivot_image_token: int = integer(4, low=1)
    pivot_text_token: int = integer(4, low=0)
    max_num: int | None = integer(128, low=0, budget=True, aliases=("max_num_trunction",))
    reduction_ratio: float | None = real(None, low=0, high=1, budget=True)
    retention_ratio: float | None = share(None, budget=True)
    tokens_per_image: int | None = integer(None, low=1, budget=True)

    def prefill_layers(self, num_layers: int) -> tuple[int, ...]:
        self.check_depth("k", [self.k], num_layers)
        return (self.k,)

    def prefill(self, step: PrefillStep) -> Selection | None:
        left, tails = step.left(), step.tails()
        plans = [
            self.plan(total, len({span.item for span in spans}), tail)
            for total, spans, tail in zip(left.block, step.spans, tails, strict=True)
        ]
        kept = [images + sum(takes) for images, takes in plans]
        if kept == left.block:
            return None
        sizes, states, going = key_sizes(step.keys()), step.final_normed(), step.block.clone()
        for row, ((images, takes), tail) in enumerate(zip(plans, tails, strict=True)):
            if kept[row] == left.block[row]:
                continue
            real = slice(sizes.shape[1] - left.real[row], None)  # places are counted as if the sample were alone
            visual = step.block[row, real]
            pivots = find_pivots(sizes[row, real], visual, images, tail, len(takes) - images)
            going[row, real] = retained(states[row, real], visual, *pivots, takes)
        return step.keep(going, kept)

    def plan(self, total: int, items: int, tail: int) -> tuple[int, list[int]]:
        """How many visual pivots a sample has, and how many tokens each pivot takes, by turn.

        Args:
            total: rows of its images and videos; items: how many these are; tail: rows of text behind them.
        """
        images = min(self.pivot_image_token, total)
        exact = self._wanted(total, items)
        if exact is not None:
            images = min(images, exact)
        pivots = images + min(self.pivot_text_token, tail)
        if not total or not pivots:
            return 0, []
        if exact is not None:
            taken = exact - images
        else:
            if self.max_num is not None:
                each = min(self.max_num * items, total - images) // pivots
            else:
                each = min(int(total * (1 - self.reduction_ratio) / pivots), (total - images) // pivots)
            taken = each * pivots
        each, more = divmod(taken, pivots)
        return images, [each + (turn < more) for turn in range(pivots)]

    def _wanted(self, total: int, items: int) -> int | None:
        """How many rows stay, visual pivots among them; None where what the pivots take is said instead."""
        if self.retention_ratio is not None:
            return min(total, max(1, round(total * self.retention_ratio)))
        if self.tokens_per_image is not None:
            return min(total, self.tokens_per_image * items)
        everything = self.reduction_ratio == 0 if self.max_num is None else self.max_num * items >= total
        return total if everything else None


def key_sizes(keys: Tensor) -> Tensor:
    """[B, L] float32: L1 norm of a row's key states [B, G, L, d], all heads together."""
    return torch.linalg.vector_norm(keys.detach(), ord=1, dim=(1, 3), dtype=torch.float32)


def find_pivots(sizes: Tensor, visual: Tensor, images: int, tail: int, texts: int) -> tuple[Tensor, Tensor]:
    """Positions of the rows with the largest key states, the largest first.

    Args:
        sizes: [L]; visual: [L] True at rows of images and videos.
        images: how many of these; texts: how many of the last ``tail`` rows.

    Returns:
        visual pivots [images], text pivots [texts].
    """
    behind = len(sizes) - tail
    return (
        by_score(sizes.masked_fill(~visual, -torch.inf)[None])[0, :images],
        by_score(sizes[None, behind:])[0, :texts] + behind,
    )


def retained(states: Tensor, visual: Tensor, images: Tensor, texts: Tensor, takes: Sequence[int]) -> Tensor:
    """[L] True at the visual pivots and at what the pivots take, each in its turn: those of lowest cosine similarity.

    Args:
        states: [L, D] through the norm behind the last layer; visual: [L] True at rows of images and videos.
        images, texts: positions of the pivots, see :func:`find_pivots`.
        takes: how many rows each of them takes, by turn; of equal rows the first.
    """
    unit = functional.normalize(states.detach().float(), dim=-1)
    resemblance = unit[set_order(torch.cat([images, texts]))] @ unit.T
    kept = torch.zeros_like(visual).index_fill(0, images, True)
    free = visual & ~kept
    for row, count in zip(resemblance, takes, strict=True):
        chosen = top_mask((-row).masked_fill(~free, -torch.inf)[None], count)[0]
        kept, free = kept | chosen, free & ~chosen
    return kept


def set_order(values: Tensor) -> Tensor:
    """[P] the different numbers ``values`` >= 0 in the order in which CPython iterates over the set of their list.

    That is the order of the slots of a hash table in which every number has been put in turn (Objects/setobject.c).
    """
    slots, ordered, done = _SLOTS, values[:0], 0
    while True:
        full = -(-3 * (slots - 1) // 5)  # with so many entries the table grows
        ordered = _by_slot(torch.cat([ordered, values[done:full]]), slots)
        if len(values) < full:
            return ordered
        done, slots = full, 1 << (4 * full).bit_length()


def _by_slot(values: Tensor, slots: int) -> Tensor:
    """The numbers in the order of their slots, after each has taken the first free one of those that it tries."""
    tried, taken = _tries(values, slots), []
    free = torch.ones(slots, dtype=torch.bool, device=values.device)
    for at in tried:
        taken.append(at.gather(0, free[at].int().argmax(0, keepdim=True)))
        free = free.index_fill(0, taken[-1], False)
    return values[torch.cat(taken).argsort()] if taken else values


def _tries(values: Tensor, slots: int) -> Tensor:
    """[P, M] the slots that each number tries in turn; there is a free one among them.

    From slot i it jumps to 5 i + 1 + (the number without its last bits, more of them each time), in between it tries
    the neighbours. Without bits left, jumps reach every slot.
    """
    jumps = range(len(values) + _POSITION_BITS // _SHIFT)
    powers = on_device([[5 ** (to - by) % slots if by <= to else 0 for by in jumps] for to in jumps], values.device)
    steps = torch.arange(len(jumps), device=values.device)
    added = (values[:, None] >> (_SHIFT * steps)) + (steps > 0)
    at = ((added[:, None] * powers).sum(-1) % slots)[..., None]
    near = at + torch.arange(_NEIGHBOURS + 1, device=values.device)
    return torch.where(at + _NEIGHBOURS < slots, near, at).flatten(1)
