"""Deterministic selection without device reads: masks from ranks, indices from masks of known count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def top_mask(scores: Tensor, counts: Tensor | int) -> Tensor:
    """Boolean mask of the ``counts`` largest scores per row; equal scores go to the lower index.

    Args:
        scores: [R, N].
        counts: one count for all rows, or [R].

    Returns:
        [R, N] bool.
    """
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    )
    if isinstance(counts, Tensor):
        counts = counts[:, None]
    return rank < counts


def top_indices(scores: Tensor, count: int) -> Tensor:
    """Ascending indices [R, count] of the ``count`` largest of ``scores`` [R, N]; equal scores go to the lower index.

    The same as ``mask_to_indices(top_mask(scores, count), count)`` without sorting whole rows.
    """
    if count == 0:
        return scores.new_empty(scores.shape[0], 0, dtype=torch.long)
    least = scores.topk(count).values[:, -1:]
    above, equal = scores > least, scores == least
    kept = above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
    return (kept * torch.arange(scores.shape[-1], 0, -1, device=scores.device)).topk(count).indices


def mask_to_indices(mask: Tensor, count: int) -> Tensor:
    """Ascending indices [R, count] of the True entries of ``mask`` [R, N], each row holding exactly ``count``.

    Unlike ``nonzero`` the output size is known beforehand, so a GPU need not be waited for.
    """
    return torch.sort(mask.to(torch.uint8), dim=-1, descending=True, stable=True).indices[:, :count]


def right_aligned_indices(mask: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Ascending indices of the True entries of ``mask`` [R, N], rows of different count padded on the left.

    Args:
        counts: True entries of each row, K the largest of them.

    Returns:
        indices [R, K], and [R, K] False in the slots that a row does not fill (they hold indices of False entries);
        None where every row fills all.
    """
    width = max(counts)
    # a stable sort of the mask moves the True entries, in order, to the right end
    order = torch.sort(mask.to(torch.uint8), dim=-1, stable=True).indices[:, mask.shape[1] - width :]
    if min(counts) == width:
        return order, None
    spare = on_device([width - count for count in counts], mask.device)
    return order, torch.arange(width, device=mask.device) >= spare[:, None]


def on_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Numbers known to the host as a tensor; unlike ``torch.tensor(values, device=...)`` a GPU is not waited for."""
    return torch.tensor(values).to(device, non_blocking=True)
