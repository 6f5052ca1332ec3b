"""ToMe: token merging, your ViT but faster (ICLR 2023, arXiv 2210.09461).

In every block of the vision encoder, between attention and MLP, r tokens are merged into similar ones, so that later
blocks have fewer. Tokens are split by the parity of their place into sources and destinations; the r sources whose
keys are most like their best destination join it, as a mean weighted by the patches that each token stands for.
Attention counts a token as often (proportional attention). The CLS token stays.

The official code is for image classification; how the tokens go on to a language model is an adaptation. All rules,
and what other code bases that put ToMe into a LLaVA do otherwise: docs/methods/tome.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from accelerate_methods.ops.select import by_score, pick_rows, row_numbers
from accelerate_methods.registry import register
from accelerate_methods.stages.encode import EncodeMethod, EncodeStep, Merge, TokenMap
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.fields import choice, flag, integer, integers, real, share


@register("tome")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ToMe(EncodeMethod):
    """Hyper-parameters of ToMe.

    Attributes:
        retention_ratio: share of each view's or frame's tokens that stay, of those that the language model gets without
            ToMe. The schedule is solved for it: the same r in all blocks that run, one more in the first of them so
            that the count is exact. A block merges at most half of its tokens, so that an encoder of few blocks may
            leave more.
        tokens_per_view: the same as a count instead; one that cannot be reached is refused.
        r: tokens merged in each block, as in the paper (13 for ViT-B, 7 for ViT-L).
        r_per_block: r of each block, zero in blocks beyond the list.
        inflect: how ``r`` is spread over the blocks: 0 evenly, -1 from 2r down to 0, 1 from 0 up to 2r.
        prop_attn: proportional attention.
        token_order: order in which the language model reads the tokens. "as_is": as they come out of the last block
            (even places before odd ones, again and again); "first_patch": by the first patch that each holds.
        unmerge: whether every patch returns behind the encoder, as a copy of its token. Time is then saved in the
            encoder only; layouts, pooling and compress methods find the grid that they know.
        variant: "official"; "lightcompress": merging as that code base does it, where sizes are not carried from block
            to block and attention is not proportional.
    """

    title: ClassVar[str] = "ToMe"
    paper: ClassVar[str] = "arXiv 2210.09461"
    code: ClassVar[str] = "facebookresearch/ToMe@af95e4b1"
    licence: ClassVar[str] = "CC-BY-NC-4.0"
    misleading: ClassVar[Mapping[str, str]] = {
        "tokens_per_image": "it merges in every view of an image by itself; give tokens_per_view",
        "tokens_per_frame": "frames are views; give tokens_per_view",
    }

    retention_ratio: float | None = share(None, budget=True)
    tokens_per_view: int | None = integer(None, low=1, budget=True)
    r: int | None = integer(None, low=0, budget=True)
    r_per_block: tuple[int, ...] | None = integers(None, low=0, budget=True)
    inflect: float = real(0.0, low=-1, high=1)
    prop_attn: bool = flag(True)
    token_order: str = choice("as_is", "as_is", "first_patch")
    unmerge: bool = flag(False)
    variant: str = choice("official", "official", "lightcompress")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inflect and self.r is None:
            raise MethodError(f"{self.name}: inflect spreads r over the blocks; give r with it.")

    @property
    def proportional(self) -> bool:
        return self.prop_attn and self.variant == "official"

    @property
    def keeps_grid(self) -> bool:
        return self.unmerge

    def encode_blocks(self, num_blocks: int) -> tuple[int, ...]:
        return tuple(range(num_blocks))

    def encode(self, step: EncodeStep) -> Merge | None:
        r = self.schedule(step)[step.block]
        if r == 0:
            return None
        found = match(step.keys(), r, step.special)
        if found is None:
            return None
        hidden, sizes = merge_mean(step.hidden, found, step.sizes)
        return Merge(hidden, found.owner, found.source, sizes if self.variant == "official" else None)

    def schedule(self, step: EncodeStep) -> tuple[int, ...]:
        """r of each block of the encoder."""
        if self.r_per_block is not None:
            return schedule_of_list(self.r_per_block, max(step.depth, step.num_blocks))
        if self.r is not None:
            return schedule_of(self.r, self.inflect, step.depth)
        if self.retention_ratio == 1:
            return (0,) * step.num_blocks
        target = self.tokens_per_view
        if target is None:
            target = max(1, int(step.num_tokens * self.retention_ratio))
        plan = schedule_for(step.num_patches, target, step.num_blocks, step.special)
        least = _left(step.num_patches, step.special, plan)
        if self.tokens_per_view is not None and least > target:
            raise MethodError(
                f"{self.name}: {target} of {step.num_patches} tokens cannot be reached: each of the {step.num_blocks} "
                f"blocks that run merges at most half of what is left, which leaves {least}."
            )
        return plan

    def arrange(self, tokens: TokenMap) -> Tensor | None:
        return tokens.first_patch().argsort(dim=1) if self.token_order == "first_patch" else None


# -- how many ----------------------------------------------------------------------------------------------------------


def schedule_of(r: int, inflect: float, num_blocks: int) -> tuple[int, ...]:
    """r of each block: a line through ``r`` whose slope is ``inflect``, truncated."""
    first = int(r * (1 - inflect))
    last = 2 * r - first
    steps = max(1, num_blocks - 1)  # the official code divides by zero for one block
    return tuple(int(first + block * (last - first) / steps) for block in range(num_blocks))


def schedule_of_list(r_per_block: Sequence[int], num_blocks: int) -> tuple[int, ...]:
    """The list, with zeros for the blocks beyond it."""
    return (*r_per_block, *[0] * (num_blocks - len(r_per_block)))


def schedule_for(patches: int, target: int, num_blocks: int, special: int) -> tuple[int, ...]:
    """r of each block so that ``target`` of ``patches`` tokens are left.

    As even as can be: no block merges two more than another, unless it has too few tokens left (half of them is the
    most that a block can merge); as few as can be where so few are not possible.
    """
    if target >= patches:
        return (0,) * num_blocks
    r = next((r for r in range(1, patches) if _left(patches, special, [r] * num_blocks) <= target), patches)
    plans = ([r] * more + [r - 1] * (num_blocks - more) for more in range(1, num_blocks + 1))
    return tuple(next((plan for plan in plans if _left(patches, special, plan) <= target), [r] * num_blocks))


def _left(patches: int, special: int, plan: Sequence[int]) -> int:
    """Patches that are left after ``plan``."""
    for r in plan:
        patches -= min(r, most(patches + special, special))
    return patches


def most(length: int, special: int) -> int:
    """How many of ``length`` tokens one block can merge."""
    return max(0, (length - special) // 2)


# -- which -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Matching:
    """Which of T tokens join which.

    Attributes:
        source: [V, T'] the token that each output continues.
        sources: [V, r] tokens that join another one; into: [V, r] the output that each joins.
        owner: [V, T] output that holds each token, -1 if none does.
    """

    source: Tensor
    sources: Tensor
    into: Tensor
    owner: Tensor


@torch.no_grad()
def match(metric: Tensor, r: int, special: int = 0) -> Matching | None:
    """Bipartite soft matching of tokens at even places (sources) with those at odd ones (destinations).

    The output is what is left of the even tokens, then the odd ones. Even ones are in order where there are special
    tokens and sorted by similarity, largest first, where there are none. Of equal similarities the first token, and
    the first destination, is taken; with two special tokens, both come first.

    Args:
        metric: [V, T, d]; special: 0, 1 (CLS) or 2 (CLS, distillation) tokens that never merge.

    Returns:
        None if there is nothing to merge.
    """
    length = metric.shape[1]
    r = min(r, most(length, special))
    if r <= 0:
        return None
    unit = normalized(metric)
    even, odd = unit[:, ::2], unit[:, 1::2]
    first_odd = int(special > 1)  # the distillation token takes nobody in
    scores, best = (even @ odd[:, first_odd:].transpose(1, 2)).max(-1)
    best = best + first_odd
    if special:
        scores[:, 0] = -torch.inf  # below not-a-number, too
    order = by_score(scores)
    kept, joining = order[:, r:], order[:, :r].sort(dim=-1).values
    kept = kept.sort(dim=-1).values if special else kept
    kept, others = kept * 2, torch.arange(1, length, 2, device=metric.device).expand(len(metric), -1)
    front = special - 1 if special else 0  # the CLS token is first as it is, the distillation token second
    source = torch.cat([kept[:, :front], others[:, :front], kept[:, front:], others[:, front:]], dim=1)
    return _matching(source, joining * 2, best.gather(1, joining) * 2 + 1, length)


def match_every(metric: Tensor, k: int) -> Matching | None:
    """Every k-th token takes in the k-1 of its like: T / k tokens are left (``kth_bipartite_soft_matching``).

    What does not fill a group of k at the end is dropped. Nothing is protected.
    """
    views, length, _ = metric.shape
    if k <= 1:
        return None
    whole = length // k * k
    places = torch.arange(whole, device=metric.device).view(-1, k)
    unit = normalized(metric)
    sources, destinations = places[:, :-1].flatten(), places[:, -1]
    best = (unit[:, sources] @ unit[:, destinations].transpose(1, 2)).max(-1).indices
    source = destinations.expand(views, -1)
    return _matching(source, sources.expand(views, -1), destinations[best], length)


def match_random(metric: Tensor, r: int, order: Tensor) -> Matching | None:
    """The first ``r`` of a random ``order`` [V, T] join the others (``random_bipartite_soft_matching``)."""
    if r <= 0:
        return None
    unit = normalized(metric)
    sources, source = order[:, :r], order[:, r:]
    best = (pick_rows(unit, sources) @ pick_rows(unit, source).transpose(1, 2)).max(-1).indices
    return _matching(source, sources, source.gather(1, best), metric.shape[1])


def normalized(metric: Tensor) -> Tensor:
    """Rows of length one; those of length zero stay zero."""
    return torch.nn.functional.normalize(metric.float(), dim=-1, eps=1e-12)


def _matching(source: Tensor, sources: Tensor, destinations: Tensor, length: int) -> Matching:
    """
    Args:
        destinations: [V, r] the token that each of ``sources`` joins.
    """
    owner = source.new_full((len(source), length), -1)
    owner.scatter_(1, source, torch.arange(source.shape[1], device=source.device).expand_as(source))
    into = owner.gather(1, destinations)
    return Matching(source, sources, into, owner.scatter(1, sources, into))


# -- merged ------------------------------------------------------------------------------------------------------------


def merge_mean(x: Tensor, found: Matching, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Tokens [V, T, C] as means weighted by ``sizes`` [V, T] (all one if None), and the new sizes.

    Only tokens that others join are computed anew, at least in float32; the rest are copied.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if sizes is None:
        sizes = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
    before, joining = sizes.gather(1, found.source), sizes.gather(1, found.sources)
    after = before.scatter_add(1, found.into, joining)
    out = pick_rows(x, found.source)
    brought = pick_rows(x, found.sources).to(wide) * joining[..., None]
    together = (found.into[:, :, None] == found.into[:, None]).to(wide) @ brought  # of all that join the same one
    own = pick_rows(out, found.into).to(wide) * before.gather(1, found.into)[..., None]
    means = (own + together) / after.gather(1, found.into)[..., None]
    rows = row_numbers(found.into, out.shape[1])
    out.flatten(0, 1)[rows] = means.to(x.dtype).flatten(0, 1)
    return out, after
