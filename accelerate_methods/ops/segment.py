"""Cutting a frame sequence into contiguous segments."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor


def consecutive_similarity(features: Tensor) -> Tensor:
    """[F-1] cosine similarity of each frame's feature [F, G] with the next frame's, in float32."""
    unit = torch.nn.functional.normalize(features.float(), dim=-1, eps=1e-12)
    return (unit[:-1] * unit[1:]).sum(-1)


def dynamic_segments(features: Tensor, segments: int, threshold: float) -> list[int]:
    """Dynamic segmentation of [F, G] global frame features; see :func:`segment_sizes` (one device read)."""
    return segment_sizes(consecutive_similarity(features).cpu(), segments, threshold)


def segment_sizes(similarity: Tensor, segments: int, threshold: float) -> list[int]:
    """Cut at the ``segments - 1`` weakest transitions and wherever similarity < ``threshold``.

    Args:
        similarity: [F-1] of consecutive frames, read from the device beforehand; not-a-number cuts last.
        segments: minimum number of segments c; short videos get as many as they have frames.
        threshold: similarity tau below which a cut is made in any case (strict).

    Returns:
        Segment sizes in time order, summing to F.

    Source: FastVID (LunarShen/FastVID@a40a109), which fails with fewer frames than segments; the rules are in
    docs/methods/fastvid.md, step 2.
    """
    frames = similarity.shape[0] + 1
    weakest = similarity.topk(min(segments - 1, frames - 1), largest=False).indices
    cut = similarity < threshold
    cut[weakest] = True
    ends = [i + 1 for i, flag in enumerate(cut.tolist()) if flag] + [frames]
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def run_lengths(labels: Sequence[int]) -> list[int]:
    """Lengths of the maximal runs of equal labels."""
    return [len(list(run)) for _, run in groupby(labels)]


def refine_runs(labels: Sequence[int]) -> list[int]:
    """Turn frame clusters into scenes: of every label only its longest runs (of two frames at least) stand.

    Runs of one label that tie for the longest all stand. Each stretch of frames between standing runs joins, from left
    to right and as a whole, the longer of its two neighbours as they have become; of equal ones the left. If nothing
    stands, all is label 0.

    Source: PruneVid (Visual-AI/PruneVid@b12600c6); the rules are in docs/methods/prunevid.md, step 2.
    """
    runs = [(label, len(list(run))) for label, run in groupby(labels)]
    longest: dict[int, int] = {}
    for label, length in runs:
        longest[label] = max(length, longest.get(label, 2))
    pieces = [(label if length == longest[label] else None, length) for label, length in runs]
    stretches = [(label, sum(n for _, n in same)) for label, same in groupby(pieces, key=lambda piece: piece[0])]
    out: list[tuple[int, int]] = []
    for number, (label, length) in enumerate(stretches):
        if label is None:
            following = stretches[number + 1] if number + 1 < len(stretches) else (0, 0)
            label = out[-1][0] if out and out[-1][1] >= following[1] else following[0]
        if out and out[-1][0] == label:
            length += out.pop()[1]
        out.append((label, length))
    return [label for label, length in out for _ in range(length)]
