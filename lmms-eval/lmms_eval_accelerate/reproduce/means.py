"""The mean of a row's scores relative to the dense row, made as its table makes it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval_accelerate.reproduce.schema import Column


def derived(columns: Sequence[Column]) -> set[str]:
    """Titles of columns that say again what others say: a sum or mean next to all of its parts, a second unit."""
    titles, units = set(), {}
    for column in columns:
        others = [c for c in columns if c.benchmark == column.benchmark and c is not column]
        parts = column.metric.split("+")
        second = units.setdefault(column.benchmark.name, column.unit) != column.unit
        if second or (len(parts) > 1 and set(parts) <= {c.metric for c in others}):
            titles.add(column.title)
    return titles


def relative(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], key: str, how: str) -> float | None:
    """Scores ``key`` of a row's cells in per cent of the dense row's: ``pairs`` of (cell, dense cell), see RELATIVE."""
    if not pairs:
        return None
    if how == "ratio_of_means":
        return share(sum(cell[key] for cell, _ in pairs), sum(dense[key] for _, dense in pairs))
    return statistics.fmean(share(cell[key], dense[key]) for cell, dense in pairs)


def share(value: float | None, whole: float | None) -> float | None:
    return None if value is None or not whole else 100 * value / whole
