"""What a paper's table is made of: parts (model and setting), columns (what is measured), rows (methods, numbers)."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from accelerate_methods.registry.configs import read_config
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.stages.errors import MethodError, UnknownNameError
from lmms_eval_accelerate.benchmarks.catalog import Benchmark, score_unit

DENSE = "dense"
#: how a table makes its column of scores relative to the dense row, and what that column is called
RELATIVE = ("mean_of_ratios", "ratio_of_means")
PRINTED_RELATIVE = ("relative %", "average %")


@dataclasses.dataclass(frozen=True)
class Column:
    """What is measured in a column. ``metric`` and ``scale`` are the benchmark's unless the table prints another."""

    title: str
    benchmark: Benchmark
    metric: str
    scale: float
    note: str = ""

    @property
    def unit(self) -> str:
        """Of the scores: "%", "points" or "of 5"."""
        return score_unit(self.benchmark, self.metric)


@dataclasses.dataclass(frozen=True)
class TableRow:
    """One line of a table.

    Attributes:
        name: as in the table; unique in its part.
        method: name, names joined by "+", or config below ``configs/``; None for the dense row and for rows not run.
        params: parameters over those of ``method``.
        arguments: run parameters of a trained architecture, over the part's.
        pipeline: what these make; empty for the dense row, None for rows not run.
        published: column title -> printed number, in the column's unit.
        unmeasured: the same for the columns of the part's ``unmeasured``.
        tflops: multiply-accumulates of the LLM prefill in 1e12 as printed, None if the table has none.
        not_run: why this row cannot be run; empty if it can.
        secondary: the number is not from the method's authors.
    """

    name: str
    method: str | None
    params: dict[str, Any]
    pipeline: Pipeline | None
    published: dict[str, float]
    unmeasured: dict[str, float]
    tflops: float | None
    note: str
    not_run: str
    secondary: bool
    source: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def dense(self) -> bool:
        return self.name == DENSE

    @property
    def folder(self) -> str:
        """The name as that of a folder; unique in its part."""
        name = self.name.replace("*", "-star").replace("‡", "-tuned")
        return re.sub(r"[^\w@.+-]+", "_", name).strip("_")

    def model_args(self) -> dict[str, Any]:
        """Arguments that the row adds to the part's: run parameters of an architecture, and :meth:`method_args`."""
        return {**self.arguments, **self.method_args()}

    def method_args(self) -> dict[str, Any]:
        """``method`` and every parameter that is given or is no default.

        A config is written out, so that nothing but the method can come from it. Empty for rows without a method.
        """
        if self.pipeline is None:
            raise MethodError(f"row {self.name!r} is not run: {self.not_run}")
        if not self.pipeline.methods:
            return {}
        given = set(self.params)
        if "/" in str(self.method):
            given |= set(read_config(self.method).get("params") or {})
        arguments: dict[str, Any] = {"method": self.pipeline.name}
        for method in self.pipeline.methods:
            prefix = f"{method.name}." if len(self.pipeline.methods) > 1 else ""
            for field, default in method.parameters().items():
                value = getattr(method, field)
                if value is not None and (prefix + field in given or value != default):
                    arguments[prefix + field] = value
        return arguments


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows that share a model and its settings.

    Attributes:
        model: arguments of ``--model_args`` with ``family``; of a part that is not run only what is known.
        checkpoint: fields of the right checkpoint's config.
        unmeasured: column title -> why it is not measured here.
        not_run: why none of the rows can be run; empty if they can.
        relative: how the table makes "% of dense" out of the columns, one of :data:`RELATIVE`.
        model_class: class of transformers that the model is of; None for models of the llava package.
    """

    name: str
    model: dict[str, Any]
    checkpoint: dict[str, int]
    columns: tuple[Column, ...]
    unmeasured: dict[str, str]
    rows: tuple[TableRow, ...]
    note: str
    not_run: str
    relative: str = RELATIVE[0]
    model_class: str | None = None

    @property
    def family(self) -> str | None:
        return self.model.get("family")

    @property
    def dense(self) -> TableRow:
        return self.rows[0]

    @property
    def tasks(self) -> list[str]:
        """lmms-eval tasks of the columns, each once."""
        return list(dict.fromkeys(column.benchmark.task for column in self.columns))

    def row(self, name: str) -> TableRow:
        """The row of this name (or folder name); :class:`UnknownNameError` otherwise."""
        for row in self.rows:
            if name in (row.name, row.folder):
                return row
        raise UnknownNameError(f"row of part {self.name}:", name, [row.name for row in self.rows])


@dataclasses.dataclass(frozen=True)
class Table:
    """One file: the table of a paper."""

    name: str
    title: str
    paper: str
    source: str
    note: str
    parts: tuple[Part, ...]

    def part(self, name: str) -> Part:
        """The part of this name; :class:`UnknownNameError` otherwise."""
        for part in self.parts:
            if part.name == name:
                return part
        raise UnknownNameError(f"part of table {self.name}:", name, [part.name for part in self.parts])
