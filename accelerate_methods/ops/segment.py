"""Cutting a frame sequence into contiguous segments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

PAIRED = 3  # neighbouring pairs of frames that are compared by one product


def consecutive_similarity(features: Tensor) -> Tensor:
    """[F-1] cosine similarity of each frame's feature [F, G] with the next frame's, in float32."""
    unit = torch.nn.functional.normalize(features.float(), dim=-1, eps=1e-12)
    return (unit[:-1] * unit[1:]).sum(-1)


def window_products(features: Tensor, size: int, step: int) -> Tensor:
    """Inner products of all frames of a window with each other, at each place: [W, N, size, size] float64.

    Args:
        features: [F, N, D]; nothing of it gets a gradient.
        size, step: a window has ``size`` frames and begins ``step`` frames after the one before. Frames that the last
            one lacks count as zeros.

    One product per window needs no copy of the features, as any product of all windows would. Blocks of the width,
    summed in float64, make it more exact than an elementwise product in float32, and several times quicker.
    """
    frames, per_frame, width = features.shape
    blocks, products = math.gcd(width, 8), []
    for start in range(0, max(1, frames - size + step), step):
        window = features.detach()[start : start + size]
        part = window.float().unflatten(2, (blocks, -1)).permute(1, 2, 0, 3).flatten(0, 1)  # [N * blocks, size, d]
        product = (part @ part.mT).unflatten(0, (per_frame, blocks)).sum(1, dtype=torch.float64)
        missing = size - window.shape[0]
        products.append(torch.nn.functional.pad(product, (0, missing, 0, missing)) if missing else product)
    return torch.stack(products)


def cosines(inner: Tensor, squares: Tensor) -> Tensor:
    """Cosine similarities of inner products and the products of both squared lengths; 0 where one has no length.

    The root of the product, not the product of the roots: exactly 1 for equal tokens, so that they tie.
    """
    return inner / squares.sqrt().clamp(min=1e-8)


def place_similarity(features: Tensor) -> Tensor:
    """[F-1, N] float64 cosine similarity of each token of [F, N, D] with the same place of the next frame."""
    products = window_products(features, PAIRED + 1, PAIRED)
    lengths = products.diagonal(dim1=2, dim2=3)
    similarity = cosines(products.diagonal(offset=1, dim1=2, dim2=3), lengths[..., :-1] * lengths[..., 1:])
    return similarity.transpose(1, 2).flatten(0, 1)[: features.shape[0] - 1]


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
