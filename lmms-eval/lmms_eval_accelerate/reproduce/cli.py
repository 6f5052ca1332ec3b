"""The command ``reproduce``: from arguments over a table's runs to its outcome."""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from accelerate_methods.stages.errors import MethodError
from lmms_eval_accelerate import embedded
from lmms_eval_accelerate.benchmarks.catalog import Benchmark, require_judge
from lmms_eval_accelerate.benchmarks.check import require
from lmms_eval_accelerate.model_args import absolute, pairs
from lmms_eval_accelerate.reproduce import folders, guards, leaderboard, outcome, render
from lmms_eval_accelerate.reproduce.choice import EMBEDDED, Choices, ChosenPart, select
from lmms_eval_accelerate.reproduce.options import own_and_extra, parser
from lmms_eval_accelerate.reproduce.plan import Unit, hub_commits, plan
from lmms_eval_accelerate.reproduce.tables import available, load
from lmms_eval_accelerate.runs.command_line import own_options
from lmms_eval_accelerate.runs.files import ANSWERS, LAUNCH, OUTCOME, OUTCOME_TEXT, PLAN, RUNS, write_json, write_text
from lmms_eval_accelerate.runs.fingerprint import code_hash, short_hash, versions
from lmms_eval_accelerate.runs.folder import RunError
from lmms_eval_accelerate.runs.launch import LaunchError, Machines
from lmms_eval_accelerate.runs.options import machines_of, on_long_prompt
from lmms_eval_accelerate.runs.request import Run
from lmms_eval_accelerate.runs.runner import Runner

