"""What the report is made of: sections of runs that may be compared, their tables, entries and bench rows."""

from __future__ import annotations

import dataclasses
import json
from statistics import median
from typing import Any

from lmms_eval_accelerate.report.loyalty import Loyalty
from lmms_eval_accelerate.report.results import DENSE, Bench, Run, Sample
from lmms_eval_accelerate.runs.long_prompts import LongPrompts


@dataclasses.dataclass
class Entry:
    """One setting on one task. Costs are means per sample without warm-up; None where they were not measured.

    Attributes:
        score: the task's first metric, on its own scale; change, low, high: its difference to the dense run, with the
            95 % interval over the documents that both answered.
        paired: number of those documents.
        loyalty: agreement with the dense run over those documents, without a look at their references.
        speedup: (compression + prefill) of the dense run / that of this one.
        front: for each of :data:`AXES` whether the entry is on the Pareto front.
        measured: the row of the efficiency bench for this model and setting, if one was given.
        not_comparable: why what is relative to the dense run means nothing (prompts longer than the context), or None.
        p_value, lost, won: McNemar's test against the dense run, where documents are right or wrong.
        no_op: why the setting is the dense model in effect, or None.
        kept_by_layer: share of the visual tokens that each LLM layer worked on.
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
    loyalty: Loyalty | None = None
    speedup: float | None = None
    front: dict[str, bool] = dataclasses.field(default_factory=dict)
    measured: BenchRow | None = None
    not_comparable: str | None = None
    p_value: float | None = None
    lost: int | None = None
    won: int | None = None
    no_op: str | None = None
    kept_by_layer: list[float] | None = None

    @property
    def long_prompts(self) -> LongPrompts:
        return LongPrompts.of({"samples": self.documents, **self.costs})

    @property
    def method(self) -> str:
        return self.run.method

    @property
    def same(self) -> float | None:
        """Share of the paired documents with the dense run's answer."""
        return self.loyalty and self.loyalty.agreement

    @property
    def documents(self) -> int:
        return int(self.run.summary.get("n_samples", {}).get(self.task) or len(self.samples))

    @property
    def work_ms(self) -> float | None:
        """What a method has to beat: its own work and the prefill after it."""
        return _sum(self.costs.get("compress_ms"), self.costs.get("prefill_ms"))

    @property
    def flops_share(self) -> float | None:
        return ratio(self.costs.get("llm_tflops"), self.costs.get("llm_tflops_dense"))

    @property
    def kept(self) -> float | None:
        return ratio(self.costs.get("visual_tokens_per_layer"), self.costs.get("visual_tokens_before"))

    @property
    def decode_ms(self) -> float | None:
        """Per token after the first (which comes from prefill)."""
        return ratio(self.costs.get("decode_ms"), self.costs.get("generated_tokens", 0.0) - 1.0)

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
    not_comparable: str | None = None

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


def warn_apart(sections: list[Section] | list[BenchSection], what: str) -> None:
    """Say what sets each section apart from the first."""
    for section in sections[1:]:
        first = sections[0].facts
        keys = [k for k in {**first, **section.facts} if first.get(k) != section.facts.get(k)]
        differs = "; ".join(f"{k}: {first.get(k, 'unset')} / {section.facts.get(k, 'unset')}" for k in keys)
        for here, other in ((section, sections[0]), (sections[0], section)):
            here.warnings.append(f"Not comparable with the {what} of {other.name}. They differ in {differs}.")


def plain(value: Any) -> str:
    """A setting as it is compared and shown: text as it is, all else as JSON (10.0 as 10)."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value)


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b where both are known and b is above 0."""
    return a / b if a is not None and b is not None and b > 0 else None


def _sum(*values: float | None) -> float | None:
    return None if None in values else sum(values)
