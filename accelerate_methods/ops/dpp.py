"""Diverse subsets: greedy MAP inference of a determinantal point process (Chen et al., NeurIPS 2018, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from accelerate_methods.ops.gram import gram
from accelerate_methods.ops.select import pick_rows

AHEAD, OTHERS = 128, 32  # choices that are foreseen at a time on a CPU, at most; items they are compared with besides
#: share of the largest diagonal entry below which what is left is rounding: it depends on those already chosen
_SPENT = 1e-6


def greedy_map(kernel: Tensor, count: int) -> Tensor:
    """Items chosen one after the other, each the one that enlarges the determinant of the chosen submatrix most.

    Where nothing independent of the chosen ones is left (``count`` beyond the rank of the kernel), the items with the
    largest diagonal follow; so every index comes once, and no root of a negative number is taken. Ties go to the lower
    index. Several kernels are worked on at once, and no step waits for the device.

    Args:
        kernel: [B, N, N] symmetric, positive semidefinite, float32 or float64.
        count: items to choose of each; more than N means N.

    Returns:
        [B, min(count, N)] indices in the order of choice.
    """
    own, sets = kernel.diagonal(dim1=1, dim2=2), torch.arange(len(kernel), device=kernel.device)
    return _greedy(own, min(count, kernel.shape[1]), lambda pick, gain, basis: kernel[sets, pick])


def greedy_map_of(states: Tensor, weights: Tensor | None, count: int) -> Tensor:
    """:func:`greedy_map` of the kernels ``diag(w) S diag(w)``, S the cosines of ``states``, without gradient.

    A CPU computes only rows of items that are chosen, or may be: if these are few, a fraction of the kernel.

    Args:
        states: [B, N, D] float32. Items without a direction (zero, or not a number) are like no other and weigh 0.
        weights: [B, N]; None: 1 for all.
        count: items to choose of each; more than N means N.
    """
    states = states.detach()
    sets, size, _ = states.shape
    count = min(count, size)
    norm = torch.linalg.vector_norm(states, dim=2)
    real = (norm > 0) & torch.isfinite(norm)
    weights = real.float() if weights is None else torch.where(real, weights, 0.0)
    factor = torch.where(real, weights / norm, 0.0)
    if states.device.type != "cpu" or (4 if sets > 1 else 8) * count > size:
        kernel = gram(states).mul_(factor[:, :, None]).mul_(factor[:, None, :]).nan_to_num_(posinf=0, neginf=0)
        kernel.diagonal(dim1=1, dim2=2).copy_(weights.square())  # without rounding: equal items tie
        return greedy_map(kernel, count)
    return _greedy(weights.square(), count, _Rows(states, factor, count))


class _Rows:
    """Rows of kernels ``diag(f) X X^T diag(f)`` of ``states`` X [B, N, D].

    Those that are probably asked for next are computed together, as large products are quick.
    """

    def __init__(self, states: Tensor, factor: Tensor, count: int):
        self.states, self.factor, self.count = states, factor, count
        self.sets = torch.arange(len(states))
        self.slot = torch.full(factor.shape, -1)  # where each item's row is
        self.rows = states.new_empty(len(states), 0, states.shape[1])

    def __call__(self, pick: Tensor, gain: Tensor, basis: Tensor) -> Tensor:
        if bool((self.slot[self.sets, pick] < 0).any()):
            ahead = self._foreseen(pick, gain, basis)
            self.slot.scatter_(1, ahead, self.rows.shape[1] + torch.arange(ahead.shape[1]).expand_as(ahead))
            self.rows = torch.cat([self.rows, self._products(ahead, self.states, self.factor)], dim=1)
        return self.rows[self.sets, self.slot[self.sets, pick]]

    def _foreseen(self, pick: Tensor, gain: Tensor, basis: Tensor) -> Tensor:
        """[B, K'] ``pick`` [B], and what would be chosen after it of the items that gain most."""
        left = min(AHEAD, self.count - basis.shape[1])
        pool = gain.scatter(1, pick[:, None], torch.inf).topk(min(left + OTHERS, gain.shape[1])).indices
        among = self._products(pool, pick_rows(self.states, pool), self.factor.gather(1, pool))
        known = basis.gather(2, pool[:, None].expand(-1, basis.shape[1], -1))
        among.baddbmm_(known.mT, known, alpha=-1).diagonal(dim1=1, dim2=2).copy_(gain.gather(1, pool))
        return pool.gather(1, greedy_map(among, left))

    def _products(self, rows: Tensor, others: Tensor, factor: Tensor) -> Tensor:
        """[B, R, T] of ``rows`` [B, R] with ``others`` [B, T, D]."""
        products = (pick_rows(self.states, rows) @ others.mT).mul_(self.factor.gather(1, rows)[..., None])
        return products.mul_(factor[:, None]).nan_to_num_(posinf=0, neginf=0)


def _greedy(own: Tensor, count: int, row_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """The picks [B, K] of kernels of diagonal ``own`` [B, N].

    Args:
        row_of: (picks [B], what each item would gain [B, N], the factor so far [B, K', N]) -> the picks' rows [B, N].
    """
    batch, size = own.shape
    gain, spent = own.clone(), own.amax(1) * _SPENT
    rows = torch.arange(batch, device=own.device)
    basis = own.new_empty(batch, count, size)  # of the incremental Cholesky factor
    picks, gains = [], []
    for step in range(count):
        left, pick = gain.max(1)
        picks.append(pick)
        gains.append(left)
        before = basis[:, :step]
        row = row_of(pick, gain, before)
        if step:
            row = torch.baddbmm(row[:, None], before[rows, :, pick][:, None], before, alpha=-1)[:, 0]
        scale = left.masked_fill(left <= spent, torch.inf).rsqrt()  # 0 where nothing is left
        basis[:, step] = row = row * scale[:, None]
        gain.addcmul_(row, row, value=-1).scatter_(1, pick[:, None], -torch.inf)
    if not picks:
        return torch.zeros(batch, 0, dtype=torch.long, device=own.device)
    return _topped_up(torch.stack(picks, 1), torch.stack(gains, 1) > spent[:, None], own)


def _topped_up(chosen: Tensor, real: Tensor, own: Tensor) -> Tensor:
    """``chosen`` [B, K] with the items of the largest ``own`` [B, N] in the place of those that are not ``real``."""
    # a choice that is none may come before a real one by rounding: from the first one on, nothing counts
    real = real.cumprod(1).bool()
    taken = torch.zeros_like(own).scatter_(1, chosen, real.to(own.dtype))
    order = torch.where(taken > 0, -torch.inf, own).sort(dim=1, descending=True, stable=True).indices
    place = (~real).cumsum(1) - 1
    return torch.where(real, chosen, order.gather(1, place.clamp(min=0)))
