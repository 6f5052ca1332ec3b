"""Diverse subsets: greedy MAP inference of a determinantal point process (Chen et al., NeurIPS 2018, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

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
    batch, size, _ = kernel.shape
    count = min(count, size)
    own = kernel.diagonal(dim1=1, dim2=2)
    gain, spent = own.clone(), own.amax(1) * _SPENT
    rows = torch.arange(batch, device=kernel.device)
    basis = kernel.new_empty(batch, count, size)  # of the incremental Cholesky factor
    picks, gains = [], []
    for step in range(count):
        left, pick = gain.max(1)
        picks.append(pick)
        gains.append(left)
        row = kernel[rows, pick]
        if step:
            before = basis[:, :step]
            row = torch.baddbmm(row[:, None], before[rows, :, pick][:, None], before, alpha=-1)[:, 0]
        scale = left.masked_fill(left <= spent, torch.inf).rsqrt()  # 0 where nothing is left
        basis[:, step] = row = row * scale[:, None]
        gain.addcmul_(row, row, value=-1).scatter_(1, pick[:, None], -torch.inf)
    if not picks:
        return torch.zeros(batch, 0, dtype=torch.long, device=kernel.device)
    return _topped_up(torch.stack(picks, 1), torch.stack(gains, 1) > spent[:, None], own)


def _topped_up(chosen: Tensor, real: Tensor, own: Tensor) -> Tensor:
    """``chosen`` [B, K] with the items of the largest ``own`` [B, N] in the place of those that are not ``real``."""
    # a choice that is none may come before a real one by rounding: from the first one on, nothing counts
    real = real.cumprod(1).bool()
    taken = torch.zeros_like(own).scatter_(1, chosen, real.to(own.dtype))
    order = torch.where(taken > 0, -torch.inf, own).sort(dim=1, descending=True, stable=True).indices
    place = (~real).cumsum(1) - 1
    return torch.where(real, chosen, order.gather(1, place.clamp(min=0)))
