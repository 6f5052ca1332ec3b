"""Blocks of a [T, H, W] grid of patches: as many along each axis as fit, each of the kernel's size.

Where the axis is no multiple of the kernel, blocks overlap: the first ones do not, and each of the others begins with
the last patch of the one before, so that all have the same size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from accelerate_methods.ops.select import on_device


def block_counts(sizes: Sequence[int], kernels: Sequence[int]) -> list[int]:
    """Blocks along each axis."""
    return [-(-size // kernel) for size, kernel in zip(sizes, kernels, strict=True)]


def block_starts(size: int, kernel: int) -> list[int]:
    """Where the blocks of one axis begin.

    An overlap of one patch makes ends meet only if ``count * (kernel - 1) < size``; where it does not (the released
    code fails there), the starts are evenly spaced from the first patch to the last block that fits.
    """
    count = -(-size // kernel)
    if count == 1:
        return [0]
    whole = size % count or count  # blocks that overlap with none before them
    starts = [number * kernel - max(0, number - whole + 1) for number in range(count)]
    if starts[-1] + kernel == size:
        return starts
    return [(number * (size - kernel) + (count - 1) // 2) // (count - 1) for number in range(count)]


def block_index(size: int, kernel: int, device: torch.device) -> Tensor:
    """[blocks, k] the patches of each block of one axis; k is smaller than the kernel where the axis is."""
    starts = torch.tensor(block_starts(size, kernel))
    return on_device(starts[:, None] + torch.arange(min(kernel, size)), device)


def in_blocks(grid: Tensor, kernels: Sequence[int]) -> Tensor:
    """[B, T, H, W, C] -> [B, t, h, w, kt * kh * kw, C]: patches of a block in the order of time, row, column."""
    times, rows, columns = (
        block_index(size, kernel, grid.device) for size, kernel in zip(grid.shape[1:4], kernels, strict=True)
    )
    found = grid[
        :,
        times[:, None, None, :, None, None],
        rows[None, :, None, None, :, None],
        columns[None, None, :, None, None, :],
    ]
    return found.flatten(4, 6)
