"""The arithmetic of the report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
_CHUNK = 4_000_000  # numbers drawn at once


def bootstrap_interval(
    differences: Sequence[float], level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of paired ``differences`` [n], documents resampled independently.

    How often each distinct value is drawn is multinomial, so the documents themselves need not be indexed.
    """
    values, counts = np.unique(np.asarray(differences, dtype=float), return_counts=True)
    total, generator = int(counts.sum()), np.random.default_rng(seed)
    chunk = max(1, _CHUNK // len(values))
    means = np.concatenate(
        [
            generator.multinomial(total, counts / total, size=min(chunk, resamples - begin)) @ values / total
            for begin in range(0, resamples, chunk)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def pareto_front(costs: Sequence[float], scores: Sequence[float]) -> list[bool]:
    """Which points no other point beats: at most the cost, at least the score, and better in one of them."""
    points = list(zip(costs, scores, strict=True))
    return [not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points) for cost, score in points]
