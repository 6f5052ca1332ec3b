"""Diverse subsets: greedy MAP inference of a determinantal point process (Chen et al., NeurIPS 2018, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

#: share of its own variance below which what is left of an item is rounding: it depends on those already chosen
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
    gain, spent = own.clone(), own * _SPENT
    # once everything is spent: below every gain, in the order of the diagonal
    order = own.sort(dim=1, descending=True, stable=True).indices
    ranks = torch.arange(-1, -1 - size, -1, device=kernel.device, dtype=kernel.dtype)
    spare = torch.empty_like(gain).scatter_(1, order, ranks.expand(batch, -1))
    rows = torch.arange(batch, device=kernel.device)
    basis = kernel.new_zeros(batch, count, size)
    chosen = torch.empty(batch, count, dtype=torch.long, device=kernel.device)
    for step in range(count):
        pick = torch.where(gain > spent, gain, spare).argmax(1)
        chosen[:, step] = pick
        left = gain[rows, pick]
        row = kernel[rows, pick]
        if step:
            before = basis[:, :step]
            row = torch.baddbmm(row[:, None], before[rows, :, pick][:, None], before, alpha=-1)[:, 0]
        fresh = left > spent[rows, pick]
        row = row * torch.where(fresh, left, 1).rsqrt().masked_fill(~fresh, 0)[:, None]
        basis[:, step] = row
        gain.addcmul_(row, row, value=-1)
        gain[rows, pick] = spare[rows, pick] = -torch.inf
    return chosen
