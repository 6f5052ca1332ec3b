"""Warnings that name the known traps: a wrong data set, model or prompt, broken answers, a drifting dense baseline.

Every guard is a pure function of what a run left in its ``summary.json`` and returns its warnings, none if all is well.
Refusals (a judge without a key, the response cache) come before anything is run, see ``plan.py`` and ``cli.py``.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval_accelerate.benchmarks.catalog import Benchmark
from lmms_eval_accelerate.reproduce.schema import Column
from lmms_eval_accelerate.runs.long_prompts import MARK, LongPrompts

#: what the documents' number does not explain must be below this, in per cent of the full scale
MARGIN = 1.0
#: slowest to fastest encoding of the same input above which times say more about the machine than about methods
UNEVEN = 1.5
CAUSES = (
    "another split or version of the data",
    "the prompt of another model name (prompt_model)",
    "the number or choice of frames",
    "the conversation template",
    "half precision (dtype) or another attention backend",
    "another checkpoint than the paper's, or another resolution of it",
    "newer versions of the harness, transformers or the video decoder",
)
_DRIFT = "Known case: a stock LLaVA-OneVision-7B scores 63.9 on VideoMME today, 58.2 was published."
#: pattern of a checkpoint's name -> family; the first that fits counts
_FAMILY_NAMES = (
    *(("onevision", "llava_onevision"), (r"-ov\b", "llava_onevision"), ("llava-video", "llava_video")),
    *(("llava-next-video", "llava_video"), (r"llava-(v1\.[56]|1\.5)", "llava")),
)
#: part of a checkpoint's name -> beginnings of conversation templates that fit its language model
_TEMPLATE_NAMES = (
    *(("qwen", ("qwen",)), ("vicuna", ("vicuna", "llava_v1", "v1")), ("llava-v1.5", ("vicuna", "llava_v1", "v1"))),
    *(("mistral", ("mistral",)), ("llama3", ("llava_llama_3",)), ("llama-3", ("llava_llama_3",))),
)


_INFO = {"data set": "dataset", "configuration": "config", "split": "split"}


@dataclasses.dataclass(frozen=True)
class Baseline:
    """The dense row in one column: scores in the papers' unit, documents, standard error of the score if known."""

    column: Column
    measured: float
    published: float
    documents: int
    standard_error: float | None = None

    @property
    def percent(self) -> bool:
        return self.column.unit == "%"

    @property
    def explained(self) -> float:
        """What chance (two standard errors) and rounding (one point; where the unit is no
        per cent: 1 % of the published score) explain.

        Without a standard error it is that of a share of right answers.
        """
        error = self.standard_error
        if error is None:
            share = min(max(self.measured / 100 if self.percent else 0.5, 0.0), 1.0)
            whole = 100 if self.percent else self.published
            error = whole * math.sqrt(share * (1 - share) / max(self.documents, 1))
        return 2 * error + MARGIN * (1.0 if self.percent else self.published / 100)


def dense_baseline(part: str, baselines: Sequence[Baseline]) -> list[str]:
    """Columns in which the dense model's score is far from the published one: the rows are then relative to another
    model than the paper's."""
    off = [b for b in baselines if abs(b.measured - b.published) > b.explained]
    if not off:
        return []
    which = "; ".join(
        f"{b.column.title} {b.measured:.1f}, published {b.published:.1f} ({b.measured - b.published:+.1f}; chance and "
        f"rounding explain {b.explained:.1f})"
        for b in off
    )
    known = f" {_DRIFT}" if any(b.column.benchmark.name == "videomme" for b in off) else ""
    return [
        f"{part}: the dense baseline is not the published one: {which}. Compare with the measured dense row alone. "
        f"Likely causes: {'; '.join(CAUSES)}.{known}"
    ]


def data(row: str, column: str, benchmark: Benchmark, summary: Mapping[str, Any], limit: int | None) -> list[str]:
    """Another data set, configuration, split or number of documents than the benchmark's."""
    told = summary.get("task_info") or {}
    infos = {part.task: told[part.task] for part in benchmark.parts if part.task in told}
    hint = " (MLVU has a dev and a test set)" if benchmark.name == "mlvu_dev" else ""
    found = []
    for part in benchmark.parts:
        wanted = {"data set": benchmark.dataset, "configuration": part.config, "split": benchmark.split}
        if benchmark.embedded:
            wanted = {"split": benchmark.split}
        for name, value in wanted.items():
            run = infos.get(part.task, {}).get(_INFO[name])
            if None not in (run, value) and run != value:
                found.append(f"{column}: {name} {run} was run, {benchmark.title} is {value}{hint}.")
    sizes = [info.get("documents") for info in infos.values()]
    if infos and None not in sizes and benchmark.documents not in (None, sum(sizes)):
        found.append(
            f"{column}: the data has {sum(sizes)} documents, the published {benchmark.title} ({benchmark.split}) has "
            f"{benchmark.documents}: another split or version, or a made-up or cut set."
        )
    answered = summary.get("n_samples") or {}
    for task, info in infos.items():
        size, got = info.get("documents"), answered.get(task)
        if limit is None and None not in (size, got) and size != got:
            found.append(f"{row} on {column}: {got} of {size} documents of {task} were answered.")
    return found


