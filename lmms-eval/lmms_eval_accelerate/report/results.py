"""Reading what runs left behind: folders of lmms-eval runs and JSON files of the efficiency bench."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate_methods.registry.architectures import architecture_named
from accelerate_methods.stages.errors import MethodError, one_line
from lmms_eval_accelerate.runs.files import CLAIM, FAILED, SUMMARY, read_json

DENSE = "dense"
SCHEMA = 1  # of efficiency files


class ReportError(MethodError):
    """Results that cannot be read."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One document's answer.

    Attributes:
        score: None where the task's metric is no number per document.
        first_token: the distribution that the first token was taken from (``loyalty.py``), if logged.
        losses: of the choices, where they are compared by their likelihoods.
    """

    doc_id: Any
    question: str
    target: str
    answer: str
    score: float | None
    first_token: str | None = None
    losses: tuple[float, ...] | None = None


@dataclasses.dataclass
class Run:
    """One finished run: a setting (dense, or methods with parameters) on one or more tasks."""

    folder: Path
    summary: dict[str, Any]

    @property
    def methods(self) -> list[dict[str, Any]]:
        """Each method with its parameters; empty for the dense model."""
        return self.summary.get("methods") or []

    @property
    def method(self) -> str:
        """Names of the methods; of a trained architecture without any, those of the run parameters that differ."""
        return "+".join(m["method"] for m in self.methods) or "+".join(self.parameters) or DENSE

    @property
    def parameters(self) -> dict[str, Any]:
        """Run parameters of a trained architecture that are not its defaults."""
        entry = architecture_named(str(self.settings.get("family")))
        given = {a: self.settings.get(a.name, a.default) for a in (() if entry is None else entry.arguments)}
        return {argument.name: value for argument, value in given.items() if value != argument.default}

    @property
    def settings(self) -> dict[str, Any]:
        return self.summary.get("settings") or {}

    @property
    def started(self) -> str | None:
        claim = self.folder / CLAIM
        return _mapping(claim).get("started") if claim.is_file() else None

    @cached_property
    def task_configs(self) -> dict[str, dict[str, Any]]:
        """The harness's own description of each task."""
        found = sorted(self.folder.rglob(f"{self.summary.get('date')}_results.json"))
        return _mapping(found[0]).get("configs", {}) if found else {}

    def samples(self, task: str, metric: str) -> dict[Any, Sample]:
        """Answers by document; empty if the run kept none."""
        found = sorted(self.folder.rglob(f"{self.summary.get('date')}_samples_{task}.jsonl"))
        samples: dict[Any, Sample] = {}
        for line in _lines(found[0]) if found else ():
            if line["doc_id"] not in samples:  # several ranks may repeat a document to have equally many
                samples[line["doc_id"]] = Sample(
                    doc_id=line["doc_id"],
                    question=_text(line.get("input", "")),
                    target=_text(line.get("target", "")),
                    answer=_answer(line.get("filtered_resps", "")),
                    score=_score(line.get(metric.partition(",")[0])),
                    first_token=_first_token(line.get("token_counts")),
                    losses=_losses(line.get("filtered_resps", "")),
                )
        return samples


@dataclasses.dataclass(frozen=True)
class Bench:
    """One efficiency file (``kind: efficiency``; the fields are explained in docs/report.md)."""

    path: Path
    content: dict[str, Any]


@dataclasses.dataclass
class Results:
    runs: list[Run] = dataclasses.field(default_factory=list)
    benches: list[Bench] = dataclasses.field(default_factory=list)
    #: what was found and is not part of the report, with the reason
    left_out: list[str] = dataclasses.field(default_factory=list)


def find(paths: Iterable[Path]) -> Results:
    """Everything below ``paths`` (folders, efficiency files, summary files).

    Raises:
        ReportError: a path that does not exist, is damaged, or holds nothing to report.
    """
    results, seen = Results(), set()
    for path in paths:
        if not path.exists():
            raise ReportError(f"{path} does not exist.")
        before = len(results.runs) + len(results.benches)
        for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
            if file.resolve() not in seen and _take(file, results, named=file is path):
                seen.add(file.resolve())
        if len(results.runs) + len(results.benches) == before and not (path.is_file() and path.resolve() in seen):
            missing = f" Found: {'; '.join(results.left_out)}." if results.left_out else ""
            raise ReportError(
                f"{path} holds no results: neither {SUMMARY} of a finished lmms-eval-accelerate run nor a JSON file "
                f'of the efficiency bench ("kind": "efficiency").{missing}'
            )
    return results


