"""What the runs of a table came to: measured beside published, relative to dense, intervals, costs and loyalty.

The outcome is one JSON-able mapping (``outcome.json``, explained in docs/reproduce.md); what is printed, the Markdown
and the leaderboard are made from it. Scores are in the papers' unit: per cent, points for MME, 0 to 5 for
Video-ChatGPT.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmms_eval_accelerate import ROOT
from lmms_eval_accelerate.benchmarks.catalog import group_metrics, score
from lmms_eval_accelerate.report.loyalty import loyalty
from lmms_eval_accelerate.report.results import Run, Sample
from lmms_eval_accelerate.report.statistics import McNemar
from lmms_eval_accelerate.reproduce import guards
from lmms_eval_accelerate.reproduce.breakdown import (
    Breakdown,
    break_down,
    interval,
    paired_test,
    read_lines,
    standard_error,
)
from lmms_eval_accelerate.reproduce.choice import Choices, ChosenPart
from lmms_eval_accelerate.reproduce.folders import read_summary
from lmms_eval_accelerate.reproduce.means import derived, relative, share
from lmms_eval_accelerate.reproduce.plan import Unit
from lmms_eval_accelerate.reproduce.schema import PRINTED_RELATIVE, Column, Table, TableRow
from lmms_eval_accelerate.runs import no_op
from lmms_eval_accelerate.runs.long_prompts import LongPrompts, not_comparable

KIND, SCHEMA = "reproduction", 1
_COSTS = (
    *("visual_tokens_before", "visual_tokens_after", "visual_tokens_per_layer", "prompt_tokens_dense", "prompt_tokens"),
    *("llm_tflops_dense", "llm_tflops", "vision_ms", "compress_ms", "prefill_ms", "decode_ms", "generated_tokens"),
)


@dataclasses.dataclass
class Result:
    """A unit's results in one column."""

    unit: Unit
    summary: dict[str, Any]
    score: float
    costs: dict[str, float]
    samples: dict[Any, Sample]
    parts: Breakdown | str
    documents: int
    prompts: LongPrompts
    realised: dict[str, Any]
    no_op: str | None = None


def evaluate(
    table: Table, selections: Sequence[ChosenPart], choices: Choices, about: Mapping[str, Any]
) -> dict[str, Any]:
    """The outcome of finished units.

    Args:
        about: what else is to be written down: command, date, machine, versions.

    Raises:
        FolderError: a unit has no results, or results of other settings.
        MethodError: a benchmark's metric is missing.
    """
    warnings: list[str] = []
    parts = [_part(selection, choices, warnings) for selection in selections]
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "table": table.name,
        "title": table.title,
        "paper": table.paper,
        "source": table.source,
        "note": table.note,
        **about,
        "limit": choices.limit,
        "other_model": choices.pretrained if any(choices.other_model(s.part) for s in selections) else None,
        "choices": choices.to_dict(),
        "parts": parts,
        "warnings": list(dict.fromkeys(warnings)),
    }


def _part(selection: ChosenPart, choices: Choices, warnings: list[str]) -> dict[str, Any]:
    part, other_model = selection.part, choices.other_model(selection.part)
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    baselines = []
    for column in selection.columns:
        results = {
            row.name: _result(selection.units[row.name, column.title], column)
            for row in selection.rows
            if row.pipeline is not None
        }
        dense = results.get(part.dense.name)
        if dense is None:  # the whole part cannot be run: what was published is all there is
            for row in selection.rows:
                cells[row.name, column.title] = cell(row, part.dense, column, None, None, other_model)
            continue
        published = part.dense.published.get(column.title)
        if published is not None:
            error = standard_error(dense.parts)
            baselines.append(guards.Baseline(column, dense.score, published, dense.documents, error))
        warnings += guards.long_prompts(f"{part.name}, {column.title}", dense.prompts)
        alike = {
            row.name: results[row.name].costs.get("vision_ms", 0.0) for row in selection.rows if _same_encoding(row)
        }
        warnings += guards.times(f"{part.name}, {column.title}", alike)
        for row in selection.rows:
            result = results.get(row.name)
            cells[row.name, column.title] = cell(row, part.dense, column, result, dense, other_model)
            if result is not None:
                warnings += _guarded(selection, row, column, result, choices)
            if reason := cells[row.name, column.title]["no_op"]:
                warnings += no_op.explained({f"{row.name} on {column.title}": reason})
    if choices.limit is None and not other_model:
        warnings += guards.dense_baseline(part.name, baselines)
    rows = [_row(row, selection, cells) for row in selection.rows]
    arguments = next((unit.identity["model_args"] for unit in selection.units.values() if unit.dense), {})
    return {
        "name": part.name,
        "family": part.family,
        "model": {k: portable(v) if isinstance(v, str) else v for k, v in part.model.items()},
        "pretrained": portable(str(arguments.get("pretrained") or part.model.get("pretrained"))),
        "model_args": {k: v for k, v in arguments.items() if k != "pretrained"},
        "other_model": other_model,
        "note": part.note,
        "not_run": part.not_run,
        "unmeasured": part.unmeasured,
        "relative": part.relative,
        "columns": [{**_column(c), "in_mean": c.title not in derived(selection.columns)} for c in selection.columns],
        "rows": rows,
    }


