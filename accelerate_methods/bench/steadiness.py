"""Whether times can be believed: a machine that did other work meanwhile gives numbers that look like any others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from accelerate_methods.bench.results import flops_share, middle, speed_up, spread, work_ms

#: half the interquartile range, relative to the median, above which a row's times are no measurement
SPREAD = 0.15
#: measured speed-up over what LLM FLOPs allow, above which the dense run was slowed down by something else. Prompts
#: that fit into a cache better give some of it: up to 1.2 in the runs of docs/results.
BEYOND = 1.5
#: samples from which on a spread says something
ENOUGH = 3
MARK = "~"


def relative_spread(row: Mapping[str, Any]) -> float | None:
    """Of compression + prefill; None with too few samples or of a row that could not be measured."""
    if row["status"] != "ok":
        return None
    times = work_ms(row)
    return spread(times) / middle(times) if len(times) >= ENOUGH and middle(times) else None


def busy(row: Mapping[str, Any], dense: Mapping[str, Any] | None) -> str | None:
    """Why the times of ``row`` are not to be believed, in words; None if nothing speaks against them.

    Args:
        dense: the dense row of the same run, if it was measured.
    """
    if row["status"] != "ok":
        return None
    own = relative_spread(row)
    if own is not None and own > SPREAD:
        return f"its times spread by ±{own:.0%} around the median"
    if dense is None or dense is row or dense["label"] == row["label"]:
        return None
    base = relative_spread(dense)
    if base is not None and base > SPREAD:
        return f"the times of the dense run spread by ±{base:.0%} around the median"
    faster, allowed = speed_up(row, dense), 1 / flops_share(row)
    if faster is not None and faster > BEYOND * allowed:
        return f"a speed-up of {faster:.1f}x where LLM FLOPs allow {allowed:.1f}x"
    return None


def unsteady(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Labels of the rows that need more repeats."""
    return [row["label"] for row in rows if (relative_spread(row) or 0.0) > SPREAD]


def told(rows: Iterable[Mapping[str, Any]], dense: Mapping[str, Any] | None) -> list[str]:
    """A line per row that is marked, for below a table."""
    reasons = {row["label"]: busy(row, dense) for row in rows}
    lines = [f"{MARK} {label}: {reason}" for label, reason in reasons.items() if reason]
    return [*lines, f"{MARK}: the machine was busy; measure again when it is not. Not ranked."] if lines else []
