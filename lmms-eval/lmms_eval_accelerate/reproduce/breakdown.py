"""Which number each document contributes to a benchmark's score, and how sure the difference of two runs is.

A score is taken apart only where the parts put together give the reported score again; where they do not (or where it
is made by rules that lie in the task, as with a judge or MMBench's groups of questions), there is no interval, with
the reason. Three shapes of score exist:

* ``mean``: factor x the mean over documents (most tasks);
* ``strata``: factor x the sum over groups of the mean of their members. MME: per category over the images, 100 x (share
  of the two questions right + both right). MLVU: 100 / 7 x the sum over task types. MVBench: mean over 20 tasks, MMStar
  over kinds of question;
* ``f1``: of POPE, from counts of true positives, false positives and false negatives.

Intervals resample members inside their group (documents, for MME the images with their two questions), the same for
both runs of a pair.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmms_eval_accelerate.benchmarks.catalog import Benchmark
from lmms_eval_accelerate.report.results import Run
from lmms_eval_accelerate.report.statistics import RESAMPLES, McNemar, bootstrap_interval, mcnemar

Document = tuple[str, Any]  # (task, document number)
MLVU_TYPES = 7


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """A score in the papers' unit, taken apart.

    Attributes:
        shape: "mean", "strata" or "f1".
        factor: see the module.
        strata: group -> member -> value; a single group for "mean". For "f1" the value is (true positive, false
            positive, false negative) of the document.
        per: what a member is, "document" or "image".
    """

    shape: str
    factor: float
    strata: dict[str, dict[Hashable, Any]]
    per: str = "document"

    @property
    def members(self) -> int:
        return sum(len(group) for group in self.strata.values())

    def score(self) -> float:
        """What the parts give together."""
        if self.shape == "f1":
            return self.factor * float(_f1(np.sum(list(self.strata[""].values()), axis=0)))
        return self.factor * sum(sum(group.values()) / len(group) for group in self.strata.values())


def read_lines(run: Run, tasks: Iterable[str]) -> dict[Document, dict[str, Any]]:
    """The samples of a run, by document. Several ranks may repeat a document to have equally many: the first counts."""
    lines: dict[Document, dict[str, Any]] = {}
    for task in tasks:
        for path in sorted(Path(run.folder).rglob(f"{run.summary.get('date')}_samples_{task}.jsonl"))[:1]:
            with path.open(encoding="utf-8") as file:
                for line in map(json.loads, file):
                    lines.setdefault((task, line["doc_id"]), line)
    return lines


def break_down(
    benchmark: Benchmark, metric: str, scale: float, lines: Mapping[Document, Mapping[str, Any]], score: float
) -> Breakdown | str:
    """The parts of ``score`` (in the papers' unit), or why there are none."""
    if benchmark.needs_judge:
        return "scored by a judge"
    if not lines:
        return "the run kept no samples"
    made = _made(benchmark, metric, scale, lines)
    if isinstance(made, str):
        return made
    if not math.isclose(made.score(), score, rel_tol=1e-4, abs_tol=1e-4 * max(scale, 1.0)):
        return f"{metric} is not what the documents' values make ({made.score():.4g}, reported {score:.4g})"
    return made


def _made(
    benchmark: Benchmark, metric: str, scale: float, lines: Mapping[Document, Mapping[str, Any]]
) -> Breakdown | str:
    if benchmark.name == "mme":
        return _mme(metric, scale, lines)
    if metric == "pope_f1_score":
        return _pope(scale, lines)
    key = metric.partition(",")[0]  # a filter's name stands in the results only
    values = {document: _value(line.get(key)) for document, line in lines.items() if line.get(key) is not None}
    if not values or None in values.values():
        return f"{metric} is no number per document"
    if metric == "mlvu_percetion_score":
        types = {document: lines[document][metric]["task_type"] for document in values}
        return Breakdown("strata", scale * 100 / MLVU_TYPES, _grouped(values, types))
    if benchmark.name == "mmstar":
        kinds = _grouped(values, {document: lines[document][key]["l2_category"] for document in values})
        return Breakdown("strata", scale / len(kinds), kinds)
    if benchmark.name == "ocrbench":  # right answers out of a thousand, however many there are
        return Breakdown("mean", scale * len(values) / 1000, {"": values})
    # fractions or per cent: MVBench and VideoMME report 100 x the mean
    factor = scale * (100 if metric in ("mvbench_accuracy", "videomme_perception_score") else 1)
    if benchmark.subtasks:
        return Breakdown("strata", factor / len(benchmark.subtasks), _grouped(values, {d: d[0] for d in values}))
    return Breakdown("mean", factor, {"": values})


def _value(entry: Any) -> float | None:
    """A document's value out of what the tasks log."""
    if isinstance(entry, Mapping):
        for answer, truth in (("pred_answer", "answer"), ("parsed_pred", "answer"), ("pred", "ground_truth")):
            if answer in entry and truth in entry:
                return float(str(entry[answer]) == str(entry[truth]))
        if {"pred", "answer"} <= entry.keys():  # SEED-Bench
            return float(str(entry["pred"]).lower().strip() == str(entry["answer"]).lower().strip())
        entry = entry.get("score")
    return float(entry) if isinstance(entry, (int, float)) else None


def _grouped(values: Mapping[Document, float], groups: Mapping[Document, str]) -> dict[str, dict[Hashable, float]]:
    strata: dict[str, dict[Hashable, float]] = {}
    for document, value in values.items():
        strata.setdefault(groups[document], {})[document] = value
    return strata


def _mme(metric: str, scale: float, lines: Mapping[Document, Mapping[str, Any]]) -> Breakdown | str:
    images: dict[tuple[str, str], list[float]] = {}
    for line in lines.values():
        for key in metric.split("+"):
            if line.get(key) is not None:
                entry = line[key]
                images.setdefault((entry["category"], entry["question_id"]), []).append(float(entry["score"]))
    if not images or any(len(scores) != 2 for scores in images.values()):
        return "MME needs both questions of every image"
    strata: dict[str, dict[Hashable, float]] = {}
    for (category, image), scores in images.items():
        strata.setdefault(category, {})[image] = 100 * (sum(scores) / 2 + (sum(scores) == 2))
    return Breakdown("strata", scale, strata, "image")


def _pope(scale: float, lines: Mapping[Document, Mapping[str, Any]]) -> Breakdown | str:
    counts: dict[Hashable, tuple[int, int, int]] = {}
    for document, line in lines.items():
        entry = line.get("pope_f1_score")
        if not isinstance(entry, Mapping):
            return "pope_f1_score is not logged per document"
        said, true = entry["prediction"] == "yes", entry["ground_truth"] == "yes"
        missed = true and entry["prediction"] == "no"  # neither yes nor no counts for nothing in lmms-eval
        counts[document] = (int(said and true), int(said and not true), int(missed))
    return Breakdown("f1", scale, {"": counts})


def _f1(counts: np.ndarray) -> np.ndarray:
    """[..., 3] true positives, false positives, false negatives -> [...]; 0 where nothing is positive."""
    positive = 2 * counts[..., 0] + counts[..., 1] + counts[..., 2]
    return np.where(positive > 0, 2 * counts[..., 0] / np.maximum(positive, 1), 0.0)


def standard_error(parts: Breakdown | str) -> float | None:
    """Of the score of one run, in the papers' unit; None where the score is no sum of means."""
    if isinstance(parts, str) or parts.shape == "f1":
        return None
    variances = [np.var(list(group.values())) / len(group) for group in parts.strata.values()]
    return float(parts.factor * math.sqrt(sum(variances)))


@dataclasses.dataclass(frozen=True)
class Interval:
    """95 % interval of (row - dense) in the papers' unit, over ``members`` pairs of ``per``s."""

    low: float
    high: float
    members: int
    per: str


def interval(row: Breakdown | str, dense: Breakdown | str, level: float = 0.95) -> Interval | str:
    """Paired bootstrap interval of the difference of two scores, or why there is none."""
    pairs = _paired(row, dense)
    if isinstance(pairs, str):
        return pairs
    if row.shape == "f1":
        low, high = _f1_interval([(dense.strata[""][m], row.strata[""][m]) for m in pairs[""]], level)
    else:
        differences = [[row.strata[g][m] - dense.strata[g][m] for m in members] for g, members in pairs.items()]
        low, high = bootstrap_interval(differences[0], level) if len(pairs) == 1 else _stratified(differences, level)
    return Interval(row.factor * low, row.factor * high, row.members, row.per)


def paired_test(row: Breakdown | str, dense: Breakdown | str) -> McNemar | str:
    """McNemar's test of documents right in one run and wrong in the other, or why there is none."""
    found = _paired(row, dense)
    if isinstance(found, str):
        return found
    if row.shape == "f1":
        return "an F1 score"
    values = [(dense.strata[g][m], row.strata[g][m]) for g, members in found.items() for m in members]
    return mcnemar(values)


def _paired(row: Breakdown | str, dense: Breakdown | str) -> dict[str, list[Hashable]] | str:
    """The members that both scores have, by group, or why they cannot be paired."""
    for side in (dense, row):
        if isinstance(side, str):
            return side
    pairs = {g: [m for m in members if m in row.strata.get(g, ())] for g, members in dense.strata.items()}
    complete = row.members == dense.members == sum(map(len, pairs.values()))
    if row.shape != dense.shape or row.factor != dense.factor or not complete:
        return "the two runs did not answer the same documents"
    return pairs


def _stratified(differences: Sequence[Sequence[float]], level: float) -> tuple[float, float]:
    """Interval of the sum over groups of the mean difference, members resampled inside their groups."""
    generator = np.random.default_rng(0)
    sums = np.zeros(RESAMPLES)
    for group in differences:
        values, counts = np.unique(np.asarray(group, dtype=float), return_counts=True)
        total = int(counts.sum())
        sums += generator.multinomial(total, counts / total, size=RESAMPLES) @ values / total
    return _quantiles(sums, level)


def _f1_interval(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], level: float) -> tuple[float, float]:
    """Interval of the difference of two F1 scores over the same documents; those that count alike are drawn as one."""
    kinds, counts = np.unique(np.asarray(pairs).reshape(len(pairs), 6), axis=0, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(pairs), counts / len(pairs), size=RESAMPLES) @ kinds
    return _quantiles(_f1(drawn[:, 3:]) - _f1(drawn[:, :3]), level)


def _quantiles(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