def _same_encoding(row: TableRow) -> bool:
    """Whether the row's methods act after the encoder and ask it for nothing."""
    if row.pipeline is None or row.arguments:
        return False
    return not row.pipeline.signals and not {"sample", "encode"} & set(row.pipeline.stages)


def _guarded(selection: ChosenPart, row: TableRow, column: Column, result: Result, choices: Choices) -> list[str]:
    """What the guards say of one result."""
    part, benchmark, summary = selection.part, column.benchmark, result.summary
    return [
        *guards.data(row.name, column.title, benchmark, summary, choices.limit),
        *guards.answers(row.name, summary),  # they name the task themselves
        *guards.adaptations(row.name, summary),
        *guards.model(part.name, part.family, {} if choices.other_model(part) else part.checkpoint, summary),
    ]


def _column(column: Column) -> dict[str, Any]:
    measured = column.benchmark
    return {
        "title": column.title,
        "benchmark": measured.name,
        "task": measured.task,
        "dataset": measured.dataset,
        "split": measured.split,
        "metric": column.metric,
        "scale": column.scale,
        "unit": column.unit,
        "note": column.note,
    }


def _row(row: TableRow, selection: ChosenPart, cells: Mapping[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    own = {column.title: cells[row.name, column.title] for column in selection.columns}
    left_out = derived(selection.columns)
    pairs = [(cell, cells[selection.part.dense.name, title]) for title, cell in own.items() if title not in left_out]
    measured = [(c, d) for c, d in pairs if c["relative"] is not None]
    published = [(c, d) for c, d in pairs if c["relative_published"] is not None]
    both = [pair for pair in measured if pair[0]["relative_published"] is not None]
    how = selection.part.relative
    # the table's own number is over all of its columns
    whole = len(selection.columns) == len(selection.part.columns)
    printed = next((row.unmeasured[t] for t in PRINTED_RELATIVE if whole and t in row.unmeasured), None)
    return {
        "name": row.name,
        "dense": row.dense,
        "method": row.pipeline.name if row.pipeline is not None else None,
        "methods": row.pipeline.to_dict() if row.pipeline is not None else None,
        "not_run": row.not_run,
        "note": row.note,
        "source": row.source,
        "secondary": row.secondary,
        "published_tflops": row.tflops,
        "published_elsewhere": row.unmeasured,
        # as the papers' last column; where it prints some of the columns, the measured mean over those is there, too
        "mean_relative": relative(measured, "measured", how),
        "mean_relative_published": relative(published, "published", how) if printed is None else printed,
        "mean_relative_printed": printed is not None,
        "mean_relative_of_published": relative(both, "measured", how),
        "mean_comparable": all(c["not_comparable"] is None for c, _ in measured),
        "columns_in_mean": len(measured),
        "columns_in_mean_published": len(published),
        "cells": own,
    }


def cell(
    row: TableRow, dense_row: TableRow, column: Column, result: Result | None, dense: Result | None, other_model: bool
) -> dict[str, Any]:
    """One row in one column; numbers that do not exist are None.

    ``change`` is measured - measured dense with its interval ``low``..``high``; ``difference`` measured - published, of
    the same model only; ``relative``, ``relative_published`` in per cent of the dense row's measured, published score.
    ``p_value``, ``lost``, ``won``: McNemar's exact test where documents are right or wrong. ``realised``: what was kept
    of the visual tokens; ``no_op``: why the row is the dense model in effect; ``matched``: the budget that was solved.
    ``long_prompts``: answers to prompts longer than the model's context; ``not_comparable``: why what is relative to
    the measured dense run then means nothing.
    """
    published, published_dense = row.published.get(column.title), dense_row.published.get(column.title)
    made: dict[str, Any] = {
        "published": published,
        "relative_published": share(published, published_dense),
        **dict.fromkeys(("measured", "difference", "relative", "change", "low", "high", "members", "documents")),
        **dict.fromkeys(("interval", "agreement", "agreement_documents", "kl", "kl_documents", "speedup")),
        **dict.fromkeys(("visual_tokens_share", "flops_share", "long_prompts", "not_comparable")),
        **dict.fromkeys(("p_value", "lost", "won", "realised", "no_op", "matched")),
        "costs": {},
        "folder": None,
        "hash": None,
    }
    if result is None:
        return made
    made |= {
        "measured": result.score,
        "difference": None if published is None or other_model else result.score - published,
        "relative": share(result.score, dense.score),
        "documents": result.documents,
        "costs": result.costs,
        "visual_tokens_share": _ratio(result.costs, "visual_tokens_per_layer", "visual_tokens_before"),
        "flops_share": _ratio(result.costs, "llm_tflops", "llm_tflops_dense"),
        "folder": short_folder(result.unit),
        "hash": result.unit.hash,
        "long_prompts": dataclasses.asdict(result.prompts),
        "realised": result.realised,
        "no_op": result.no_op,
        "matched": (result.summary.get("settings") or {}).get("matched"),
    }
    if result is not dense:
        against = _against(result, dense)
        made |= {**against, "no_op": no_op.both(result.no_op, against["no_op"])}
        made["not_comparable"] = not_comparable(result.prompts, dense.prompts)
    return made


def _against(result: Result, dense: Result) -> dict[str, Any]:
    """What is relative to the dense run's answers and times."""
    made: dict[str, Any] = {"change": result.score - dense.score, "speedup": _speedup(result.costs, dense.costs)}
    made["no_op"] = None
    common = [d for d in dense.samples if d in result.samples]
    if any(_asked(dense.samples[d]) != _asked(result.samples[d]) for d in common):
        return {**made, "interval": "none: asked other questions than the dense run"}
    found = interval(result.parts, dense.parts)
    if isinstance(found, str):
        made["interval"] = f"none: {found}"
    else:
        made |= {"low": found.low, "high": found.high, "members": found.members}
        made["interval"] = f"paired bootstrap, {found.members} {found.per}s"
    paired = paired_test(result.parts, dense.parts)
    if isinstance(paired, McNemar):
        made |= dataclasses.asdict(paired)
    loyal = loyalty(dense.samples, result.samples)
    made["no_op"] = no_op.answers_as_dense(loyal, result.summary.get("methods") or [])
    made |= {"agreement": loyal.agreement, "agreement_documents": loyal.documents}
    return {**made, "kl": loyal.first_token_kl_mean, "kl_documents": loyal.distributions}


def _asked(sample: Sample) -> tuple[str, str]:
    return sample.question, sample.target


def short_folder(unit: Unit) -> str:
    """A unit's folder below the output folder."""
    return Path(*unit.folder.parts[-3:]).as_posix()


def portable(text: str) -> str:
    """``text`` with files of this checkout named relative to it."""
    return text.replace(f"{ROOT}/", "")


def _result(unit: Unit, column: Column) -> Result:
    summary = read_summary(unit)
    benchmark = column.benchmark
    run = Run(unit.folder, summary)
    metrics = group_metrics(benchmark, summary["tasks"])
    value = score(benchmark, metrics, column.metric, column.scale)
    samples = {
        (task, document): sample
        for task in benchmark.tasks
        for document, sample in run.samples(task, column.metric.partition("+")[0]).items()
    }
    lines = read_lines(run, benchmark.tasks)
    documents = sum(int(summary.get("n_samples", {}).get(task, 0)) for task in benchmark.tasks) or len(samples)
    parts = break_down(benchmark, column.metric, column.scale, lines, value)
    costs, prompts = _costs(summary, benchmark.tasks), LongPrompts.of_all(_by_task(summary, benchmark.tasks))
    idle = [(summary.get("no_op") or {}).get(task) for task in benchmark.tasks]
    without = no_op.both(*idle) if all(idle) else None
    realised = _realised(_by_task(summary, benchmark.tasks))
    return Result(unit, summary, value, costs, samples, parts, documents, prompts, realised, without)


def _realised(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was kept of the visual tokens over the tasks of a benchmark: mean, least and most of an answer, by layer."""
    found = [entry for entry in found if entry.get("with_visual_tokens")]
    if not found:
        return {}
    weights = [entry["with_visual_tokens"] for entry in found]

    def mean(values: Sequence[float]) -> float:
        return sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)

    by_layer = [entry.get("kept_by_layer") or [] for entry in found]
    return {
        "kept": mean([entry["kept"] for entry in found]),
        "least": min(entry["kept_least"] for entry in found),
        "most": max(entry["kept_most"] for entry in found),
        "by_layer": [mean(layer) for layer in zip(*by_layer, strict=True)],
    }


def _by_task(summary: Mapping[str, Any], tasks: Sequence[str]) -> list[Mapping[str, Any]]:
    """The costs of the tasks of a benchmark. Likelihood tasks have them for the whole run only."""
    costs = summary.get("costs") or {}
    by_task = costs.get("by_task") or {}
    return [by_task[task] for task in tasks if task in by_task] or [costs.get("overall") or {}]


def _costs(summary: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, float]:
    """Means per document over the tasks of a benchmark."""
    found = _by_task(summary, tasks)
    weights = [entry.get("measured") or entry.get("samples") or 1 for entry in found]
    return {
        key: sum(w * entry[key] for w, entry in zip(weights, found, strict=True)) / sum(weights)
        for key in _COSTS
        if all(isinstance(entry.get(key), (int, float)) for entry in found)
    }


def _speedup(costs: Mapping[str, float], dense: Mapping[str, float]) -> float | None:
    """(compression + prefill) of the dense run / of this one."""
    own, base = (entry.get("compress_ms", 0.0) + entry.get("prefill_ms", 0.0) for entry in (costs, dense))
    return base / own if own and base else None


def _ratio(costs: Mapping[str, float], part: str, whole: str) -> float | None:
    return costs[part] / costs[whole] if costs.get(whole) and part in costs else None
