"""The arithmetic of the report."""

from __future__ import annotations

import dataclasses
import math
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


@dataclasses.dataclass(frozen=True)
class McNemar:
    """McNemar's test of two runs whose documents are right or wrong.

    Attributes:
        lost: documents that are right in the first run and wrong in the second; won: the other way round.
        p_value: two-sided and exact: how likely a split of the ``lost + won`` documents at least as uneven is if either
            way is as likely; 1 without any.
    """

    lost: int
    won: int
    p_value: float


def mcnemar(pairs: Sequence[tuple[float | None, float | None]]) -> McNemar | str:
    """The test of (score in the first run, score in the second) per document, or why there is none."""
    values = {value for pair in pairs for value in pair}
    if not pairs:
        return "no documents in common"
    if not values <= {0.0, 1.0}:
        return "scores per document are not just right and wrong"
    lost, won = sum(a > b for a, b in pairs), sum(b > a for a, b in pairs)
    return McNemar(lost, won, _two_sided(min(lost, won), lost + won))


def _two_sided(few: int, total: int) -> float:
    """Probability that ``total`` tosses of a fair coin give at most ``few`` heads, or at most as many tails."""
    if 2 * few >= total:
        return 1.0
    # in logarithms: binomials of thousands of documents are beyond what a float holds
    logs = [math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(few + 1)]
    most = max(logs)
    return min(1.0, 2 * math.exp(most + math.log(sum(math.exp(log - most) for log in logs)) - total * math.log(2)))


def p_text(value: float | None) -> str:
    """A p value in five characters: ``0.043``, ``1.000``, ``2e-05``; "" for None."""
    if value is None:
        return ""
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def pareto_front(costs: Sequence[float], scores: Sequence[float]) -> list[bool]:
    """Which points no other point beats: at most the cost, at least the score, and better in one of them."""
    points = list(zip(costs, scores, strict=True))
    return [not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points) for cost, score in points]
