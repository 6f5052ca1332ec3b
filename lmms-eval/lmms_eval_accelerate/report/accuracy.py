"""Accuracy sections: runs of one model, prompt, input and software, task by task, relative to their dense run."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from accelerate_methods.registry import available, method_class
from accelerate_methods.registry.architectures import architecture_named
from accelerate_methods.stages.errors import MethodError
from lmms_eval_accelerate.report.labels import labels_of
from lmms_eval_accelerate.report.loyalty import loyalty
from lmms_eval_accelerate.report.results import DENSE, ReportError, Run
from lmms_eval_accelerate.report.sections import AXES, Entry, Section, TaskTable, plain, ratio, warn_apart
from lmms_eval_accelerate.report.statistics import McNemar, bootstrap_interval, mcnemar, pareto_front
from lmms_eval_accelerate.runs import no_op
from lmms_eval_accelerate.runs.long_prompts import explained, not_comparable

#: settings that say which method runs, or change neither answers nor costs
_OF_THE_METHOD = {
    *("method", "methods", "config", "adaptations", "match", "matched"),
    *("save_provenance", "on_long_prompt"),
}
#: settings whose absence means the model's own value, which another run may spell out
_DEFAULTED = ("conv_template", "mm_newline_position", "model_name", "model_base", "device_map")
#: costs of the uncompressed prompt, which shares are of
_OF_DENSE = ("visual_tokens_before", "prompt_tokens_dense", "llm_tflops_dense")
#: slowest to fastest encoding of the same input above which times say more about the machine than about methods
_UNEVEN = 1.5
#: what makes two task descriptions the same task; the rest are addresses of functions
_OF_THE_TASK = (
    *("dataset_path", "dataset_name", "dataset_kwargs", "test_split", "num_fewshot"),
    *("generation_kwargs", "lmms_eval_specific_kwargs", "metadata", "repeats"),
)


def accuracy_sections(runs: Iterable[Run]) -> list[Section]:
    """Runs grouped by everything but the method, in the order in which they came."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_facts(run, _DEFAULTED), sort_keys=True), []).append(run)
    parts = [part for here in groups.values() for part in _split(here)]
    sections = [
        Section(
            f"Accuracy {number}" if len(parts) > 1 else "Accuracy", _facts(here[-1]), _tables(here), here, notes=notes
        )
        for number, (here, notes) in enumerate(parts, 1)
    ]
    for section in sections:
        section.warnings += [warning for table in section.tables for warning in _warnings(table)]
    for section in sections:  # a value that only some runs spell out
        for run in section.runs:
            section.facts.update({k: v for k, v in _facts(run).items() if v != "null"})
    warn_apart(sections, "runs")
    return sections


def _split(runs: list[Run]) -> list[tuple[list[Run], list[str]]]:
    """Runs that agree on what :data:`_DEFAULTED` names; with a note where some left it to the model."""
    notes, apart = [], []
    for key in _DEFAULTED:
        values = {_facts(run).get(key, "null") for run in runs}
        if len(values - {"null"}) > 1:
            apart.append(key)
        elif len(values) > 1:
            notes.append(
                f"Some runs leave {key} to the model, the others say {min(values - {'null'})}: taken as the same."
            )
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps([_facts(run).get(key) for key in apart]), []).append(run)
    return [(here, notes) for here in groups.values()]


def _facts(run: Run, without: Iterable[str] = ()) -> dict[str, str]:
    entry = architecture_named(str(run.settings.get("family")))
    own = () if entry is None else {argument.name for argument in entry.arguments}
    settings = {k: v for k, v in run.settings.items() if k not in {*_OF_THE_METHOD, *without, *own}}
    more = {"limit": run.summary.get("limit"), "gen_kwargs": run.summary.get("gen_kwargs") or None}
    versions = {f"version of {name}": v for name, v in (run.summary.get("versions") or {}).items()}
    return {k: plain(v) for k, v in {**settings, **more, **versions}.items()}


