"""One evaluation: lmms-eval's own command line in this process, with an honest end and a folder of its own."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from typing import Any

from accelerate_methods.registry import plugins
from accelerate_methods.stages.errors import MethodError, one_line
from lmms_eval_accelerate import TASKS
from lmms_eval_accelerate.runs.command_line import own_options
from lmms_eval_accelerate.runs.folder import RunError, RunFolder, run_name
from lmms_eval_accelerate.runs.launch import FAILED_MARK
from lmms_eval_accelerate.runs.task_files import read_by_libyaml
from lmms_eval_accelerate.session import Session

#: errors that say all that there is to say: no traceback
_EXPECTED = (RunError, MethodError)


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
        if not isinstance(error, _EXPECTED):
            traceback.print_exception(error)
        _fail(folder, error)


def alone() -> bool:
    """Whether this is the only process."""
    return int(os.environ.get("WORLD_SIZE", 1)) == 1


def rank() -> int:
    """Number of this process among all that were started together."""
    return int(os.environ.get("RANK", 0))


def _harness(own: argparse.Namespace, passed: list[str]) -> dict[str, Any]:
    """Run lmms-eval's command line; returns its results and samples (rank 0)."""
    import lmms_eval.__main__ as harness

    from lmms_eval_accelerate.runs.summary import without_placeholders

    outcome: dict[str, Any] = {}
    original = harness.cli_evaluate_single

    def observed(args: argparse.Namespace):
        given = args.include_path
        args.include_path = [str(TASKS), *([given] if isinstance(given, str) else given or [])]
        try:
            results, outcome["samples"] = original(args)
        except Exception as error:
            cause = _cause(error)
            if not isinstance(cause, _EXPECTED):
                traceback.print_exception(error)
            raise _Failed(cause) from error
        outcome["results"] = without_placeholders(results)  # lmms-eval prints a table of what it gets back
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
        with read_by_libyaml():
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
    kind = "" if isinstance(error, _EXPECTED) else f"{type(error).__name__}: "
    print(f"{FAILED_MARK}{kind}{one_line(error)}", file=sys.stderr, flush=True)


def _fail(folder: RunFolder | None, error: BaseException) -> None:
    complain(error)
    if folder is not None:
        folder.failed(error)
    sys.exit(1)
