"""Side by side: the summaries of several runs as one table, as JSON and as Markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from accelerate_methods.bench.matching import solution
from lmms_eval_accelerate.report.loyalty import kl_text, loyalty
from lmms_eval_accelerate.report.results import DENSE, Run, Sample
from lmms_eval_accelerate.report.statistics import McNemar, mcnemar, p_text
from lmms_eval_accelerate.runs import files, no_op
from lmms_eval_accelerate.runs.long_prompts import LongPrompts, explained, marked, not_comparable


@dataclasses.dataclass
class TaskResult:
    """One setting on one task. Costs are means per sample over all ranks, without the warm-up calls.

    ``prefill_ms`` is the language model's prefill, ``compress_ms`` the method's own work before it; ``speedup``
    compares their sum with the dense run's, so a method has to pay for itself. ``tokens_after`` is the mean over the
    decoder layers, so that methods that drop tokens inside the language model are counted alike.

    ``same_answers``, ``first_token_kl`` (nats, mean per document) and ``top1_same`` compare with the dense run without
    a look at references (docs/loyalty.md); None where a run kept no samples or no distributions.

    ``p_value`` is that of McNemar's exact test against the dense run, where documents are right or wrong: ``lost`` were
    right there and are wrong here, ``won`` the other way round.

    ``kept_least``, ``kept_most`` are the smallest and the largest share of the visual tokens that an answer kept, mean
    over the layers; ``kept_by_layer`` the share that each layer worked on, mean over the answers. ``no_op`` says why
    the setting is the dense model in effect, None if it is not; ``matched`` what its budget was solved to.

    ``prompts_*`` count prompts longer than the model's context (:class:`.runs.long_prompts.LongPrompts`);
    ``not_comparable`` says why what is relative to the dense run means nothing, None if it does.
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
    same_answers: float | None = None
    first_token_kl: float | None = None
    top1_same: float | None = None
    p_value: float | None = None
    lost: int | None = None
    won: int | None = None
    kept_least: float | None = None
    kept_most: float | None = None
    kept_by_layer: list[float] | None = None
    no_op: str | None = None
    matched: dict[str, Any] | None = None
    prompts_cut: int = 0
    prompts_untrained: int = 0
    prompts_over_dense: int = 0
    not_comparable: str | None = None

    @property
    def long_prompts(self) -> LongPrompts:
        return LongPrompts(self.samples, self.prompts_cut, self.prompts_untrained, self.prompts_over_dense)

    @property
    def kept(self) -> float:
        """Share of the visual tokens that the language model worked on, mean over its layers."""
        return self.tokens_after / self.tokens_before if self.tokens_before else 1.0


def read(folders: Mapping[str, Path]) -> list[TaskResult]:
    """Rows from the ``summary.json`` and the samples files of every setting, in the order of the settings."""
    found: list[TaskResult] = []
    runs: dict[str, Run] = {}
    for setting, folder in folders.items():
        report = files.read_json(folder / files.SUMMARY)
        runs[setting] = Run(folder, report)
        for task, metrics in report["tasks"].items():
            costs = report["costs"]["by_task"].get(task)
            if metrics and costs:
                found.append(_row(setting, task, metrics, costs))
                found[-1].no_op = (report.get("no_op") or {}).get(task)
                found[-1].matched = (report.get("settings") or {}).get("matched")
    dense = {row.task: row for row in found if row.setting == DENSE}
    for row in found:
        base = dense.get(row.task)
        if base is not row:
            row.not_comparable = not_comparable(row.long_prompts, base and base.long_prompts)
        if base is not None and runs[row.setting].parameters != runs[DENSE].parameters:
            _share_of_dense(row, runs[row.setting], runs[DENSE])
        if base is not None:
            row.change = row.score - base.score
            row.speedup = (base.compress_ms + base.prefill_ms) / (row.compress_ms + row.prefill_ms)
    for task, base in dense.items():
        answers = runs[DENSE].samples(task, base.metric)
        for row in found:
            if row.task == task and row is not base:
                _relate(row, answers, runs[row.setting])
    return found


def _share_of_dense(row: TaskResult, run: Run, dense: Run) -> None:
    """Shares of a trained architecture at other run parameters: of what its dense run has, not of its own prompt."""
    work, whole = (r.summary["costs"]["by_task"][row.task] for r in (run, dense))
    row.tokens_before, row.flops_share = whole["visual_tokens_before"], work["llm_tflops"] / whole["llm_tflops"]
    row.kept_least = row.kept_most = row.kept_by_layer = None


