"""What a run says of prompts longer than its model's context, and what is then no longer comparable.

Such a prompt loses its end, where the question stands (the LLaVA tree cuts it), or runs into positions for which the
model was not trained (models of transformers). A score is a number all the same, and a method that shortens the prompt
seems to answer better, more cheaply and differently than a dense model that never saw the question.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

#: stands behind numbers that are relative to a dense run whose prompts were too long
MARK = "≠"


@dataclasses.dataclass(frozen=True)
class LongPrompts:
    """Counts over the answers of a run, or to one task of it.

    Attributes:
        answers: all of them.
        cut: whose prompt lost its end; untrained: whose prompt ran beyond the trained positions.
        over_dense: whose uncompressed prompt would have been too long, whatever was left of it.
    """

    answers: int = 0
    cut: int = 0
    untrained: int = 0
    over_dense: int = 0

    @classmethod
    def of(cls, costs: Mapping[str, Any]) -> LongPrompts:
        """Of the means of a run (``costs`` in its summary); zeros for a run that did not count them."""
        counts = {"answers": costs.get("samples"), "cut": costs.get("prompts_cut")}
        counts |= {"untrained": costs.get("prompts_untrained"), "over_dense": costs.get("prompts_over_dense")}
        return cls(**{name: round(count or 0) for name, count in counts.items()})

    @classmethod
    def of_all(cls, costs: Iterable[Mapping[str, Any]]) -> LongPrompts:
        """The sums over several tasks."""
        rows = [dataclasses.astuple(cls.of(entry)) for entry in costs]
        return cls(*map(sum, zip(*rows, strict=True))) if rows else cls()

    @property
    def harmed(self) -> int:
        """Answers to prompts that the model could not read to their end."""
        return self.cut + self.untrained

    @property
    def count(self) -> str:
        """"12 of 50"; empty if there are none."""
        return f"{self.harmed} of {self.answers}" if self.harmed else ""

    def described(self) -> str:
        """What happened to the prompts."""
        ways = []
        if self.cut:
            ways.append(f"{self.cut} of {self.answers} prompts were longer than the model's context and lost their end")
        if self.untrained:
            ways.append(f"{self.untrained} of {self.answers} prompts ran beyond the positions of the model's training")
        return " and ".join(ways)


def not_comparable(own: LongPrompts, dense: LongPrompts | None) -> str | None:
    """Why numbers relative to the dense run mean nothing; None if they do.

    Args:
        dense: of the dense run, or None without one: then only the work of the uncompressed prompt is in question.
    """
    if dense is not None and dense.harmed:
        return f"of the dense run {dense.described()}, the question with it"
    if own.over_dense:
        return (
            f"{own.over_dense} of {own.answers} uncompressed prompts are longer than the model's context: the dense "
            "model cannot read their questions"
        )
    return None


def marked(text: str, reason: str | None) -> str:
    """``text`` with :data:`MARK` behind it if there is a reason against it."""
    return f"{text} {MARK}" if text and reason else text


def explained(reasons: Mapping[str, str | None]) -> list[str]:
    """A line per reason, with those (rows, columns) that have it."""
    having: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if reason:
            having.setdefault(reason, []).append(name)
    return [f"{MARK}: not comparable ({', '.join(names)}): {reason}." for reason, names in having.items()]
