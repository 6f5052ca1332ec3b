"""Deterministic selection without device reads: masks from ranks, indices from masks of known count.

Scores may hold anything: one that is not a number (features that overflowed half precision) counts as lower than every
number, and an index is always one of the row's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def top_mask(scores: Tensor, counts: Tensor | Sequence[int] | int) -> Tensor:
    """Boolean mask of the ``counts`` largest scores per row; equal scores go to the lower index.

    Args:
        scores: [R, N]; -inf, below not-a-number, is what must not be taken.
        counts: one count for all rows, or one per row.

    Returns:
        [R, N] bool.
    """
    if isinstance(counts, Sequence) and len(set(counts)) == 1:
        counts = counts[0]
    if isinstance(counts, int):
        return _top_mask(scores, counts)
    if not isinstance(counts, Tensor):
        counts = on_device(counts, scores.device)
    order = by_score(scores)
    taken = torch.arange(scores.shape[-1], device=scores.device) < counts.reshape(-1, 1)
    return torch.empty_like(scores, dtype=torch.bool).scatter_(-1, order, taken)  # every place is written to


def numbers_first(scores: Tensor) -> Tensor:
    """The scores, float32 (or float64), with the lowest number there is in place of those that are not a number.

    Comparisons with them are never true, and sorting puts them above everything.
    """
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return scores.nan_to_num(nan=torch.finfo(scores.dtype).min, posinf=torch.inf, neginf=-torch.inf)


def by_score(scores: Tensor) -> Tensor:
    """Indices [R, N] of ``scores`` [R, N], the largest first; of equal ones the lower index, not-a-number last."""
    return torch.sort(numbers_first(scores), dim=-1, descending=True, stable=True).indices


def _top_mask(scores: Tensor, count: int) -> Tensor:
    """One count for all rows: a threshold does without sorting."""
    if count <= 0 or count >= scores.shape[-1]:
        return torch.full(scores.shape, count > 0, dtype=torch.bool, device=scores.device)
    scores = numbers_first(scores)  # in float32: there is no kthvalue for half precision on the CPU
    least = scores.kthvalue(scores.shape[-1] - count + 1, dim=-1, keepdim=True).values
    above, equal = scores > least, scores == least
    return above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def top_indices(scores: Tensor, count: int) -> Tensor:
    """Ascending indices [R, count] of the ``count`` largest of ``scores`` [R, N], ties as in :func:`top_mask`."""
    return mask_to_indices(top_mask(scores, count), count)


def mask_to_indices(mask: Tensor, count: int) -> Tensor:
    """Ascending indices [R, count] of the True entries of ``mask`` [R, N]; a row with fewer is filled up with zeros.

    Unlike ``nonzero`` the output size is known beforehand, so a GPU need not be waited for.

    Args:
        count: True entries of the row that has most of them.
    """
    return counted_to_indices(mask, mask.cumsum(-1), count)


def counted_to_indices(mask: Tensor, number: Tensor, count: int) -> Tensor:
    """:func:`mask_to_indices` where ``number`` [R, N] = ``mask.cumsum(-1)`` is there already."""
    slot = number * mask  # a spare slot in front takes the False entries
    out = torch.zeros(mask.shape[0], count + 1, dtype=torch.long, device=mask.device)
    out.scatter_(1, slot, torch.arange(mask.shape[1], device=mask.device).expand_as(slot))
    return out[:, 1:]


def pick_rows(features: Tensor, index: Tensor) -> Tensor:
    """[R, K, D] rows of ``features`` [R, N, D] by ``index`` [R, K]; several times quicker than gathering elements."""
    rows, pitch = flat_rows(features)
    return rows[row_numbers(index, pitch)].view(*index.shape, features.shape[-1])


def flat_rows(features: Tensor) -> tuple[Tensor, int]:
    """The rows of all sets of ``features`` [R, N, D] as one matrix [M, D], and how far apart the sets' first rows are.

    Nothing is copied, also where every set is part of a longer one: the patches of a view without its CLS token.
    """
    sets, size, width = features.shape
    pitch = features.stride(0) // width
    if sets < 2 or features.stride()[1:] != (width, 1) or features.stride(0) % width or pitch < size:
        return features.reshape(-1, width), size
    return features.as_strided(((sets - 1) * pitch + size, width), (width, 1)), pitch


def row_numbers(index: Tensor, pitch: int) -> Tensor:
    """[R * K] what ``index`` [R, K] into R sets of rows is in the rows of all, ``pitch`` from set to set."""
    first = torch.arange(0, index.shape[0] * pitch, pitch, device=index.device)
    return (index + first[:, None]).flatten()


def right_aligned_indices(mask: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Ascending indices of the True entries of ``mask`` [R, N], rows of different count padded on the left.

    Args:
        counts: True entries of each row, K the largest of them.

    Returns:
        indices [R, K], and [R, K] False in the slots that a row does not fill (they hold indices of False entries);
        None where every row fills all.
    """
    width = max(counts)
    if min(counts) == width:
        return mask_to_indices(mask, width), None
    # a stable sort of the mask moves the True entries, in order, to the right end
    order = torch.sort(mask.to(torch.uint8), dim=-1, stable=True).indices[:, mask.shape[1] - width :]
    spare = on_device([width - count for count in counts], mask.device)
    return order, torch.arange(width, device=mask.device) >= spare[:, None]


def on_device(values: Sequence[Any] | Tensor, device: torch.device) -> Tensor:
    """Numbers known to the host (lists of them, or a tensor on the CPU) as a tensor there.

    Unlike ``torch.tensor(values, device=...)`` a GPU is not waited for: from pinned memory the copy is one of the
    operations in its queue.
    """
    values = torch.as_tensor(values)
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Small tensors of integers or booleans, read from their device together: it is waited for once."""
    if not tensors:
        return []
    parts = torch.cat([tensor.flatten().long() for tensor in tensors]).cpu().split([t.numel() for t in tensors])
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def random_indices(total: int, count: int, seed: int) -> torch.Tensor:
    """``count`` of ``total`` indices, ascending; a function of its arguments alone."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def random_mask(mask: Tensor, totals: Sequence[int], counts: Sequence[int], seed: int) -> Tensor:
    """Random ``counts`` of the True entries of each row of ``mask`` [R, N]: [R, N] bool.

    A function of the seed and of the numbers alone, wherever the entries stand and whatever other rows there are.

    Args:
        totals: True entries of each row.
    """
    drawn = torch.zeros(len(totals), max(1, *totals), dtype=torch.bool)
    for row, total, count in zip(drawn, totals, counts, strict=True):
        row[random_indices(total, count, seed)] = True
    number = mask.cumsum(1) - 1  # of each True entry within its row
    return mask & on_device(drawn, mask.device).gather(1, number.clamp(min=0))
