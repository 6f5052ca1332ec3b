"""Deterministic selection without device reads: masks from ranks, indices from masks of known count."""

from __future__ import annotations

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


def mask_to_indices(mask: Tensor, count: int) -> Tensor:
    """Ascending indices [R, count] of the True entries of ``mask`` [R, N], each row holding exactly ``count``.

    Unlike ``nonzero`` the output size is known beforehand, so a GPU need not be waited for.
    """
    return torch.sort(mask.to(torch.uint8), dim=-1, descending=True, stable=True).indices[:, :count]
