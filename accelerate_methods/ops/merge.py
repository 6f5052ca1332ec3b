"""Merging tokens into chosen ones, and averaging them group by group."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from accelerate_methods.ops.select import on_device


@dataclasses.dataclass(frozen=True)
class AnchorSets:
    """Sets of anchors that share a pool of tokens. Host integers.

    Attributes:
        start, end: the pool: rows of the tokens.
        first: the first anchor; ``sets`` sets of ``size`` anchors each follow one another.
    """

    start: int
    end: int
    first: int
    sets: int
    size: int


@dataclasses.dataclass
class Membership:
    """Which anchor of a set each token of its pool goes to. E: one entry for every pair of a set and a token.

    Attributes:
        number: [E] running number of the set; place: [E] its number among the sets of its pool (host: ``most_places``
            of them at most).
        token: [E] row of the token; anchor: [E] row of the anchor.
        similarity: [E] inner product of the token with the anchor divided by its norm.
    """

    number: Tensor
    place: Tensor
    token: Tensor
    anchor: Tensor
    similarity: Tensor
    most_places: int


def nearest_anchors(tokens: Tensor, anchors: Tensor, problems: Sequence[AnchorSets]) -> Membership:
    """The anchor of highest cosine similarity in every set, for every token of the set's pool; the first one on a tie.

    Pools are slices of ``tokens``: nothing is copied, and pools of one form that follow each other are one product.

    Args:
        tokens: [T, D]; anchors: [C, D]; problems: anchors and, where pools of equal form follow each other, tokens in
            ascending order.
    """
    unit = torch.nn.functional.normalize(anchors, dim=-1, eps=1e-12)
    best = []
    for run in _runs(problems):
        pools, problem = len(run), run[0]
        pool = tokens[problem.start : run[-1].end].unflatten(0, (pools, -1))
        rows = unit[problem.first : problem.first + pools * problem.sets * problem.size].unflatten(0, (pools, -1))
        product = torch.bmm(rows, pool.transpose(1, 2))
        best.append(product.view(pools * problem.sets, problem.size, -1).max(dim=1))
    similarity = torch.cat([part.values.flatten() for part in best])
    assignment = torch.cat([part.indices.flatten() for part in best])
    # per set: tokens in its pool, its place among the sets of the pool, its first anchor, pool row less entry number
    table, entries = [], 0
    for problem in problems:
        length = problem.end - problem.start
        for place in range(problem.sets):
            table.append((length, place, problem.first + place * problem.size, problem.start - entries))
            entries += length
    table = on_device(list(zip(*table, strict=True)), tokens.device)
    number = torch.repeat_interleave(table[0], output_size=entries)
    place, first, shift = table[1:].index_select(1, number)
    return Membership(
        number=number,
        place=place,
        token=torch.arange(entries, device=tokens.device) + shift,
        anchor=first + assignment,
        similarity=similarity,
        most_places=max(problem.sets for problem in problems),
    )


def _runs(problems: Sequence[AnchorSets]) -> Iterator[list[AnchorSets]]:
    """Neighbours of one form, pool next to pool and anchors next to anchors."""
    previous: AnchorSets | None = None
    number = 0
    numbers = []
    for problem in problems:
        alike = previous is not None and (
            (problem.start, problem.first) == (previous.end, previous.first + previous.sets * previous.size)
            and (problem.sets, problem.size) == (previous.sets, previous.size)
            and problem.end - problem.start == previous.end - previous.start
        )
        number += not alike
        numbers.append(number)
        previous = problem
    for _, run in groupby(zip(numbers, problems, strict=True), key=lambda pair: pair[0]):
        yield [problem for _, problem in run]


def blend_into_anchors(
    tokens: Tensor, anchors: Tensor, member: Membership, takes_part: Tensor, count: int, beta: float
) -> Tensor:
    """Blend every anchor with the mean of its members (FastVID's density-based token merging).

    With n members of mean ``m`` an anchor ``t`` becomes ``w*t + (1-w)*m``, ``w = max(beta, 1/(n+1))``.

    Args:
        tokens: [T, D]; anchors: [C, D].
        takes_part: [E] False where a token is no member; ``count`` entries are True (known to the host).
        beta: weight of the anchor.

    Returns:
        [C, D].

    Source: FastVID (LunarShen/FastVID@a40a109); the rules are in docs/methods/fastvid.md, step 6.
    """
    owner = torch.where(takes_part, member.anchor, anchors.shape[0])  # the others sort to the end
    mean, sizes = group_means(tokens, owner, anchors.shape[0], index=member.token, used=count)
    weight = (sizes + 1.0).reciprocal_().clamp_(min=beta)[:, None].to(tokens.dtype)
    return weight * anchors + (1 - weight) * mean


def group_means(
    tokens: Tensor, owner: Tensor, count: int, index: Tensor | None = None, used: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mean of the tokens of each owner, in one pass over the tokens, and how many there are.

    Args:
        tokens: [T, D]; owner: [E] 0..count-1; ``count`` and more for entries that belong to none.
        index: [E] the token of each entry; None where entry and token are the same.
        used: entries that belong to an owner; None for all.

    Returns:
        [count, D], zeros where an owner has none; [count] float32.
    """
    owners, order = torch.sort(owner, stable=True)
    bounds = torch.searchsorted(owners, torch.arange(count + 1, device=owner.device))
    order = order[:used]
    members = order if index is None else index[order]
    sizes = bounds.diff().float()
    if tokens.dtype != torch.float16:
        return torch.nn.functional.embedding_bag(members, tokens, bounds[:-1], mode="mean"), sizes
    # Weights that sum up to 1: the sum of hundreds of tokens, as a mean takes it, overflows.
    shares = sizes.clamp(min=1.0).reciprocal().half()[owners[: len(members)]]
    mean = torch.nn.functional.embedding_bag(members, tokens, bounds[:-1], mode="sum", per_sample_weights=shares)
    return mean, sizes


def running_means(anchors: Tensor, tokens: Tensor, owner: Tensor) -> Tensor:
    """What anchors become that meet one token after the other and are each time replaced by the mean of the two.

    The last token of an anchor weighs one half, the one before a quarter, and so on; the anchor as much as its first.

    Args:
        anchors: [C, D]; tokens: [T, D], in the order in which they come; owner: [T] the anchor that each comes to.

    Returns:
        [C, D], computed in float32.
    """
    owners, order = torch.sort(owner, stable=True)
    bounds = torch.searchsorted(owners, torch.arange(len(anchors) + 1, device=owner.device))
    later = bounds[1:][owners] - torch.arange(1, len(owners) + 1, device=owner.device)
    weights = torch.exp2(-(later + 1).float())
    met = torch.nn.functional.embedding_bag(
        order, tokens.float(), bounds[:-1], mode="sum", per_sample_weights=weights
    )
    return (met + anchors.float() * torch.exp2(-bounds.diff().float())[:, None]).to(anchors.dtype)
