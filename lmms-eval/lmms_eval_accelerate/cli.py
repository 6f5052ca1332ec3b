"""``lmms-eval-accelerate``: the command line of lmms-eval with an honest exit code and a folder of its own per run.

All arguments are lmms-eval's own and go through to it. What this command adds:

* every run writes into a fresh folder (``--output_path``, or ``logs/<time>_<model>_<hash>``), samples included;
* our tasks are found (``--include_path`` of the user comes on top);
* a run that fails, on any rank, ends with exit code 1 and the reason (lmms-eval prints it and exits 0);
* a run that succeeds leaves ``summary.json`` and ``efficiency.json``: metrics, mean costs over all ranks, settings;
* on a machine without CUDA, several processes work (``torchrun --nproc_per_node 2 -m lmms_eval_accelerate ...``);
* a task that yields no number is a failure, unless ``--allow_no_score`` says it is a submission task;
* ``--use_cache`` is refused (cached answers have no costs) unless ``--allow_cache`` is given as well;
* ``--resume`` goes on with a run that was interrupted: the answers that it gave are kept in its folder;
* ``--runs PLAN.json`` does many runs with one loading of the weights, see ``many.py``.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from accelerate_methods.registry import plugins
from accelerate_methods.stages.errors import MethodError
from lmms_eval_accelerate import TASKS
from lmms_eval_accelerate.benchmarks.catalog import require_judges
from lmms_eval_accelerate.runs.fingerprint import code_hash
from lmms_eval_accelerate.runs.folder import RunError, RunFolder, run_name
from lmms_eval_accelerate.session import Session, session

_SUBCOMMANDS = ("tasks", "models", "ui", "serve", "power", "version", "tui", "mcp")


class _Failed(SystemExit):
    """Ends the process with code 1; passes lmms-eval's ``except Exception``."""

    def __init__(self, error: BaseException):
        super().__init__(1)
        self.error = error


def main(argv: list[str] | None = None) -> None:
    """Entry point; always ends with ``SystemExit`` of the right code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["eval"]:
        argv = argv[1:]
    if not argv or {"-h", "--help"} & set(argv):
        print(__doc__)
    if not argv or argv[0] in _SUBCOMMANDS or argv[0] in ("-h", "--help"):
        _stock(argv or ["--help"])
        sys.exit(0)
    _prepare_environment()
    code_hash()  # of the code that is imported now: what is edited while runs go on is not what makes them
    if argv[0] == "--runs":
        from lmms_eval_accelerate.runs.many import main as many

        many(argv[1:])
    else:
        with session() as shared:
            one(argv, shared)
    sys.exit(0)


def one(argv: list[str], shared: Session) -> None:
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
        shared.journal = None if own.listing or not (own.output_path or alone()) else folder.answers
        outcome = _run(own, [*passed, "--output_path", str(folder.path), "--log_samples"])
        if rank() == 0 and not own.listing:
            folder.finish(outcome, own)
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


def _prepare_environment() -> None:
    import torch

    # several tasks read it while they are imported, and fail or look into a folder called "~" without it
    os.environ.setdefault("HF_HOME", os.path.expanduser("~/.cache/huggingface"))
    if not torch.cuda.is_available():
        # without it, accelerate sees one process where torchrun started several
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")


def alone() -> bool:
    """Whether this is the only process."""
    return int(os.environ.get("WORLD_SIZE", 1)) == 1


def rank() -> int:
    """Number of this process among all that were started together."""
    return int(os.environ.get("RANK", 0))


def own_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options that this command must know, and the arguments that go to lmms-eval."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--allow_cache", action="store_true")
    parser.add_argument("--allow_no_score", action="store_true")
    parser.add_argument("--output_path", default=None)
    parser.add_argument("--log_samples", action="store_true")
    parser.add_argument("--resume", action="store_true")
    own, passed = parser.parse_known_args(argv)
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
    own.listing = own.tasks in ("list", "list_groups", "list_tags", "list_subtasks")
    own.predict_only = own.predict_only or own.allow_no_score
    if own.resume and not own.output_path:
        raise RunError("--resume needs the --output_path of the run that was interrupted.")
    if own.use_cache and not own.allow_cache:
        raise RunError("--use_cache gives answers without costs; add --allow_cache if that is meant.")
    if not (own.listing or own.predict_only):
        require_judges(own.tasks, os.environ)
    return own, passed


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


def _run(own: argparse.Namespace, passed: list[str]) -> dict[str, Any]:
    """Run lmms-eval's own command line in this process; returns its results and samples (rank 0)."""
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
        _stock(passed)
    finally:
        harness.cli_evaluate_single = original
    return outcome


def _stock(argv: list[str]) -> None:
    from lmms_eval.cli.dispatch import main as dispatch

    before = sys.argv
    sys.argv = ["lmms-eval-accelerate", *argv]
    try:
        dispatch()
    finally:
        sys.argv = before


def _cause(error: BaseException) -> BaseException:
    """The error behind tenacity's RetryError, in which lmms-eval hides what went wrong with a data set."""
    attempt = getattr(error, "last_attempt", None)
    inner = attempt.exception() if attempt is not None else None
    return inner or error


def complain(error: BaseException) -> None:
    kind = "" if isinstance(error, (RunError, MethodError)) else f"{type(error).__name__}: "
    print(f"lmms-eval-accelerate: the run failed: {kind}{error}", file=sys.stderr, flush=True)


def _fail(folder: RunFolder | None, error: BaseException) -> None:
    complain(error)
    if folder is not None:
        folder.failed(error)
    sys.exit(1)