def _tables(runs: list[Run]) -> list[TaskTable]:
    labels = [_with(label, run) for label, run in zip(labels_of([r.methods for r in runs]), runs, strict=True)]
    found: dict[tuple[str, str], list[Entry]] = {}
    for run, label in zip(runs, labels, strict=True):
        for task, metrics in run.summary["tasks"].items():
            if not metrics:
                continue  # a group without a number of its own
            metric, score = next(iter(metrics.items()))
            config = run.task_configs.get(task, {})
            same = json.dumps({k: config.get(k) for k in _OF_THE_TASK}, sort_keys=True, default=str)
            means = _means(run, task)
            entry = Entry(run, task, label, metric, score, _numbers(means), run.samples(task, metric))
            entry.kept_by_layer = means.get("kept_by_layer")
            entry.no_op = (run.summary.get("no_op") or {}).get(task)
            found.setdefault((task, same), []).append(entry)
    tables = []
    variants = Counter(task for task, _ in found)
    seen: Counter[str] = Counter()
    for (task, _), entries in found.items():
        seen[task] += 1
        dense = next((e for e in entries if e.method == DENSE), None)
        for entry in entries if dense is not None else ():
            if entry.run.parameters:  # shares are those of the architecture at its defaults
                kept = {key: value for key, value in entry.costs.items() if not key.startswith("kept")}
                entry.costs = kept | {key: dense.costs[key] for key in _OF_DENSE if key in dense.costs}
                entry.kept_by_layer = None
        entries.sort(key=lambda e: (e is not dense, is_baseline(e.method), e.method, -_budget(e), -(e.kept or 0.0)))
        table = TaskTable(task, entries, dense, [])
        if variants[task] > 1:
            table.variant = f" (variant {seen[task]})"
            table.notes.append("The runs used different descriptions (data, prompt or generation) of this task.")
        _compare(table)
        tables.append(table)
    return tables


def _with(label: str, run: Run) -> str:
    """The name of a setting with the run parameters of its architecture; these alone where there is no method."""
    given = ",".join(f"{name}={value}" for name, value in run.parameters.items())
    return label if not given else f"{label}({given})" if run.methods else given


def _warnings(table: TaskTable) -> list[str]:
    """Prompts longer than the model's context and what is therefore not comparable, and methods without effect."""
    harmed = [entry for entry in table.entries if entry.long_prompts.harmed]
    told = [f"{entry.label}: {entry.long_prompts.described()}, the question with it." for entry in harmed]
    told += no_op.explained({entry.label: entry.no_op for entry in table.entries})
    told += explained({entry.label: entry.not_comparable for entry in table.entries})
    return [f"{table.task}{table.variant}: {line}" for line in told]


def _budget(entry: Entry) -> float:
    return next((m["retention_ratio"] for m in entry.run.methods if m.get("retention_ratio") is not None), 0.0)


def is_baseline(method: str) -> bool:
    return method in available() and method_class(method).baseline


def _means(run: Run, task: str) -> dict[str, Any]:
    costs = run.summary["costs"]
    by_task = costs.get("by_task") or {}
    # likelihood tasks carry no costs per sample; the overall means are the task's if it is the only one
    return by_task.get(task) or (costs.get("overall") if len(run.summary["tasks"]) == 1 else None) or {}


