"""What the user asked for, and which parts, rows and columns of a table that are."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MethodError, UnknownNameError
from .schema import DENSE, Column, Part, Row, Table

if TYPE_CHECKING:
    from .plan import Unit

EMBEDDED = "embedded"
EMBEDDED_FAMILIES = ("llava_onevision", "llava_video")
#: arguments of lmms-eval's command line that this command sets itself, and what to use instead
_OURS = {
    **{"--model": "the table", "--model_args": "--model-args", "--tasks": "--columns", "--limit": "--limit"},
    **{"--batch_size": "--batch-size", "-b": "--batch-size", "--output_path": "--output", "--config": "--model-args"},
}
_CACHES = ("--use_cache", "-c", "--allow_cache", "--cache_requests")


@dataclasses.dataclass(frozen=True)
class Choices:
    """What the user asked for. None: the table's own."""

    table: str
    part: str | None = None
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    limit: int | None = None
    pretrained: str | None = None
    model_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batch_size: int = 1
    data: Path | None = None
    extra: tuple[str, ...] = ()  # further arguments of lmms-eval

    @property
    def other_model(self) -> bool:
        """Whether another checkpoint than the paper's is run, so that the published numbers are not its numbers."""
        return self.pretrained is not None

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


@dataclasses.dataclass
class Selection:
    """The chosen rows and columns of one part."""

    part: Part
    rows: list[Row]
    columns: list[Column]
    #: (row name, column title) -> unit; rows that are not run have none
    units: dict[tuple[str, str], Unit] = dataclasses.field(default_factory=dict)


def select(table: Table, choices: Choices) -> list[Selection]:
    """The parts with the chosen rows (dense always among them) and columns.

    Raises:
        UnknownNameError: a part, row or column that the table lacks.
        MethodError: nothing is left, or the given checkpoint is of another family than every chosen part.
    """
    parts = [_named(table.parts, choices.part, "part", lambda p: p.name)] if choices.part else list(table.parts)
    if choices.pretrained == EMBEDDED:
        parts = _fit_for_embedded(parts, table)
    rows = [row for part in parts for row in part.rows]
    wanted = {row.name for name in choices.rows for row in _rows(rows, name)}
    titles = list(dict.fromkeys(column.title for part in parts for column in part.columns))
    columns = {_named(titles, name, "column", str) for name in choices.columns} or set(titles)
    chosen = []
    for part in parts:
        here = [r for r in part.rows if not wanted or r.name in wanted or r.dense]
        there = [column for column in part.columns if column.title in columns]
        only_dense = bool(wanted - {DENSE}) and len(here) == 1
        if (there or part.not_run) and not only_dense:
            chosen.append(Selection(part, here, there))
    if not any(selection.columns for selection in chosen if not selection.part.not_run):
        raise MethodError(f"no part of table {table.name} that can be run has both the chosen rows and columns.")
    return chosen


def _fit_for_embedded(parts: list[Part], table: Table) -> list[Part]:
    fit = [part for part in parts if part.family in EMBEDDED_FAMILIES and not part.not_run]
    if not fit:
        raise MethodError(
            f"the embedded model runs as {' or '.join(EMBEDDED_FAMILIES)}; table {table.name} needs "
            f"{', '.join(dict.fromkeys(str(p.family) for p in parts))}. Choose another table or part."
        )
    return fit


def _rows(rows: list[Row], name: str) -> list[Row]:
    """The rows called ``name``, or all rows of the method ``name``."""
    of_method = [r for r in rows if not r.dense and r.pipeline is not None and r.pipeline.name == name]
    if of_method:
        return of_method
    found = _named(rows, name, "row", lambda r: r.name)
    return [row for row in rows if row.name == found.name]


def _named(things: Sequence[Any], name: str, what: str, key: Any) -> Any:
    """The thing called ``name``, upper and lower case alike."""
    for thing in things:
        if key(thing).casefold() == name.casefold():
            return thing
    raise UnknownNameError(what, name, {key(t) for t in things})


def check_extra(extra: Sequence[str]) -> None:
    """Arguments for lmms-eval that would contradict the table or take answers out of a cache."""
    for word in extra:
        flag = word.partition("=")[0]
        if _is_one_of(flag, _CACHES):
            raise MethodError(
                f"{flag} takes answers or requests from a cache of lmms-eval, such as its response cache: they have no "
                "times and may be those of another setting. A killed run goes on where it stopped without it: start "
                "the same command again."
            )
        for name in _OURS:
            if _is_one_of(flag, (name,)):
                raise MethodError(f"{flag} is set by this command; use {_OURS[name]}.")


def _is_one_of(flag: str, names: Sequence[str]) -> bool:
    """Whether lmms-eval could read ``flag`` as one of ``names``; it takes unique beginnings of long names, too."""
    return flag in names or (len(flag) > 3 and flag[:2] == "--" and any(name.startswith(flag) for name in names))
