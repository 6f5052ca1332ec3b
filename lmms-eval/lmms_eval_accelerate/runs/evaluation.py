"""One evaluation: lmms-eval's own command line in this process, with an honest end and a folder of its own."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from accelerate_methods.registry import plugins
from accelerate_methods.stages.errors import MethodError
from lmms_eval_accelerate import TASKS, embedded
from lmms_eval_accelerate.benchmarks.catalog import require_judges
from lmms_eval_accelerate.runs.folder import RunError, RunFolder, run_name
from lmms_eval_accelerate.session import Session

_LISTINGS = ("list", "list_groups", "list_tags", "list_subtasks")


class _Failed(SystemExit):
    """Ends the process with code 1; passes lmms-eval's ``except Exception``."""

    def __init__(self, error: BaseException):
        super().__init__(1)
        self.error = error


def run_evaluation(argv: list[str], shared: Session) -> None:
    """Do one run. A failure ends the process with its reason and exit code 1 (2: it could not start)."""
    try:
        plugins.import_named()  # lmms-eval would warn, and not know the model
        own, passed = own_options(argv)
    except (RunError, MethodError) as error:
        complain(error)
        sys.exit(2)
    folder = None
    try:
        name = run_name(own.model, own.model_args)
        folder = RunFolder.claim(own.output_path, name, rank(), passed, own.resume)
        # without a folder of the user's choice, processes cannot know each other's
        keep = not own.listing and (own.output_path or alone())
        shared.begin(folder, folder.answers if keep else None)
        outcome = _harness(own, [*passed, "--output_path", str(folder.path), "--log_samples"])
        if rank() == 0 and not own.listing:
            _complete(folder, outcome, own, shared)
    except SystemExit as stop:
        error = stop.error if isinstance(stop, _Failed) else None
        if stop.code not in (None, 0):
            _fail(folder, error or RunError(f"lmms-eval ended with {stop.code}"))
        if not own.listing:
            _fail(folder, RunError("lmms-eval ended without running anything"))
        folder.release()
    except Exception as error:
        if not isinstance(error, (RunError, MethodError)):
            traceback.print_exception(error)
        _fail(folder, error)


def alone() -> bool:
    """Whether this is the only process."""
    return int(os.environ.get("WORLD_SIZE", 1)) == 1


def rank() -> int:
    """Number of this process among all that were started together."""
    return int(os.environ.get("RANK", 0))


def own_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options that this command must know, and the arguments that go to lmms-eval.

    Raises:
        RunError, MethodError: options that contradict each other, a judge without a key, missing data.
    """
    own, passed = own_parser().parse_known_args(argv)
    # the rest is only looked at; it stays in `passed`
    look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--model", "--model_args", "--tasks", "--config"):
        look.add_argument(name, default="")
    look.add_argument("--use_cache", "-c", default=None)
    look.add_argument("--predict_only", "-x", action="store_true")
    seen, _ = look.parse_known_args(passed)
    file = _config_file(seen.config) if seen.config else {}
    for name in ("model", "model_args", "tasks", "use_cache", "predict_only"):
        setattr(own, name, getattr(seen, name) or file.get(name) or getattr(seen, name))
    own.output_path = own.output_path or file.get("output_path")
    own.listing = own.tasks in _LISTINGS
    own.predict_only = own.predict_only or own.allow_no_score
    if own.resume and not own.output_path:
        raise RunError("--resume needs the --output_path of the run that was interrupted.")
    if own.use_cache and not own.allow_cache:
        raise RunError("--use_cache gives answers without costs; add --allow_cache if that is meant.")
    if not own.listing:
        embedded.require_tasks(own.tasks)
        if not own.predict_only:
            require_judges(own.tasks, os.environ)
    return own, passed


def own_parser() -> argparse.ArgumentParser:
    """The options that lmms-eval does not have, or that this command reads itself."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output_path", help="folder of the run, samples included (default: a new one below logs/)")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run in --output_path")
    parser.add_argument("--allow_no_score", action="store_true", help="a task without any number is no failure")
    parser.add_argument("--allow_cache", action="store_true", help="let --use_cache give answers without costs")
    parser.add_argument("--log_samples", action="store_true", help=argparse.SUPPRESS)  # always on
    return parser


def _config_file(path: str) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"cannot read --config {path}: {error}") from error
    if isinstance(content, list):
        if len(content) != 1:
            raise RunError(f"{path} describes {len(content)} runs; start this command once per run (one folder each).")
        content = content[0]
    return content or {}


def _harness(own: argparse.Namespace, passed: list[str]) -> dict[str, Any]:
    """Run lmms-eval's command line; returns its results and samples (rank 0)."""
    import lmms_eval.__main__ as harness

    outcome: dict[str, Any] = {}
    original = harness.cli_evaluate_single

    def observed(args: argparse.Namespace):
        given = args.include_path
        args.include_path = [str(TASKS), *([given] if isinstance(given, str) else given or [])]
        try:
            outcome["results"], outcome["samples"] = original(args)
        except Exception as error:
            traceback.print_exception(error)
            raise _Failed(_cause(error)) from error
        return outcome["results"], outcome["samples"]

    # cli_evaluate catches what this function raises and exits 0. It is looked up in the module when called.
    harness.cli_evaluate_single = observed
    try:
        stock_command(passed)
    finally:
        harness.cli_evaluate_single = original
    return outcome


def stock_command(argv: list[str]) -> None:
    """lmms-eval's own command line with these arguments, which it takes from ``sys.argv`` alone."""
    from lmms_eval.cli.dispatch import main as dispatch

    before = sys.argv
    sys.argv = ["lmms-eval-accelerate", *argv]
    try:
        dispatch()
    finally:
        sys.argv = before


def _complete(folder: RunFolder, outcome: dict[str, Any], own: argparse.Namespace, shared: Session) -> None:
    """Check the results, write the summary and show it.

    Raises:
        RunError: no results, or a task without a number.
    """
    from lmms_eval_accelerate.runs import summary

    results, samples = outcome.get("results"), outcome.get("samples")
    if not results:
        raise RunError("lmms-eval returned no results.")
    if not list(folder.path.rglob("*_results.json")):
        raise RunError(f"lmms-eval wrote no results file below {folder.path}.")
    if not own.predict_only:
        summary.check_scores(results)
    made = summary.build(results, samples or {}, own, shared)
    folder.finish(made)
    summary.show(made, folder.path)


def _cause(error: BaseException) -> BaseException:
    """The error behind tenacity's RetryError, in which lmms-eval hides what went wrong with a data set."""
    attempt = getattr(error, "last_attempt", None)
    inner = attempt.exception() if attempt is not None else None
    return inner or error


def complain(error: BaseException) -> None:
    """Say why a run failed."""
    kind = "" if isinstance(error, (RunError, MethodError)) else f"{type(error).__name__}: "
    print(f"lmms-eval-accelerate: the run failed: {kind}{error}", file=sys.stderr, flush=True)


def _fail(folder: RunFolder | None, error: BaseException) -> None:
    complain(error)
    if folder is not None:
        folder.failed(error)
    sys.exit(1)