OUTPUTS = Path("outputs") / "reproduce"
FILE_WIDTH = 120  # where the output is no terminal
EMBEDDED_TABLE = "embedded"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 1 a run or its evaluation failed, 2 it could not start."""
    argv = list(sys.argv[1:] if argv is None else argv)
    console = Console(markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=FILE_WIDTH, markup=False, emoji=False)
    try:
        if argv[:1] == ["leaderboard"]:
            return leaderboard.main(argv[1:], console)
        return _reproduce(argv, console)
    except MethodError as error:
        _error(error, Console(stderr=True, markup=False, emoji=False))
        return 2
    except LaunchError as error:
        _error(error, console)
        if error.tail:
            console.print("\n".join(error.tail), highlight=False, soft_wrap=True)
        console.print("What is done is kept: start the same command again to go on.")
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; start the same command again to go on.")
        return 130


def _reproduce(argv: list[str], console: Console) -> int:
    given, extra = own_and_extra(argv)
    args = parser().parse_args(given)
    if args.list or args.table is None:
        _list(args.table, console)
        return 0 if args.list else 2
    table = load(args.table)
    choices = Choices(
        table=table.name,
        part=args.part,
        rows=tuple(args.rows or ()),
        columns=tuple(args.columns or ()),
        limit=args.limit,
        pretrained=args.pretrained if table.name != EMBEDDED_TABLE or args.pretrained != EMBEDDED else None,
        model_args=pairs(args.model_args) | on_long_prompt(args),
        batch_size=args.batch_size,
        data=args.data.expanduser().resolve() if args.data else None,
        extra=tuple(absolute(word) for word in extra),
        match=args.match,
    )
    selections = select(table, choices)
    columns = _columns(selections)
    _require_judges(columns)
    machines = _machines(args, choices, selections)
    output = (args.output or _default_output(choices, machines)).expanduser().resolve()
    units = plan(selections, choices, machines, output)
    runner = Runner(machines, output / LAUNCH, choices.data, console)
    if args.dry_run:
        if choices.data is not None and (missing := _missing(columns, choices.data)):
            print(f"# warning: {missing}")
        _print_plan(units, runner, output)
        return 0
    if choices.data is not None and (missing := _missing(columns, choices.data)):
        raise MethodError(missing)
    _check_start(units)
    for warning in dict.fromkeys(w for b in columns.values() for w in guards.limit(b, choices.limit)):
        _warn(warning, console)
    with folders.locked(output, machines.machine_rank, lambda text: _warn(text, console)):
        _run(units, runner, choices, output)
        if not runner.evaluates:
            console.print(f"done; the machine of rank 0 evaluates the results in {output}", soft_wrap=True)
            return 0
        try:
            made = outcome.evaluate(table, selections, choices, _about(argv, machines, units))
        except MethodError as error:
            _error(error, console)
            console.print(f"The runs are done and kept in {output}; they could not be evaluated.", soft_wrap=True)
            return 1
        write_json(output / OUTCOME, made)
        write_text(output / OUTCOME_TEXT, render.markdown(made))
    render.show(made, console)
    console.print(f"everything is in {output} ({OUTCOME}, {OUTCOME_TEXT}, {RUNS}/)", highlight=False, soft_wrap=True)
    if ending := render.closing(made):
        console.print(ending, highlight=False, soft_wrap=True)
    return 0


def _check_start(units: Sequence[Unit]) -> None:
    """Refuse what every run would: all have the same arguments behind ``--``."""
    try:
        for unit in units[:1]:
            own_options(list(unit.argv))
    except RunError as error:
        raise MethodError(str(error)) from error


def _warn(text: str, console: Console) -> None:
    console.print(Text.assemble(("warning:", "yellow"), f" {text}"), soft_wrap=True)


def _error(error: Exception, console: Console) -> None:
    console.print(Text.assemble(("error:", "bold red"), f" {error}"), soft_wrap=True)


def _missing(columns: Mapping[str, Benchmark], data: Path) -> str:
    """What the data folder lacks for these columns; empty if nothing."""
    try:
        require(dict.fromkeys(columns.values()), data)
    except MethodError as error:
        return str(error)
    return ""


def _run(units: list[Unit], runner: Runner, choices: Choices, output: Path) -> None:
    done = {unit.folder for unit in units if folders.is_done(unit)}
    count = f"{len(units)} runs of table {choices.table}, {len(done)} of them there already"
    runner.console.print(f"{count}; {output}", highlight=False, soft_wrap=True)
    by_folder = {unit.folder: unit for unit in units}

    def note(run: Run) -> None:
        folders.note(by_folder[run.output])

    runner.run([unit.run() for unit in units], lambda run: run.output in done, note)


def _print_plan(units: list[Unit], runner: Runner, output: Path) -> None:
    """What would be run: a command per unit that does it alone, and the one command that does them all."""
    done = {unit.folder for unit in units if folders.is_done(unit)}
    print(f"# {len(units)} runs, {len(done)} of them there already; output {output}")
    for number, unit in enumerate(units, 1):
        begun = (unit.folder / ANSWERS).is_dir()
        state = "there already, is used" if unit.folder in done else "begun, is continued" if begun else "is run"
        print(f"\n# {number}. {unit.part}: {unit.name} ({state})\n{runner.command(unit.run())}")
    print(f"\n# what is started for all of them, with one loading of the weights ({LAUNCH}/{PLAN} is written then):")
    print(runner.command_of_all())


def _columns(selections: Sequence[ChosenPart]) -> dict[str, Benchmark]:
    """What will be measured: column title -> benchmark."""
    runnable = [selection for selection in selections if not selection.part.not_run]
    return {column.title: column.benchmark for selection in runnable for column in selection.columns}


def _require_judges(columns: Mapping[str, Benchmark]) -> None:
    """Refuse columns that nobody could score, before anything is run."""
    for benchmark in columns.values():
        try:
            require_judge(benchmark, os.environ)
        except MethodError as error:
            free = " ".join(shlex.quote(title) for title, other in columns.items() if not other.needs_judge)
            hint = f" Without a judge: --columns {free}" if free else ""
            raise MethodError(f"{error}{hint}") from None


def _about(argv: list[str], machines: Machines, units: list[Unit]) -> dict[str, Any]:
    import torch

    from accelerate_methods.bench.results import machine

    command = shlex.join(["python", "-m", "lmms_eval_accelerate.reproduce", *argv])
    return {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": outcome.portable(command),
        "machine": machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "processes": machines.processes,
        "machines": machines.machines,
        "gpus_per_model": machines.gpus_per_model,
        "versions": versions(),
        "code": code_hash(),
        "hub": hub_commits(units),
        "runs": [
            {
                "name": u.name,
                "hash": u.hash,
                "folder": outcome.short_folder(u),
                "command": outcome.portable(shlex.join(u.argv)),
            }
            for u in units
        ],
    }


def _machines(args: argparse.Namespace, choices: Choices, selections: Sequence[ChosenPart]) -> Machines:
    own = choices.pretrained or next(s.part.model["pretrained"] for s in selections if not s.part.not_run)
    tiny = own == EMBEDDED or Path(own).expanduser().resolve() == embedded.MODEL.resolve()
    return machines_of(args, tiny)


def _default_output(choices: Choices, machines: Machines) -> Path:
    """The same for the same command, so that it goes on by itself; the same on every machine."""
    counts = [machines.processes, machines.machines, machines.gpus_per_model]
    return OUTPUTS / f"{choices.table}_{short_hash([choices.to_dict(), counts])}"


def _list(name: str | None, console: Console) -> None:
    """The tables, or the parts, rows and columns of one."""
    if name is None:
        for each in available():
            console.print(f"{each:24} {load(each).title}", highlight=False, soft_wrap=True)
        return
    table = load(name)
    console.print(f"{table.title} ({table.paper})", markup=False, highlight=False, soft_wrap=True)
    for part in table.parts:
        reason = f" (not run: {part.not_run})" if part.not_run else ""
        console.print(f"--part {shlex.quote(part.name)}{reason}", markup=False, highlight=False, soft_wrap=True)
        for row in part.rows:
            reason = f"  (not run: {row.not_run})" if row.not_run and not part.not_run else ""
            console.print(f"    row    {row.name}{reason}", markup=False, highlight=False, soft_wrap=True)
        for column in part.columns:
            about = f"{column.benchmark.task}, {column.metric}"
            console.print(f"    column {column.title}  ({about})", markup=False, highlight=False, soft_wrap=True)
