"""Options that ``compare`` and ``reproduce`` have in common: on what the runs are done."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval_accelerate.runs.launch import Machines


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Processes, machines and the data folder. Loads nothing, so that ``-h`` is quick."""
    add = parser.add_argument
    add("--num-processes", "--nproc", type=positive, help="per machine; default: the visible GPUs (embedded model: 1)")
    add("--num-machines", type=positive, default=1)
    add("--machine-rank", type=int, default=0)
    add("--main-process-ip")
    add("--main-process-port", type=positive)
    per_model = os.environ.get("GPUS_PER_MODEL", "1")
    add("--gpus-per-model", type=positive, default=per_model, help="GPUs over which a large model is spread")
    add("--data", type=Path, help="local data folder; runs offline on it (docs/benchmarks.md)")


def machines_of(args: argparse.Namespace, tiny: bool) -> Machines:
    """
    Args:
        tiny: the embedded model, for which one process is enough.

    Raises:
        MethodError: numbers that do not go together.
    """
    from lmms_eval_accelerate.runs.launch import Machines, default_processes

    return Machines(
        processes=args.num_processes or (1 if tiny else default_processes(args.gpus_per_model)),
        machines=args.num_machines,
        machine_rank=args.machine_rank,
        main_ip=args.main_process_ip,
        main_port=str(args.main_process_port) if args.main_process_port else None,
        gpus_per_model=args.gpus_per_model,
    )


def positive(text: str) -> int:
    """Argument type: a whole number above 0."""
    with contextlib.suppress(ValueError):
        if int(text) > 0:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
