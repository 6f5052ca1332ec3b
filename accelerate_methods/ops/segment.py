"""Cutting a frame sequence into contiguous segments."""

from __future__ import annotations

import torch
from torch import Tensor


def consecutive_similarity(features: Tensor) -> Tensor:
    """[F-1] cosine similarity of each frame's feature [F, G] with the next frame's, in float32."""
    unit = torch.nn.functional.normalize(features.float(), dim=-1, eps=1e-12)
    return (unit[:-1] * unit[1:]).sum(-1)


def dynamic_segments(features: Tensor, segments: int, threshold: float) -> list[int]:
    """Dynamic segmentation: cut at the ``segments - 1`` weakest transitions and wherever similarity < ``threshold``.

    Args:
        features: [F, G] global frame features.
        segments: minimum number of segments c; short videos get as many as they have frames.
        threshold: similarity tau below which a cut is made in any case (strict).

    Returns:
        Segment sizes in time order, summing to F (one device read).

    Source: specs/fastvid.md section 2, with its robust rule for F < c and for no cut at all.
    """
    frames = features.shape[0]
    if frames <= 1:
        return [frames] if frames else []
    similarity = consecutive_similarity(features)
    weakest = similarity.topk(min(segments - 1, frames - 1), largest=False).indices
    cut = similarity < threshold
    cut[weakest] = True
    ends = [i + 1 for i, flag in enumerate(cut.tolist()) if flag] + [frames]
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
