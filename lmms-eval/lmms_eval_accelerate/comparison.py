"""Side by side: the summaries of several runs as one table, as JSON and Markdown, and as a curve."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

DENSE = "dense"


@dataclasses.dataclass
class Row:
    """One setting on one task. Costs are means per sample over all ranks, without the warm-up calls.

    ``prefill_ms`` is the language model's prefill, ``compress_ms`` the method's own work before it; ``speedup``
    compares their sum with the dense run's, so a method has to pay for itself. ``tokens_after`` is the mean over the
    decoder layers, so that methods that drop tokens inside the language model are counted alike.
    """

    setting: str
    task: str
    metric: str
    score: float
    samples: int
    tokens_before: float
    tokens_after: float
    flops_share: float
    vision_ms: float
    compress_ms: float
    prefill_ms: float
    change: float | None = None
    speedup: float | None = None

    @property
    def kept(self) -> float:
        """Share of the visual tokens that the language model worked on, mean over its layers."""
        return self.tokens_after / self.tokens_before if self.tokens_before else 1.0


def read(folders: Mapping[str, Path]) -> list[Row]:
    """Rows from the ``summary.json`` of every setting, in the order of the settings."""
    found: list[Row] = []
    for setting, folder in folders.items():
        report = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        for task, metrics in report["tasks"].items():
            costs = report["costs"]["by_task"].get(task)
            if metrics and costs:
                found.append(_row(setting, task, metrics, costs))
    dense = {row.task: row for row in found if row.setting == DENSE}
    for row in found:
        base = dense.get(row.task)
        if base is not None:
            row.change = row.score - base.score
            row.speedup = (base.compress_ms + base.prefill_ms) / (row.compress_ms + row.prefill_ms)
    return found


def _row(setting: str, task: str, metrics: Mapping[str, float], costs: Mapping[str, Any]) -> Row:
    metric, score = next(iter(metrics.items()))
    return Row(
        setting=setting,
        task=task,
        metric=metric,
        score=score,
        samples=costs["samples"],
        tokens_before=costs["visual_tokens_before"],
        tokens_after=costs["visual_tokens_per_layer"],
        flops_share=costs["llm_tflops"] / costs["llm_tflops_dense"],
        vision_ms=costs["vision_ms"],
        compress_ms=costs["compress_ms"],
        prefill_ms=costs["prefill_ms"],
    )


_HEADERS = ("setting", "accuracy", "vs dense", "visual tokens", "LLM FLOPs", "compress ms", "prefill ms", "speed up")
_NOTE = (
    "means per sample; visual tokens: mean over the LLM's layers; "
    "speed up: LLM prefill of the dense run / (compression + prefill)"
)


def _cells(row: Row) -> tuple[str, ...]:
    # fractions are shown in per cent; tasks whose score is on another scale (MME) as they are
    scale = 100.0 if row.score <= 1.0 else 1.0
    return (
        row.setting,
        f"{scale * row.score:.1f}",
        "" if row.change is None or row.setting == DENSE else f"{scale * row.change:+.1f}",
        f"{row.tokens_after:.0f} ({row.kept:.0%})",
        f"{row.flops_share:.1%}",
        f"{row.compress_ms:.1f}",
        f"{row.prefill_ms:.1f}",
        "" if row.speedup is None or row.setting == DENSE else f"{row.speedup:.2f}x",
    )


def _by_task(found: list[Row]) -> dict[str, list[Row]]:
    tasks: dict[str, list[Row]] = {}
    for row in found:
        tasks.setdefault(row.task, []).append(row)
    return tasks


def _title(task: str, rows_of_task: list[Row]) -> str:
    first = rows_of_task[0]
    return f"{task}: {first.metric}, n={first.samples}, {first.tokens_before:.0f} visual tokens"


def tables(found: list[Row]) -> Group:
    """The comparison for the terminal, a table per task."""
    views: list[Table | str] = []
    for task, here in _by_task(found).items():
        view = Table(title=_title(task, here), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for index, header in enumerate(_HEADERS):
            # two short lines per header keep the table within 80 columns; long method names are folded
            wrap = {"no_wrap": True} if index else {"overflow": "fold"}
            view.add_column(header.replace(" ", "\n"), justify="right" if index else "left", **wrap)
        for row in here:
            view.add_row(*_cells(row))
        views.append(view)
    return Group(*views, _NOTE)


def markdown(found: list[Row]) -> str:
    """The same as Markdown."""
    lines: list[str] = []
    for task, here in _by_task(found).items():
        lines += [f"**{_title(task, here)}**", "", "| " + " | ".join(_HEADERS) + " |"]
        lines += ["|---|" + "---:|" * (len(_HEADERS) - 1)]
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in here]
        lines.append("")
    return "\n".join([*lines, f"({_NOTE})", ""])


def write(found: list[Row], folder: Path) -> None:
    """``comparison.json`` and ``comparison.md``."""
    content = [{**dataclasses.asdict(row), "kept": row.kept} for row in found]
    (folder / "comparison.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "comparison.md").write_text(markdown(found), encoding="utf-8")


def cut_tasks(found: list[Row]) -> dict[str, list[Row]]:
    """Tasks on which every setting but the dense one dropped tokens (a video method leaves images alone)."""
    tasks = {t: [r for r in here if r.setting != DENSE] for t, here in _by_task(found).items()}
    return {t: _by_task(found)[t] for t, others in tasks.items() if others and all(r.kept < 1 for r in others)}


def _method(row: Row) -> str:
    """The method of ``name``, ``name@ratio`` or ``name(parameters)``."""
    return re.split(r"[@(]", row.setting)[0]


def draw_curve(found: list[Row], path: Path) -> Path:
    """Accuracy against the share of visual tokens kept; a line per method, a panel per task of :func:`cut_tasks`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = cut_tasks(found)
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.8), squeeze=False)
    for axis, (task, here) in zip(axes[0], panels.items(), strict=True):
        for row in here:
            if row.setting == DENSE:
                axis.axhline(100 * row.score, color="0.5", linestyle="--", linewidth=1, label=DENSE)
        methods = dict.fromkeys(_method(row) for row in here if row.setting != DENSE)
        for method in methods:
            points = sorted((100 * r.kept, 100 * r.score) for r in here if _method(r) == method)
            # a line between points of one run each: no more is claimed
            axis.plot(*zip(*points, strict=True), marker="o", label=method)
        axis.set(title=task, xlabel="visual tokens kept (%)", ylabel="accuracy (%)")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