def family_of(name: str) -> str | None:
    """The family that a checkpoint's name clearly says; None: it says none."""
    plain = name.lower().replace("_", "-")
    return next((family for pattern, family in _FAMILY_NAMES if re.search(pattern, plain)), None)


def model(part: str, family: str | None, checkpoint: Mapping[str, int], summary: Mapping[str, Any]) -> list[str]:
    """Another model than the part's: its size, or a name that belongs to another family or language model.

    Args:
        checkpoint: fields that the paper's checkpoint has; empty if another one was chosen on purpose.
    """
    facts, settings = summary.get("checkpoint") or {}, summary.get("settings") or {}
    found = []
    for key, wanted in checkpoint.items():
        if facts.get(key) not in (None, wanted):
            found.append(f"{part}: wrong model: the checkpoint has {key} {facts[key]}, the paper's has {wanted}.")
    name = str(settings.get("pretrained") or "").lower().replace("_", "-")
    belongs = family_of(name)
    if belongs is not None and family is not None and belongs != family:
        found.append(
            f"{part}: {settings['pretrained']} looks like a {belongs} model but was run as {family}: frames, pooling "
            "and prompts are not its own."
        )
    template = str(settings.get("conv_template") or "")
    fitting = next((starts for word, starts in _TEMPLATE_NAMES if word in name), None)
    if fitting is not None and template and not template.startswith(fitting):
        found.append(
            f"{part}: conv_template {template} does not fit {settings['pretrained']} (it begins with "
            f"{' or '.join(fitting)})."
        )
    given = str(settings.get("model_name") or "").lower()
    words = [word for word, _ in _TEMPLATE_NAMES if word in name]
    if given and words and not any(word in given for word in words):
        found.append(
            f"{part}: model_name {settings['model_name']} lacks '{words[0]}', from which loaders tell the class of "
            f"{settings['pretrained']}."
        )
    return found


def answers(where: str, summary: Mapping[str, Any]) -> list[str]:
    """What the run itself found in its answers: one token repeated, many empty ones, documents it could not read."""
    return [f"{where}: {warning}" for warning in summary.get("warnings") or []]


def long_prompts(where: str, dense: LongPrompts) -> list[str]:
    """The dense run's prompts were longer than the model's context: no row of the column has a baseline."""
    if not dense.harmed:
        return []
    return [
        f"{where}: the dense row is no baseline: {dense.described()}, the question with it. What is relative to it is "
        f"marked {MARK} and not comparable; give fewer frames or a model with a longer context."
    ]


def adaptations(row: str, summary: Mapping[str, Any]) -> list[str]:
    """The method read something else on this model than in its authors' work."""
    told = (summary.get("settings") or {}).get("adaptations") or {}
    return [f"{row} is an adaptation, not the authors' work: {given} in place of {n}." for n, given in told.items()]


def times(column: str, vision_ms: Mapping[str, float]) -> list[str]:
    """Encoding is the same work for every row that changes nothing before the LLM; if its time differs, all times do.

    Args:
        vision_ms: row -> time of the encoder per document, of the rows whose methods leave the encoder alone.
    """
    there = {row: value for row, value in vision_ms.items() if value}
    if len(there) < 2 or max(there.values()) <= UNEVEN * min(there.values()):
        return []
    slow, fast = max(there, key=there.get), min(there, key=there.get)
    return [
        f"times on {column} are not comparable: encoding, the same work in all rows, took {there[fast]:.1f} ms with "
        f"{fast} and {there[slow]:.1f} ms with {slow}; the machine was not equally free."
    ]


def limit(benchmark: Benchmark, number: int | None) -> list[str]:
    """Before a run: a number of documents that the benchmark's scoring may refuse."""
    if benchmark.name != "mme" or number is None:
        return []
    return ["MME's questions come in pairs; if --limit cuts one, its scoring ends with an error after the answers."]