def _numbers(means: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in means.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def _compare(table: TaskTable) -> None:
    """Fill what is relative to the dense run, and the Pareto fronts."""
    dense = table.dense
    if dense is None:
        table.notes.append("No dense run with these settings: nothing is relative.")
    metrics = {e.metric for e in table.entries}
    if len(metrics) > 1:
        table.notes.append(f"The runs report different metrics: {', '.join(sorted(metrics))}.")
    for entry in table.entries:
        if entry is not dense:
            entry.not_comparable = not_comparable(entry.long_prompts, dense and dense.long_prompts)
        if dense is not None and entry is not dense and entry.metric == dense.metric:
            _relate(table, entry, dense)
    _doubt_times(table)
    for axis in AXES:
        there = [e for e in table.entries if e.cost(axis) is not None]
        marks = pareto_front([e.cost(axis) for e in there], [e.score for e in there])
        for entry, mark in zip(there, marks, strict=True):
            entry.front[axis] = mark


def _doubt_times(table: TaskTable) -> None:
    """Encoding is the same work for all methods that act after it and ask it for nothing; so should its time be."""
    alike = [e for e in table.entries if not _changes_encoding(e) and e.costs.get("vision_ms")]
    times = [e.costs["vision_ms"] for e in alike]
    if times and max(times) > _UNEVEN * min(times):
        slow, fast = (pick(alike, key=lambda e: e.costs["vision_ms"]).label for pick in (max, min))
        table.notes.append(
            f"Times are not comparable: encoding, the same work in both, took {min(times):.1f} ms with {fast} and "
            f"{max(times):.1f} ms with {slow}, so the machine was not equally free."
        )


def _changes_encoding(entry: Entry) -> bool:
    names = [m["method"] for m in entry.run.methods]
    if any(name not in available() for name in names):
        return True
    classes = [method_class(name) for name in names]
    return any(c.signals or {"sample", "encode"} & set(c.class_stages()) for c in classes)


def _relate(table: TaskTable, entry: Entry, dense: Entry) -> None:
    common = [doc for doc in dense.samples if doc in entry.samples]
    ours, theirs = [entry.samples[d] for d in common], [dense.samples[d] for d in common]
    if any((a.question, a.target) != (b.question, b.target) for a, b in zip(ours, theirs, strict=True)):
        table.notes.append(f"{entry.label} was asked other questions than dense: not compared.")
        return
    entry.change = entry.score - dense.score
    entry.speedup = ratio(dense.work_ms, entry.work_ms)
    entry.paired = len(common)
    if len(common) != len(dense.samples) or len(common) != len(entry.samples):
        table.notes.append(
            f"{entry.label} and dense share {len(common)} documents ({len(entry.samples)} and {len(dense.samples)} "
            "answered); the interval is over the shared ones."
        )
    if not common:
        return
    try:
        entry.loyalty = loyalty(dense.samples, entry.samples)
    except MethodError as error:
        raise ReportError(f"{entry.run.folder} or {dense.run.folder}, samples of {table.task}: {error}") from error
    same = no_op.answers_as_dense(entry.loyalty, entry.run.methods)
    entry.no_op = no_op.both(entry.no_op, same)
    paired = mcnemar([(b.score, a.score) for a, b in zip(ours, theirs, strict=True)])
    if isinstance(paired, McNemar):
        entry.p_value, entry.lost, entry.won = paired.p_value, paired.lost, paired.won
    distributions = entry.loyalty.distributions
    if 0 < distributions < len(common):
        table.notes.append(
            f"{entry.label}: the first token's distribution is known of {distributions} of {len(common)} documents."
        )
    factor = _factor(dense)
    if factor is None or not _is_mean(entry, factor):
        table.notes.append(f"{entry.label}: {entry.metric} is not the mean of a number per document, so no interval.")
        return
    low, high = bootstrap_interval([a.score - b.score for a, b in zip(ours, theirs, strict=True)])
    entry.low, entry.high = factor * low, factor * high


def _factor(entry: Entry) -> float | None:
    """1 or 100: the score is this many times the mean over documents; None if it is something else."""
    return next((factor for factor in (1.0, 100.0) if _is_mean(entry, factor)), None)


def _is_mean(entry: Entry, factor: float) -> bool:
    scores = [s.score for s in entry.samples.values()]
    if not scores or None in scores:
        return False
    return math.isclose(entry.score, factor * sum(scores) / len(scores), rel_tol=1e-4, abs_tol=1e-6)