def _take(file: Path, results: Results, named: bool) -> bool:
    """Add what ``file`` is; False if it is something else. ``named``: the user named this very file."""
    folder = file.parent
    if file.name == SUMMARY:
        summary = _load(file)
        if not isinstance(summary, dict) or not {"tasks", "costs", "settings"} <= summary.keys():
            if named:
                raise ReportError(f"{file} is not the summary of an lmms-eval-accelerate run.")
            results.left_out.append(f"{file}: not the summary of an lmms-eval-accelerate run")
            return False
        if fault := _fault(summary):
            raise ReportError(f"cannot read {file}: {fault}.")
        if summary["tasks"] and not any(summary["tasks"].values()):
            results.left_out.append(f"{folder}: has answers and no scores (--predict_only)")
            return False
        results.runs.append(Run(folder, summary))
        return True
    if file.name == CLAIM and not (folder / SUMMARY).exists():
        results.left_out.append(f"{folder}: not finished (no {SUMMARY})")
    elif file.name == FAILED:
        results.left_out.append(f"{folder}: failed ({_mapping(file).get('reason', 'no reason given')})")
    elif not file.name.endswith("_results.json") and b'"efficiency"' in file.read_bytes()[:4096]:
        content = _load(file)
        if isinstance(content, dict) and content.get("kind") == "efficiency":
            if content.get("schema") != SCHEMA:
                raise ReportError(f"{file} has schema {content.get('schema')}; this report reads schema {SCHEMA}.")
            missing = {"machine", "versions", "model", "input", "rows"} - content.keys()
            if missing:
                raise ReportError(f"{file} is an efficiency file without {', '.join(sorted(missing))}.")
            from accelerate_methods.bench.results import fault_of  # -h has to be quick

            if fault := fault_of(content):
                raise ReportError(f"cannot read {file}: {fault}.")
            results.benches.append(Bench(file, content))
            return True
    return False


def _fault(summary: Mapping[str, Any]) -> str:
    """What in a summary is of another kind than a run writes; empty if nothing."""
    tasks, costs = summary["tasks"], summary["costs"]
    if not isinstance(tasks, dict) or not all(isinstance(metrics, dict) for metrics in tasks.values()):
        return "'tasks' is not a mapping from tasks to metrics"
    for task, metrics in tasks.items():
        for name, value in metrics.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                return f"metric {name} of {task} is no number"
    by_task = costs.get("by_task", {}) if isinstance(costs, dict) else None
    if not isinstance(by_task, dict) or not all(isinstance(means, dict) for means in by_task.values()):
        return "'costs' is not a mapping with means by task"
    if not isinstance(summary["settings"], dict):
        return "'settings' is not a mapping"
    methods = summary.get("methods") or []
    if not isinstance(methods, list) or not all(isinstance(m, dict) and "method" in m for m in methods):
        return "'methods' is not a list of methods"
    return ""


def _load(path: Path) -> Any:
    return read_json(path, ReportError)


def _mapping(path: Path) -> dict[str, Any]:
    """Empty where the file holds something else."""
    content = _load(path)
    return content if isinstance(content, dict) else {}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                content = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise ReportError(f"cannot read {path}, line {number}: {one_line(error)}") from error
            if not isinstance(content, dict) or not isinstance(content.get("doc_id"), (int, str)):
                raise ReportError(f"cannot read {path}, line {number}: it is no answer with a doc_id.")
            yield content


def _text(value: Any) -> str:
    """Text of an answer or reference; the harness wraps single ones in lists."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _answer(value: Any) -> str:
    """As :func:`_text`; for likelihoods the choice of the lowest loss."""
    losses = _losses(value)
    return _text(value) if losses is None else f"choice {losses.index(min(losses))}"


def _losses(value: Any) -> tuple[float, ...] | None:
    """Of likelihoods, (loss, is greedy) per choice; None for another answer."""
    try:
        losses = tuple(float(loss) for loss, greedy in value if str(greedy) in ("True", "False"))
    except (TypeError, ValueError):
        return None
    if not losses or len(losses) != len(value) or any(math.isnan(loss) for loss in losses):
        return None
    return losses


def _first_token(token_counts: Any) -> str | None:
    """Of the answer; a document with several requests (likelihoods) has none."""
    if not isinstance(token_counts, list) or len(token_counts) != 1 or not isinstance(token_counts[0], Mapping):
        return None
    return token_counts[0].get("first_token")


def _score(value: Any) -> float | None:
    """A document's score out of what tasks log: a number, {"score": x}, or {"pred_answer": a, "answer": b}."""
    if isinstance(value, Mapping):
        if "pred_answer" in value and "answer" in value:
            return float(value["pred_answer"] == value["answer"])
        value = value.get("score")
    return float(value) if isinstance(value, (int, float)) else None
