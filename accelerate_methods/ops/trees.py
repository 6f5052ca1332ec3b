"""Trees of tokens along time: each token linked to its most similar one in the frame before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from accelerate_methods.ops.diversity import MAP_ENTRIES
from accelerate_methods.ops.merge import group_means
from accelerate_methods.ops.select import on_device


def links_to_previous(states: Tensor, available: Tensor, starts: Sequence[int] = (0,)) -> tuple[Tensor, Tensor]:
    """The most similar available token of the frame before, for every token.

    A CPU computes nothing for frames that are not linked. A GPU would be held up by more, smaller operations.

    Args:
        states: [F, N, D] float32 without what is not a number; available: [F, N] which tokens can be linked, and linked
            to.
        starts: ascending, frames that are not linked to the one before; 0 is one of them.

    Returns:
        [F, N] cosine similarity, -1 where there is no link; [F, N] index within the frame before, of equal ones the
        lower.
    """
    frames, size = available.shape
    similarity = torch.full(available.shape, -1.0, device=states.device)
    parent = torch.zeros(available.shape, dtype=torch.long, device=states.device)
    inverse = torch.linalg.vector_norm(states, dim=-1).clamp(min=1e-12).reciprocal()
    each = max(1, MAP_ENTRIES // (size * size))
    linked = available.index_fill(0, on_device(list(starts), states.device), False)
    cuts = [*starts, frames] if states.device.type == "cpu" else [0, frames]
    for own in _slices(cuts, each):
        before = slice(own.start - 1, own.stop - 1)
        with torch.autocast(states.device.type, enabled=False):
            cosine = torch.bmm(states[own], states[before].mT)
        cosine.mul_(inverse[own, :, None]).mul_(inverse[before, None, :])
        cosine.masked_fill_(~available[before, None, :], -1.0)
        best = cosine.max(2)
        similarity[own] = best.values.masked_fill(~linked[own], -1.0)
        parent[own] = best.indices
    return similarity, parent


def _slices(cuts: Sequence[int], each: int) -> Iterator[slice]:
    """What lies between one cut and the next but for the first after each cut, ``each`` at a time."""
    for cut, end in pairwise(cuts):
        for start in range(cut + 1, end, each):
            yield slice(start, min(start + each, end))


def roots_of(parent: Tensor, depth: int) -> Tensor:
    """[T] the root of each token's tree.

    Args:
        parent: [T] index of each token's parent, its own at a root; depth: tokens that a path holds at most.
    """
    for _ in range(max(0, depth - 1).bit_length()):  # every round doubles how far up a token sees
        parent = parent[parent]
    return parent


def tree_values(states: Tensor, parent: Tensor, owner: Tensor, roots: Tensor, used: int, mean: bool = False) -> Tensor:
    """What becomes of the root of each tree: the sum of all of its tokens over one more than the root has children.

    Of a chain of n tokens that is n/2 times their mean.

    Args:
        states: [T, D]; parent: [T] as in :func:`roots_of`.
        owner: [T] number of the root that holds each token; as many as there are roots for tokens in no tree.
        roots: [K] index of each root; used: tokens that are in trees.
        mean: the mean of the tree instead.

    Returns:
        [K, D].

    Source: FlashVID (Fanziyang-v/FlashVID@1d37422c); the rules are in docs/methods/flashvid.md, step 3.
    """
    values, sizes = group_means(states, owner, roots.shape[0], used=used)
    if mean:
        return values
    above = torch.zeros_like(parent).scatter_add_(0, parent, torch.ones_like(parent))  # a root is its own parent
    return values.mul_((sizes / above[roots])[:, None])
