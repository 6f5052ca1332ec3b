"""Folding what a selection leaves over into a few evenly spaced tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from accelerate_methods.ops.merge import group_means
from accelerate_methods.ops.select import flat_rows, mask_to_indices, pick_rows, row_numbers


def contextual_merge(
    features: Tensor, keys: Tensor, rest: Tensor, rest_count: int, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``count`` tokens per set that stand for all tokens of ``rest``.

    The targets are spread evenly over the ranks of ``rest``: 0, s, 2s, ... with ``s = rest_count // count``. Each other
    token of ``rest`` goes to the target of highest cosine similarity between keys (the first one on a tie). A target
    then becomes itself plus the mean of its members: a sum, not an average; without members it stays what it was.

    Args:
        features: [B, N, D]; keys: [B, N, d], compared in float32.
        rest: [B, N] bool, ``rest_count`` True entries in each row, of which there are at least ``count``.

    Returns:
        tokens [B, count, D]; targets [B, count] their ascending indices; slot [B, N] which of the tokens holds each
        token of ``rest`` (0..count-1), -1 outside of it.

    Source: VisionZip (dvlab-research/VisionZip@3151f6df); the rules are in docs/methods/visionzip.md, step 3.
    """
    if count == 0:
        empty = rest.new_empty(rest.shape[0], 0, dtype=torch.long)
        return features[:, :0], empty, torch.full(rest.shape, -1, dtype=torch.long, device=rest.device)
    sets, size = rest.shape
    step = rest_count // count
    targets = mask_to_indices(rest, rest_count)[:, : step * count : step]
    unit = torch.nn.functional.normalize(keys.float(), dim=-1, eps=1e-12)
    anchors = pick_rows(unit, targets)
    slot = (anchors @ unit.transpose(1, 2)).max(1).indices  # of equal ones the first, as argmax, but quicker
    slot.scatter_(1, targets, torch.arange(count, device=slot.device).expand_as(targets))
    members = rest.scatter(1, targets, False)
    first = torch.arange(0, sets * count, count, device=slot.device)[:, None]
    owner = torch.where(members, slot + first, sets * count)  # the others sort to the end
    rows, pitch = flat_rows(features)
    index = None if pitch == size else row_numbers(torch.arange(size, device=slot.device).expand(sets, -1), pitch)
    mean, _ = group_means(rows, owner.flatten(), sets * count, index, used=sets * (rest_count - count))
    tokens = pick_rows(features, targets) + mean.view(sets, count, -1)
    return tokens, targets, slot.masked_fill(~rest, -1)