def _relate(row: TaskResult, answers: Mapping[Any, Sample], run: Run) -> None:
    """Fill in what compares the answers of ``run`` with those of the dense run."""
    own = run.samples(row.task, row.metric)
    loyal = loyalty(answers, own)
    row.same_answers, row.first_token_kl = loyal.agreement, loyal.first_token_kl_mean
    row.top1_same = loyal.top1_agreement
    row.no_op = no_op.both(row.no_op, no_op.answers_as_dense(loyal, run.methods))
    paired = mcnemar([(answers[d].score, own[d].score) for d in answers if d in own])
    if isinstance(paired, McNemar):
        row.p_value, row.lost, row.won = paired.p_value, paired.lost, paired.won


def _row(setting: str, task: str, metrics: Mapping[str, float], costs: Mapping[str, Any]) -> TaskResult:
    metric, score = next(iter(metrics.items()))
    prompts = LongPrompts.of(costs)
    return TaskResult(
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
        kept_least=costs.get("kept_least"),
        kept_most=costs.get("kept_most"),
        kept_by_layer=costs.get("kept_by_layer"),
        prompts_cut=prompts.cut,
        prompts_untrained=prompts.untrained,
        prompts_over_dense=prompts.over_dense,
    )


_NARROW = {"accuracy": "acc.", "same answers": "same ans."}  # headers that are wider than their numbers
_LONG_HEADER = 15  # characters from which a header is left as it is
#: columns that are left out where no run has what they show
_OPTIONAL = {
    "too long": "too long: prompts longer than the model's context, whose end with the question was not read",
    "same answers": "same answers: as the dense run's",
    "KL": "KL: of the first token's distribution from the dense run's (docs/loyalty.md)",
}
#: columns whose numbers are relative to the dense run
_RELATIVE = ("vs dense", "same answers", "KL", "LLM FLOPs", "speed up")
_NOTE = (
    "means per sample; visual tokens: mean over the LLM's layers; "
    "speed up: LLM prefill of the dense run / (compression + prefill)"
)


def _cells(row: TaskResult) -> dict[str, str]:
    """What a row shows, by column. Fractions are shown in per cent, scores on another scale (MME) as they are."""
    scale = 100.0 if row.score <= 1.0 else 1.0
    relative = row.setting != DENSE
    cells = {
        "setting": no_op.marked(row.setting, row.no_op),
        "accuracy": f"{scale * row.score:.1f}",
        "too long": row.long_prompts.count,
        "vs dense": f"{scale * row.change:+.1f}" if relative and row.change is not None else "",
        "same answers": f"{row.same_answers:.0%}" if relative and row.same_answers is not None else "",
        "KL": kl_text(row.first_token_kl) if relative else "",
        "visual tokens": f"{row.tokens_after:.0f} ({row.kept:.0%})",
        "LLM FLOPs": f"{row.flops_share:.1%}",
        "compress ms": f"{row.compress_ms:.1f}",
        "prefill ms": f"{row.prefill_ms:.1f}",
        "speed up": f"{row.speedup:.2f}x" if relative and row.speedup is not None else "",
    }
    return cells | {name: marked(cells[name], row.not_comparable) for name in _RELATIVE}


def _grid(rows_of_task: list[TaskResult]) -> dict[str, list[str]]:
    """The columns of one task's table, top to bottom."""
    columns = _columns([_cells(row) for row in rows_of_task])
    return {name: column for name, column in columns.items() if name not in _OPTIONAL or any(column)}


def _realised(rows_of_task: list[TaskResult]) -> dict[str, list[str]]:
    """The columns of a second table: what each setting kept, where samples or layers differ; empty where none does."""
    uneven = [row for row in rows_of_task if row.kept_by_layer and _uneven(row)]
    cells = [
        {
            "share of visual tokens kept": row.setting,
            "mean": f"{row.kept:.1%}",
            "least of a sample": f"{row.kept_least:.1%}",
            "most of a sample": f"{row.kept_most:.1%}",
            "by layer": no_op.layers_text(row.kept_by_layer),
        }
        for row in uneven
    ]
    return _columns(cells)


def _paired(rows_of_task: list[TaskResult]) -> dict[str, list[str]]:
    """The columns of a third table: the documents on which a setting and dense differ; empty where they never do."""
    cells = [
        {
            "documents that differ": row.setting,
            "right in dense alone": str(row.lost),
            "right here alone": str(row.won),
            "McNemar's p": marked(p_text(row.p_value), row.not_comparable),
        }
        for row in rows_of_task
        if row.lost or row.won
    ]
    return _columns(cells)


