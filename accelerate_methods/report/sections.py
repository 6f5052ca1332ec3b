"""What may be compared: runs of one model, prompt, input and software, task by task, relative to their dense run."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from accelerate_methods.errors import MethodError
from accelerate_methods.pipeline import resolve
from accelerate_methods.registry import available, method_class

from .results import DENSE, Bench, Run, Sample
from .statistics import bootstrap_interval, pareto_front

#: settings that say which method runs, or change neither answers nor costs
_OF_THE_METHOD = {"method", "methods", "config", "adaptations", "save_provenance"}
#: settings whose absence means the model's own value, which another run may spell out
_DEFAULTED = ("conv_template", "mm_newline_position", "model_name", "model_base", "device_map")
#: slowest to fastest encoding of the same input above which times say more about the machine than about methods
_UNEVEN = 1.5
#: what makes two task descriptions the same task; the rest are addresses of functions
_OF_THE_TASK = (
    *("dataset_path", "dataset_name", "dataset_kwargs", "test_split", "num_fewshot"),
    *("generation_kwargs", "lmms_eval_specific_kwargs", "metadata", "repeats"),
)


@dataclasses.dataclass
class Entry:
    """One setting on one task. Costs are means per sample without warm-up; None where they were not measured.

    Attributes:
        score: the task's first metric, on its own scale; change, low, high: its difference to the dense run, with the
            95 % interval over the documents that both answered.
        paired: number of those documents; same: share of them with the same answer.
        speedup: (compression + prefill) of the dense run / that of this one.
        front: for each of :data:`AXES` whether the entry is on the Pareto front.
        measured: the row of the efficiency bench for this model and setting, if one was given.
    """

    run: Run
    task: str
    label: str
    metric: str
    score: float
    costs: dict[str, float]
    samples: dict[Any, Sample]
    change: float | None = None
    low: float | None = None
    high: float | None = None
    paired: int = 0
    same: float | None = None
    speedup: float | None = None
    front: dict[str, bool] = dataclasses.field(default_factory=dict)
    measured: BenchRow | None = None

    @property
    def method(self) -> str:
        return self.run.method

    @property
    def documents(self) -> int:
        return int(self.run.summary.get("n_samples", {}).get(self.task) or len(self.samples))

    @property
    def work_ms(self) -> float | None:
        """What a method has to beat: its own work and the prefill after it."""
        return _sum(self.costs.get("compress_ms"), self.costs.get("prefill_ms"))

    @property
    def flops_share(self) -> float | None:
        return _ratio(self.costs.get("llm_tflops"), self.costs.get("llm_tflops_dense"))

    @property
    def kept(self) -> float | None:
        return _ratio(self.costs.get("visual_tokens_per_layer"), self.costs.get("visual_tokens_before"))

    @property
    def decode_ms(self) -> float | None:
        """Per token after the first (which comes from prefill)."""
        return _ratio(self.costs.get("decode_ms"), self.costs.get("generated_tokens", 0.0) - 1.0)

    def cost(self, axis: str) -> float | None:
        return self.work_ms if axis == "work_ms" else self.costs.get(axis)


#: costs that accuracy is drawn against
AXES = {
    "work_ms": "compression + prefill, ms",
    "llm_tflops": "LLM prefill, tera multiply-accumulates",
    "visual_tokens_per_layer": "visual tokens, mean over LLM layers",
}


@dataclasses.dataclass
class TaskTable:
    """All settings on one task; ``dense`` is the entry that the others are relative to."""

    task: str
    entries: list[Entry]
    dense: Entry | None
    notes: list[str]
    variant: str = ""

    @property
    def scale(self) -> float:
        """Fractions are shown in per cent, scores on another scale (MME) as they are."""
        return 100.0 if all(abs(e.score) <= 1.0 for e in self.entries) else 1.0

    @property
    def small(self) -> bool:
        """Whether the work is better told in giga than in tera."""
        return all(e.costs.get("llm_tflops", 0.0) < 0.1 for e in self.entries)


@dataclasses.dataclass
class Section:
    """Runs that share everything but the method."""

    name: str
    facts: dict[str, str]
    tables: list[TaskTable]
    runs: list[Run]
    warnings: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def model(self) -> str:
        return self.facts.get("pretrained", "unknown model")


@dataclasses.dataclass
class BenchRow:
    """One row of an efficiency file, with what is relative to the dense row of the same file (the same process)."""

    label: str
    method: str
    content: dict[str, Any]
    speedup: float | None = None
    first_token_speedup: float | None = None
    overhead: float | None = None

    @property
    def ok(self) -> bool:
        return self.content.get("status", "ok") == "ok"

    def times(self, name: str) -> list[float]:
        return (self.content.get("samples") or {}).get(name) or []

    def median(self, name: str) -> float | None:
        values = self.times(name)
        return median(values) if values else None

    @property
    def work_ms(self) -> float | None:
        compress, prefill = self.median("compress_ms"), self.median("prefill_ms")
        return None if prefill is None else (compress or 0.0) + prefill

    def tflops(self, name: str) -> float | None:
        return (self.content.get("tflops") or {}).get(name)

    def tokens(self, name: str) -> float | None:
        """Visual tokens "before", "after" or "per_layer" (a mean, or one number per layer)."""
        value = (self.content.get("visual_tokens") or {}).get(name)
        return sum(value) / len(value) if isinstance(value, list) and value else value or None


@dataclasses.dataclass
class BenchSection:
    """Efficiency files of one machine, model, input and software."""

    name: str
    facts: dict[str, str]
    rows: list[BenchRow]
    files: list[Bench]
    warnings: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def dense(self) -> BenchRow | None:
        return next((r for r in self.rows if r.method == DENSE and r.ok), None)


# -- accuracy ----------------------------------------------------------------------------------------------------------


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
    for section in sections:  # a value that only some runs spell out
        for run in section.runs:
            section.facts.update({k: v for k, v in _facts(run).items() if v != "null"})
    _warn(sections, "runs")
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
    settings = {k: v for k, v in run.settings.items() if k not in _OF_THE_METHOD and k not in without}
    more = {"limit": run.summary.get("limit"), "gen_kwargs": run.summary.get("gen_kwargs") or None}
    versions = {f"version of {name}": v for name, v in (run.summary.get("versions") or {}).items()}
    return {k: _plain(v) for k, v in {**settings, **more, **versions}.items()}


def _tables(runs: list[Run]) -> list[TaskTable]:
    labels = labels_of([run.methods for run in runs])
    found: dict[tuple[str, str], list[Entry]] = {}
    for run, label in zip(runs, labels, strict=True):
        for task, metrics in run.summary["tasks"].items():
            if not metrics:
                continue  # a group without a number of its own
            metric, score = next(iter(metrics.items()))
            config = run.task_configs.get(task, {})
            same = json.dumps({k: config.get(k) for k in _OF_THE_TASK}, sort_keys=True, default=str)
            entry = Entry(run, task, label, metric, score, _costs(run, task), run.samples(task, metric))
            found.setdefault((task, same), []).append(entry)
    tables = []
    variants = Counter(task for task, _ in found)
    seen: Counter[str] = Counter()
    for (task, _), entries in found.items():
        seen[task] += 1
        dense = next((e for e in entries if e.method == DENSE), None)
        entries.sort(key=lambda e: (e is not dense, is_baseline(e.method), e.method, -_budget(e), -(e.kept or 0.0)))
        table = TaskTable(task, entries, dense, [])
        if variants[task] > 1:
            table.variant = f" (variant {seen[task]})"
            table.notes.append("The runs used different descriptions (data, prompt or generation) of this task.")
        _compare(table)
        tables.append(table)
    return tables


def _budget(entry: Entry) -> float:
    return next((m["retention_ratio"] for m in entry.run.methods if m.get("retention_ratio") is not None), 0.0)


def is_baseline(method: str) -> bool:
    return method in available() and method_class(method).baseline


def _costs(run: Run, task: str) -> dict[str, float]:
    costs = run.summary["costs"]
    by_task = costs.get("by_task") or {}
    # likelihood tasks carry no costs per sample; the overall means are the task's if it is the only one
    own = by_task.get(task) or (costs.get("overall") if len(run.summary["tasks"]) == 1 else None) or {}
    return {k: v for k, v in own.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def _compare(table: TaskTable) -> None:
    """Fill what is relative to the dense run, and the Pareto fronts."""
    dense = table.dense
    if dense is None:
        table.notes.append("No dense run with these settings: nothing is relative.")
    metrics = {e.metric for e in table.entries}
    if len(metrics) > 1:
        table.notes.append(f"The runs report different metrics: {', '.join(sorted(metrics))}.")
    for entry in table.entries:
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
    entry.speedup = _ratio(dense.work_ms, entry.work_ms)
    entry.paired = len(common)
    if len(common) != len(dense.samples) or len(common) != len(entry.samples):
        table.notes.append(
            f"{entry.label} and dense share {len(common)} documents ({len(entry.samples)} and {len(dense.samples)} "
            "answered); the interval is over the shared ones."
        )
    if not common:
        return
    entry.same = sum(a.answer == b.answer for a, b in zip(ours, theirs, strict=True)) / len(common)
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


def labels_of(settings: list[list[Mapping[str, Any]]]) -> list[str]:
    """A short name per setting: ``fastvid@0.25``; parameters or a number where that alone is ambiguous."""
    short = [_label(methods) for methods in settings]
    labels = []
    for methods, name in zip(settings, short, strict=True):
        rivals = [other for other, n in zip(settings, short, strict=True) if n == name and other != methods]
        flat = _flat(methods)
        differing = [key for key in flat if any(_flat(other).get(key) != flat[key] for other in rivals)]
        if differing:
            name += "(" + ",".join(f"{key}={flat[key]}" for key in differing) + ")"
        labels.append(name)
    seen: Counter[str] = Counter()
    for index, name in enumerate(labels):
        seen[name] += 1
        if seen[name] > 1:
            labels[index] = f"{name} #{seen[name]}"
    return labels


def _label(methods: list[Mapping[str, Any]]) -> str:
    if not methods:
        return DENSE
    if len(methods) == 1 and methods[0].get("retention_ratio") is not None:
        return f"{methods[0]['method']}@{methods[0]['retention_ratio']:g}"
    return "+".join(m["method"] for m in methods)


def _flat(methods: list[Mapping[str, Any]]) -> dict[str, Any]:
    prefix = len(methods) > 1
    return {
        f"{m['method']}.{key}" if prefix else key: value for m in methods for key, value in m.items() if key != "method"
    }


# -- efficiency --------------------------------------------------------------------------------------------------------


def bench_sections(benches: Iterable[Bench]) -> list[BenchSection]:
    """Efficiency files grouped by machine, model, input and software."""
    groups: dict[str, list[Bench]] = {}
    for bench in benches:
        groups.setdefault(json.dumps(_bench_facts(bench), sort_keys=True), []).append(bench)
    sections = []
    for number, (key, files) in enumerate(groups.items(), 1):
        section = BenchSection(f"Efficiency {number}" if len(groups) > 1 else "Efficiency", json.loads(key), [], files)
        for index, bench in enumerate(files, 1):
            section.rows += _bench_rows(bench, f" #{index}" if index > 1 else "", section.notes)
            section.notes += _beside_transformers(bench)
        sections.append(section)
    _warn(sections, "measurements")
    return sections


def _bench_facts(bench: Bench) -> dict[str, str]:
    content = bench.content
    facts = {k: content["model"].get(k) for k in ("shape", "weights", "dtype", "attention")}
    facts |= {f"input {k}": v for k, v in content["input"].items()}
    facts |= {k: v for k, v in content["machine"].items()}
    facts |= {f"version of {k}": v for k, v in content["versions"].items()}
    return {k: _plain(v) for k, v in facts.items()}


def _bench_rows(bench: Bench, suffix: str, notes: list[str]) -> list[BenchRow]:
    rows = [BenchRow(row["label"] + suffix, row.get("method") or DENSE, row) for row in bench.content["rows"]]
    dense = next((row for row in rows if row.method == DENSE and row.ok), None)
    if dense is None:
        notes.append(f"{bench.path.name} has no dense measurement: nothing in it is relative.")
        return rows
    for row in rows:
        if row.ok and row is not dense:
            row.speedup = _ratio(dense.work_ms, row.work_ms)
            row.first_token_speedup = _ratio(dense.median("first_token_ms"), row.median("first_token_ms"))
            row.overhead = _ratio(row.median("compress_ms"), dense.median("prefill_ms"))
    return rows


def _beside_transformers(bench: Bench) -> list[str]:
    """The bench's comparison of the dense model with the same model in transformers, if it made one."""
    other = bench.content.get("transformers") or {}
    times = {key: median(values) for key, values in (other.get("samples") or {}).items() if values}
    if not {"ours_prefill_ms", "native_prefill_ms"} <= times.keys():
        return []
    text = f"dense prefill {times['ours_prefill_ms']:.1f} ms, {other.get('class')} {times['native_prefill_ms']:.1f} ms"
    if {"ours_forward_ms", "native_forward_ms"} <= times.keys():
        text += f"; with the tower {times['ours_forward_ms']:.1f} and {times['native_forward_ms']:.1f} ms"
    return [
        f"Beside transformers (medians): {text}; largest difference of a logit {other.get('max_logit_difference')}."
    ]


