"""The command ``compare``: from arguments over runs to a table and pictures."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from accelerate_methods.bench.matching import Target
from accelerate_methods.registry.configs import read_config
from accelerate_methods.registry.settings import Setting, has_budget, settings_of
from accelerate_methods.stages.errors import MethodError, one_line
from lmms_eval_accelerate import embedded
from lmms_eval_accelerate.compare import checks, matched, pictures, table
from lmms_eval_accelerate.compare.comparison import Comparison, Wanted, comparison_of
from lmms_eval_accelerate.compare.options import parser
from lmms_eval_accelerate.manifest import TRAINED
from lmms_eval_accelerate.model_args import pairs
from lmms_eval_accelerate.runs.command_line import own_options
from lmms_eval_accelerate.runs.folder import RunError
from lmms_eval_accelerate.runs.launch import LaunchError
from lmms_eval_accelerate.runs.options import machines_of, on_long_prompt
from lmms_eval_accelerate.runs.request import Run
from lmms_eval_accelerate.runs.runner import Runner

EMBEDDED_METHODS = "dense {method}@0.25 {method} {method}@0.05 random@0.25 random@0.1"
EMBEDDED_METHODS_FIXED = "dense {method} random@0.25 random@0.1"  # a method whose budget follows from its parameters


def main(argv: list[str] | None = None) -> None:
    """The command; a failure ends it with the reason and exit code 2 (nothing was started) or 1, Ctrl-C with 130."""
    args = parser().parse_args(argv)
    code, go_on = 2, "nothing was started"
    try:
        comparison, settings, runner, runs, plan = _planned(args, Console(markup=False, emoji=False))
        if args.dry_run:
            return
        comparison.take_output(plan, runner.machines.machine_rank)
        code = 1
        go_on = f"to go on where it stopped: the same command with --output {shlex.quote(str(comparison.output))}"
        _compare(args, comparison, settings, runner, runs)
    except LaunchError as error:
        stop = _stopped(error, 1)
        print(*error.tail, sep="\n", end="\n" if error.tail else "", file=sys.stderr)
        raise stop from error
    except MethodError as error:
        raise _stopped(error, code) from error
    except OSError as error:
        raise _stopped(MethodError(f"cannot write {args.output or 'the results'}: {one_line(error)}"), code) from error
    except KeyboardInterrupt:
        print(f"interrupted; {go_on}", file=sys.stderr)
        raise SystemExit(130) from None


def _stopped(error: Exception, code: int) -> SystemExit:
    """The end of the process; the message is said, in one line, and stays readable in the exception."""
    message = f"error: {one_line(error)}"
    print(message, file=sys.stderr)
    stop = SystemExit(message)
    stop.code = code
    return stop


def _planned(
    args: argparse.Namespace, console: Console
) -> tuple[Comparison, list[Setting], Runner, list[Run], dict[str, Any]]:
    """Everything that can be wrong is found here, before anything is started or printed."""
    comparison = comparison_of(wanted_of(args))
    machines = machines_of(args, tiny=args.pretrained is None)
    if machines.machines > 1 and args.output is None:
        raise MethodError("several machines need --output (OUTPUT=...), the same folder on all of them.")
    if args.picture is not None and comparison.family == "hf":
        raise MethodError("--picture draws models of the llava package only; save_provenance=N shows kept tokens.")
    if args.picture is not None and comparison.family == "llava":
        raise MethodError("--picture draws a video, and the family llava reads images only.")
    if args.picture is not None and comparison.family in TRAINED:
        raise MethodError("--picture draws plain LLaVA models; scripts/visualize.py draws trained architectures.")
    if args.picture is not None:
        checks.check_picture(args.picture)
    settings = _settings(args, comparison)
    runs = [comparison.run(setting) for setting in settings]
    checks.check_output(comparison.output)
    checks.check_checkpoint(comparison.pretrained, ask_the_hub=not args.dry_run)
    checks.check_data(comparison.tasks, args.data)
    _check_start(runs)
    plan = comparison.plan(runs, machines, args.data)
    runner = Runner(machines, comparison.output, args.data, console)
    if args.dry_run:
        for run in runs:
            print(runner.command(run))
        print(f"# all of them, with one loading of the weights: {runner.command_of_all()}")
    return comparison, settings, runner, runs, plan


def _check_start(runs: list[Run]) -> None:
    """Refuse what every run would."""
    try:
        for run in runs[:1]:
            own_options(list(run.argv))
    except RunError as error:
        raise MethodError(str(error)) from error


def _compare(
    args: argparse.Namespace, comparison: Comparison, settings: list[Setting], runner: Runner, runs: list[Run]
) -> None:
    console = runner.console
    about = f" of {comparison.tasks} on {comparison.pretrained}; results in {comparison.output}"
    console.print(Text.assemble((f"{len(settings)} runs", "bold"), about), soft_wrap=True)
    started = time.time()
    runner.run(runs)
    if not runner.evaluates:
        return
    found = table.read({run.name: run.output for run in runs})
    table.write(found, comparison.output)
    console.print(table.tables(found))
    if comparison.match is not None:
        console.print(Text("\n".join(matched.told(comparison.match, settings, runs))), soft_wrap=True)
    try:
        for picture in _pictures(comparison, args, settings, found):
            console.print(Text(f"picture: {picture}"), soft_wrap=True)
    except (MethodError, ImportError, OSError) as error:  # the numbers are there all the same
        console.print(Text(f"warning: no picture: {one_line(error)}"), soft_wrap=True)
    console.print(Text(f"{time.time() - started:.0f} s; everything is in {comparison.output}"), soft_wrap=True)
    if ending := table.closing(found):
        console.print(Text(ending, "bold"), soft_wrap=True)


def _settings(args: argparse.Namespace, comparison: Comparison) -> list[Setting]:
    config = read_config(args.config)
    own = (config.get("params") or {}).get("retention_ratio")
    retention = 0.1 if own is None else own
    if config.get("method") is None:  # a trained architecture, at the levels of its own parameters
        return settings_of(args.methods or "levels", retention, config, comparison.family, args.retention_ratio)
    default = EMBEDDED_METHODS if has_budget(config["method"]) else EMBEDDED_METHODS_FIXED
    default = default if args.pretrained is None else "dense {method}"
    if comparison.match is not None:
        default = f"dense {{method}} {matched.baselines(comparison.family)}"
    words = default.format(method=config["method"]) if args.methods is None else args.methods
    settings = settings_of(words, retention, config, comparison.family, args.retention_ratio)
    if comparison.match is None:
        return settings
    return matched.without_budgets(settings, words, args.retention_ratio, comparison.match)


def wanted_of(args: argparse.Namespace) -> Wanted:
    """The part of the arguments that says what is compared."""
    return Wanted(
        config=args.config,
        pretrained=args.pretrained,
        tasks=args.tasks,
        model_args=pairs(args.model_args) | on_long_prompt(args),
        output=args.output,
        limit=args.limit,
        batch_size=str(args.batch_size),
        full=args.full,
        match=None if args.match is None else Target.of(args.match),
    )


def _pictures(
    comparison: Comparison, args: argparse.Namespace, settings: list[Setting], found: list[table.TaskResult]
) -> Iterator[Path]:
    if table.cut_tasks(found):
        yield pictures.draw_curve(found, comparison.output / "accuracy_vs_retention.png")
    video = args.picture
    if video is None and args.pretrained is None:
        video = embedded.CLIPS / "0000.mp4"
    config = read_config(args.config)
    of_config = [s for s in settings if s.method is not None and s.method == config.get("method")]
    usual = [s for s in of_config if dict(s.params).items() <= (config.get("params") or {}).items()]
    drawn = next(iter(usual or of_config), None)
    if video is not None and drawn is not None:
        yield pictures.draw_clip(comparison, drawn, video, comparison.output / "kept_tokens.png")
