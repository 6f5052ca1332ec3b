"""The summary of a run: metrics, mean costs over the samples of all ranks, settings, versions."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmms_eval_accelerate.models.costs import summarise
from lmms_eval_accelerate.runs import no_op
from lmms_eval_accelerate.runs.answer_checks import check
from lmms_eval_accelerate.runs.fingerprint import checkpoint_facts, code_hash, short_hash, versions
from lmms_eval_accelerate.runs.folder import RunError
from lmms_eval_accelerate.runs.long_prompts import LongPrompts
from lmms_eval_accelerate.session import Session

#: the number that lmms-eval writes in the place of every score where answers were only asked for (--predict_only)
NO_SCORE = "bypass"
_SHOWN = 6  # tasks of which each gets a column
_ROWS = {
    "samples": "samples",
    "skipped": "skipped (unreadable)",
    "visual_tokens_before": "visual tokens before",
    "visual_tokens_after": "visual tokens after",
    "visual_tokens_per_layer": "visual tokens per LLM layer",
    "kept": "kept, mean over layers",
    "kept_least": "kept, least of a sample",
    "kept_most": "kept, most of a sample",
    "kept_by_layer": "kept, by layer",
    "prompt_tokens": "prompt tokens",
    "vision_ms": "vision ms",
    "compress_ms": "compress ms",
    "prefill_ms": "prefill ms",
    "decode_ms": "decode ms",
    "first_token_ms": "first token ms",
    "llm_tflops_dense": "LLM TFLOPs dense",
    "llm_tflops": "LLM TFLOPs",
    "architecture_tflops": "TFLOPs of the architecture's modules",
    "generated_tokens": "new tokens",
}
#: rows that are left out where they are 0 everywhere
_LONG_PROMPTS = {
    "prompts_cut": "prompts that lost their end",
    "prompts_untrained": "prompts beyond the training",
    "prompts_over_dense": "prompts too long when dense",
}


def check_scores(results: dict[str, Any]) -> None:
    """Every task must have at least one number, and none may be NaN.

    Raises:
        RunError: with the task.
    """
    groups = set(results.get("group_subtasks", {}))
    for task, values in results.get("results", {}).items():
        numbers = scores(values)
        if not numbers and not (task in groups and results["group_subtasks"][task]):
            raise RunError(f"task {task} has no score (found: {values}); for submission tasks add --allow_no_score.")
        bad = [name for name, number in numbers.items() if math.isnan(number)]
        if bad:
            raise RunError(f"task {task}: {', '.join(bad)} is NaN.")
    if not results.get("results"):
        raise RunError("no task has results.")


def scores(values: dict[str, Any]) -> dict[str, float]:
    """Metrics of one task without standard errors, bookkeeping and what stands for no score; ``exact_match,none``
    becomes ``exact_match``."""
    numbers = {}
    for key, value in values.items():
        name, _, kind = key.partition(",")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and kind and _is_metric(name):
            numbers[name if kind == "none" else key] = float(value)
    return numbers


def _is_metric(name: str) -> bool:
    return "stderr" not in name and name != NO_SCORE


def without_placeholders(results: dict[str, Any] | None) -> dict[str, Any] | None:
    """``results`` of lmms-eval without the 999 of tasks that were not scored."""
    if not results:
        return results
    tasks = {
        task: {key: value for key, value in values.items() if key.partition(",")[0].removesuffix("_stderr") != NO_SCORE}
        for task, values in results.get("results", {}).items()
    }
    return {**results, "results": tasks}


def build(
    results: dict[str, Any], samples: dict[str, list[dict]], options: argparse.Namespace, run: Session
) -> dict[str, Any]:
    """Everything about a run that can be said without git.

    Args:
        samples: those of all ranks.
        run: what the run's model said of itself.
    """
    settings = run.settings
    by_task = {task: _costs(entries) for task, entries in samples.items()}
    costs = {
        "overall": _overall(by_task, results),
        "by_task": {task: summarise(entries) for task, entries in by_task.items() if entries},
    }
    methods = settings.get("methods") or []
    tasks = {task: scores(values) for task, values in results["results"].items()}
    # likelihoods carry no costs per sample: what is known of the whole run is said of each task
    of_task = costs["by_task"] or dict.fromkeys((task for task in tasks if tasks[task]), costs["overall"])
    idle = {task: no_op.kept_everything(means, methods) for task, means in of_task.items()}
    return {
        "model": options.model,
        "method": settings.get("method"),
        "methods": settings.get("methods"),
        "method_hash": short_hash(settings["methods"]) if settings else None,
        "tasks": tasks,
        "n_samples": {task: len(entries) for task, entries in samples.items()},
        "costs": costs,
        "no_op": {task: reason for task, reason in idle.items() if reason},
        "settings": settings,
        "model_args": options.model_args,
        "gen_kwargs": results.get("config", {}).get("gen_kwargs"),
        "limit": results.get("config", {}).get("limit"),
        "date": results.get("date"),
        "task_info": _task_info(results),
        "checkpoint": {**run.checkpoint, **checkpoint_facts(settings.get("pretrained", ""))},
        "warnings": _warnings(samples, results.get("configs", {}), costs),
        "versions": versions(),
        "code": code_hash(),
        "kept_by_document": {task: _kept(entries) for task, entries in samples.items()},
    }


def _kept(entries: list[dict[str, Any]]) -> dict[str, float]:
    """Document -> realised ratio, the mean of its requests; without prompts of text alone."""
    found: dict[str, list[float]] = {}
    for entry in entries:
        for cost in entry.get("token_counts") or []:
            if cost and cost.get("kept") is not None:
                found.setdefault(str(entry.get("doc_id")), []).append(cost["kept"])
    return {document: round(sum(kept) / len(kept), 6) for document, kept in found.items()}


def show(report: dict[str, Any], path: Path) -> None:
    """Print metrics and costs."""
    console = Console(markup=False, emoji=False)
    table = Table(title=f"{report['model']}  {report['method'] or ''}", title_justify="left")
    table.add_column("task")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for task, metrics in report["tasks"].items():
        for name, value in metrics.items():
            table.add_row(task, name, f"{value:.4f}")
        if not metrics and task in report["n_samples"]:  # a group may have no number of its own
            table.add_row(task, "no score", "-")
    console.print(table)
    by_task = report["costs"]["by_task"]
    if len(by_task) > _SHOWN:  # the subtasks of a large group: a column each would show nothing
        by_task = {"all tasks": report["costs"]["overall"]}
    if by_task:
        costs = Table(title="means per sample, without warm-up, all ranks", title_justify="left")
        costs.add_column("")
        for task in by_task:
            costs.add_column(task, justify="right")
        long = {k: v for k, v in _LONG_PROMPTS.items() if any(means.get(k) for means in by_task.values())}
        for key, title in (_ROWS | long).items():
            costs.add_row(title, *(_cell(key, means.get(key)) for means in by_task.values()))
        console.print(costs)
    for warning in report["warnings"]:
        console.print(Text.assemble(("warning:", "bold yellow"), f" {warning}"), soft_wrap=True)
    idle = report.get("no_op") or {}
    for line in no_op.explained({f"{report['method']} on {task}": reason for task, reason in idle.items()}):
        console.print(Text.assemble(("warning:", "bold yellow"), f" {line}"), soft_wrap=True)
    console.print(f"written to {path}", soft_wrap=True)
    if ending := no_op.closing(idle, len(report["n_samples"])):
        console.print(ending, soft_wrap=True)


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key == "kept_by_layer":
        return no_op.layers_text(value)
    return f"{value:.1%}" if key.startswith("kept") else f"{value:.5g}"


def _warnings(samples: dict[str, list[dict]], configs: dict[str, Any], costs: dict[str, Any]) -> list[str]:
    found = [warning for task, entries in samples.items() for warning in check(task, entries, configs.get(task))]
    prompts = LongPrompts.of(costs["overall"])
    if prompts.harmed and not costs["by_task"]:  # likelihoods: known of the whole run only
        found.append(f"{prompts.described()}; the likelihood of a continuation that was lost counts as infinite.")
    return found


def _task_info(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The data that each task was run on; ``documents`` is the size of the whole split."""
    hashes, counts = results.get("task_hashes", {}), results.get("n-samples", {})
    info = {}
    for task, config in results.get("configs", {}).items():
        info[task] = {
            "dataset": config.get("dataset_path"),
            "config": config.get("dataset_name"),
            "split": config.get("test_split") or config.get("validation_split"),
            "documents": counts.get(task, {}).get("original"),
            "version": results.get("versions", {}).get(task),
            "hash": hashes.get(task),
        }
    return info


def _costs(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = (cost for entry in entries for cost in entry.get("token_counts") or [])
    return [cost for cost in found if cost and ("prompt_tokens" in cost or cost.get("skipped"))]


def _overall(by_task: dict[str, list[dict]], results: dict[str, Any]) -> dict[str, Any]:
    flat = [cost for entries in by_task.values() for cost in entries]
    if flat:
        return summarise(flat)
    # Likelihood requests have no place for costs in the samples; the model's own log has their means over all ranks.
    logged = results.get("throughput") or {}
    return {key.removeprefix("avg_"): value for key, value in logged.items() if key.startswith("avg_")}