def join(sections: list[Section], benches: list[BenchSection]) -> None:
    """Give each entry the bench's row of the same model, number of frames, method and parameters."""
    for section in sections:
        for bench in benches:
            if not _same_model(section, bench):
                continue
            for table in section.tables:
                for entry in table.entries:
                    entry.measured = entry.measured or next((r for r in bench.rows if _same_setting(entry, r)), None)


def _same_model(section: Section, bench: BenchSection) -> bool:
    weights, shape = bench.facts["weights"], bench.facts["shape"]
    words = set(re.split(r"[^a-z0-9.]+", section.model.rsplit("/", 1)[-1].lower()))
    named = set(re.split(r"[^a-z0-9.]+", shape.lower())) <= words
    frames = section.facts.get("max_frames_num")
    video = bench.facts.get("input kind") == "video"
    if video and frames is not None and frames != bench.facts.get("input frames"):
        return False
    same = section.model == weights or section.model.endswith(f"/{weights}")  # the bench may name a path from its root
    return same or (weights == "random" and named)


def _same_setting(entry: Entry, row: BenchRow) -> bool:
    """Same method and parameters; the bench may name only those that differ from the defaults."""
    if not row.ok or entry.method != row.method:
        return False
    if row.method == DENSE:
        return True
    try:
        full = resolve(row.method, **(row.content.get("params") or {})).to_dict()
    except MethodError:  # a method of another version
        return False
    return json.loads(json.dumps(full, default=str)) == entry.run.methods


# -- both --------------------------------------------------------------------------------------------------------------


def _warn(sections: list[Section] | list[BenchSection], what: str) -> None:
    """Say what sets each section apart from the first."""
    for section in sections[1:]:
        first = sections[0].facts
        keys = [k for k in {**first, **section.facts} if first.get(k) != section.facts.get(k)]
        differs = "; ".join(f"{k}: {first.get(k, 'unset')} / {section.facts.get(k, 'unset')}" for k in keys)
        for one, other in ((section, sections[0]), (sections[0], section)):
            one.warnings.append(f"Not comparable with the {what} of {other.name}. They differ in {differs}.")


def _plain(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value)


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b is not None and b > 0 else None


def _sum(*values: float | None) -> float | None:
    return None if None in values else sum(values)