def _uneven(row: TaskResult) -> bool:
    return len({f"{share:.1%}" for share in (row.kept_least, row.kept_most, *row.kept_by_layer)}) > 1


def _columns(cells: list[dict[str, str]]) -> dict[str, list[str]]:
    return {name: [here[name] for here in cells] for name in (cells[0] if cells else ())}


def _note(found: list[TaskResult]) -> str:
    shown = {name for here in _by_task(found).values() for name in _grid(here)}
    return "; ".join([_NOTE, *(text for name, text in _OPTIONAL.items() if name in shown)])


def _warnings(found: list[TaskResult]) -> list[str]:
    """What had no effect and what is not comparable, task by task; the runs' own warnings are in their summaries."""
    return [
        f"{task}: {line}"
        for task, here in _by_task(found).items()
        for line in (
            *no_op.explained({row.setting: row.no_op for row in here}),
            *explained({row.setting: row.not_comparable for row in here}),
        )
    ]


def closing(found: list[TaskResult]) -> str:
    """The last line: which settings are the dense model in effect; empty if none is."""
    claimed = {f"{row.setting} on {row.task}": row.no_op for row in found if row.setting != DENSE}
    return no_op.closing(claimed, len(claimed))


def _by_task(found: list[TaskResult]) -> dict[str, list[TaskResult]]:
    tasks: dict[str, list[TaskResult]] = {}
    for row in found:
        tasks.setdefault(row.task, []).append(row)
    return tasks


def _title(task: str, rows_of_task: list[TaskResult]) -> str:
    first = rows_of_task[0]
    return f"{task}: {first.metric}, n={first.samples}, {first.tokens_before:.0f} visual tokens"


def tables(found: list[TaskResult]) -> Group:
    """The comparison for the terminal, a table per task."""
    views: list[Table | str] = []
    for task, here in _by_task(found).items():
        views.append(_view(_grid(here), Text(_title(task, here))))
        views += [_view(more, None) for more in (_paired(here), _realised(here)) if more]
    return Group(*views, *(Text(f"warning: {line}") for line in _warnings(found)), Text(_note(found)))


def _view(grid: dict[str, list[str]], title: Text | None) -> Table:
    view = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    for index, header in enumerate(grid):
        # two short lines per header keep the table within 80 columns; long method names are folded
        wrap = {"no_wrap": True} if index else {"overflow": "fold"}
        header = _NARROW.get(header, header)
        header = header.replace(" ", "\n") if len(header) < _LONG_HEADER else header
        view.add_column(header, justify="right" if index else "left", **wrap)
    for row in zip(*grid.values(), strict=True):
        view.add_row(*map(Text, row))  # names are no markup
    return view


def markdown(found: list[TaskResult]) -> str:
    """The same as Markdown."""
    lines: list[str] = []
    for task, here in _by_task(found).items():
        lines += [f"**{_title(task, here)}**", ""]
        for grid in filter(None, (_grid(here), _paired(here), _realised(here))):
            lines += ["| " + " | ".join(grid) + " |", "|---|" + "---:|" * (len(grid) - 1)]
            for row in zip(*grid.values(), strict=True):
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
            lines.append("")
    solved = {row.setting: row.matched for row in found if row.matched}
    lines += [f"* {name}: budget solved for {each['target']}: {solution(each)}" for name, each in solved.items()]
    warnings = [f"**Warning.** {line}\n" for line in _warnings(found)]
    return "\n".join([*lines, *([""] if solved else []), *warnings, f"({_note(found)})", ""])


def write(found: list[TaskResult], folder: Path) -> None:
    """``comparison.json`` and ``comparison.md``."""
    content = [{**dataclasses.asdict(row), "kept": row.kept} for row in found]
    files.write_json(folder / files.COMPARISON, content)
    files.write_text(folder / files.COMPARISON_TEXT, markdown(found))


def cut_tasks(found: list[TaskResult]) -> dict[str, list[TaskResult]]:
    """Tasks on which every setting but the dense one dropped tokens (a video method leaves images alone)."""
    tasks = {t: [r for r in here if r.setting != DENSE] for t, here in _by_task(found).items()}
    return {t: _by_task(found)[t] for t, others in tasks.items() if others and all(r.kept < 1 for r in others)}
