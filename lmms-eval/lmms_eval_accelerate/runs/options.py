"""Options that ``compare`` and ``reproduce`` have in common: on what the runs are done."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from lmms_eval_accelerate.runs.launch import Machines


class Parser(argparse.ArgumentParser):
    """A mistake is one line and exit code 2; ``-h`` shows the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; -h shows all options\n")


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Processes, machines and the data folder. Loads nothing, so that ``-h`` is quick."""
    add = parser.add_argument
    add("--num-processes", "--nproc", type=positive, help="per machine; default: the visible GPUs (embedded model: 1)")
    add("--num-machines", type=positive, default=1)
    add("--machine-rank", type=int, default=0)
    add("--main-process-ip", type=text)
    add("--main-process-port", type=port)
    per_model = os.environ.get("GPUS_PER_MODEL") or "1"
    add("--gpus-per-model", type=positive, default=per_model, help="GPUs over which a large model is spread")
    add("--data", type=path, help="local data folder; runs offline on it (docs/benchmarks.md)")


def add_on_long_prompt(parser: argparse.ArgumentParser) -> None:
    """The model argument ``on_long_prompt`` as an option of its own."""
    parser.add_argument(
        "--on-long-prompt",
        choices=("warn", "error"),
        help="a prompt longer than the model's context is told and counted (default), or ends the run",
    )


def on_long_prompt(args: argparse.Namespace) -> dict[str, str]:
    """What it adds to the model arguments."""
    return {} if args.on_long_prompt is None else {"on_long_prompt": args.on_long_prompt}


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


def positive(given: str) -> int:
    """Argument type: a whole number above 0."""
    with contextlib.suppress(ValueError):
        if int(given) > 0:
            return int(given)
    raise argparse.ArgumentTypeError(f"{given!r} is not a whole number above 0")


def port(given: str) -> int:
    """Argument type: the number of a network port."""
    if positive(given) > 65535:
        raise argparse.ArgumentTypeError(f"{given!r} is not a port from 1 to 65535")
    return int(given)


def share(given: str) -> float:
    """Argument type: a share of the visual tokens, above 0 and up to 1."""
    with contextlib.suppress(ValueError):
        if 0 < float(given) <= 1:
            return float(given)
    raise argparse.ArgumentTypeError(f"{given!r} is not a number above 0 and up to 1")


def documents(given: str) -> str:
    """Argument type: what lmms-eval's --limit takes, as it is written. It runs no document with 0."""
    with contextlib.suppress(ValueError):
        number = float(given)
        if number == -1 or 0 < number < 1 or (number >= 1 and number.is_integer()):
            return given
    raise argparse.ArgumentTypeError(f"{given!r} is not a number of documents from 1, a share below 1, or -1 for all")


def text(given: str) -> str:
    """Argument type: some text. An empty one is mostly a variable of the shell that is not set."""
    if not given.strip():
        raise argparse.ArgumentTypeError("is empty; leave the option out for its default")
    return given


def path(given: str) -> Path:
    """Argument type: a path that is not empty."""
    return Path(text(given))
