"""``lmms-eval-accelerate --runs PLAN.json``: a series of runs in one process (group), with one loading of the weights.

PLAN.json is ``{"runs": [{"name": ..., "output_path": ..., "argv": [arguments of lmms-eval-accelerate]}]}``. A run whose
folder holds a summary is there already; one that was begun goes on where it stopped. The first failure ends everything.
What runs share is the weights (as long as they ask for the same ones) and lmms-eval's list of tasks, which takes 15 s
to read. Everything else, the model object of lmms-eval included, is made anew for each.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate_methods.stages.errors import MethodError
from lmms_eval_accelerate.runs.command_line import own_options
from lmms_eval_accelerate.runs.evaluation import alone, complain, rank, run_evaluation
from lmms_eval_accelerate.runs.folder import RunError, finished
from lmms_eval_accelerate.runs.following import MARKS
from lmms_eval_accelerate.session import session

_DISTRIBUTED_TIMEOUT = datetime.timedelta(days=7)  # a rank may wait for another that answers long documents


def main(argv: list[str]) -> None:
    """Do the runs of a plan."""
    parser = argparse.ArgumentParser(prog="lmms-eval-accelerate --runs", description=__doc__)
    parser.add_argument("plan", type=Path)
    runs = _read(parser.parse_args(argv).plan)
    with session(share=True) as shared, _one_task_list():
        for number, run in enumerate(runs, 1):
            if _from_first(_finished(run)):
                _mark("reused", number, len(runs), run["name"])
                continue
            _mark("begin", number, len(runs), run["name"])
            run_evaluation([*run["argv"], "--output_path", run["output_path"], "--resume"], shared)
            _mark("end", number, len(runs), run["name"])
    _leave_group()


def _leave_group() -> None:
    """All processes end together: one that is torn down while others still talk to it ends them with SIGABRT."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        complete = all({"name", "output_path", "argv"} <= run.keys() for run in runs)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        print(f"lmms-eval-accelerate: cannot read the runs of {path}: {error!r}", file=sys.stderr)
        raise SystemExit(2) from error
    folders = [run["output_path"] for run in runs] if complete else []
    if not complete or len(set(folders)) < len(folders):
        print(f"lmms-eval-accelerate: every run of {path} needs name, output_path (its own) and argv.", file=sys.stderr)
        raise SystemExit(2)
    return runs


def _finished(run: dict[str, Any]) -> bool:
    """Whether a run is there already; one of other arguments or code in its folder ends everything."""
    if rank() != 0:
        return False  # the first process says
    try:
        _, passed = own_options(run["argv"])
        return finished(Path(run["output_path"]), passed)
    except (RunError, MethodError) as error:
        complain(error)
        raise SystemExit(1) from error


def _mark(what: str, number: int, total: int, name: str) -> None:
    if rank() == 0:
        print(MARKS[what].format(number, total, name), flush=True)


def _from_first(value: Any) -> Any:
    """The first process's value on all: they must agree, and only one of them may see its files in time."""
    if alone():
        return value
    import torch.distributed as dist

    if not dist.is_initialized():
        from accelerate import Accelerator, InitProcessGroupKwargs

        Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=_DISTRIBUTED_TIMEOUT)])
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


@contextlib.contextmanager
def _one_task_list() -> Iterator[None]:
    """lmms-eval's command line indexes its 2,000 task files for every run; let it do so once per argument list."""
    import lmms_eval.__main__ as harness

    original, made = harness.TaskManager, {}

    def remembered(*args: Any, **kwargs: Any) -> Any:
        key = repr((args, sorted(kwargs.items(), key=str)))
        if key not in made:
            made[key] = original(*args, **kwargs)
        return made[key]

    harness.TaskManager = remembered
    try:
        yield
    finally:
        harness.TaskManager = original
