"""Start the runs of a comparison or of a paper's table: one command for all of them, on one machine or several.

The command is ``python -m lmms_eval_accelerate --runs PLAN`` below whatever starts the processes: nothing for one
process, ``accelerate launch`` on GPUs, ``torchrun`` on CPUs. It loads the weights once and switches methods between the
runs. This module imports neither lmms-eval nor a model.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from accelerate_methods.registry import plugins
from accelerate_methods.stages.errors import MethodError
from lmms_eval_accelerate import progress
from lmms_eval_accelerate.runs.files import LOG, PLAN, of_machine, write_json
from lmms_eval_accelerate.runs.following import Follower
from lmms_eval_accelerate.runs.request import MODULE, Run

_TOLD = {"PYTHONUNBUFFERED": "1", "COLUMNS": "160", progress.SECONDS: "1"}
TAIL = 40  # lines of the log that an error shows
#: what a run says in front of the reason that it failed for; and a reason that is the error of some library
FAILED_MARK = "lmms-eval-accelerate: the run failed: "
_UNEXPECTED = re.compile(r"[A-Z]\w*[a-z]\w*: ")


class LaunchError(RuntimeError):
    """The started command failed.

    Attributes:
        tail: the last lines that it printed; none where the reason that it gave says everything.
    """

    def __init__(self, what: str, log: Path | str, tail: Sequence[str] = ()):
        said = [line.partition(FAILED_MARK)[2] for line in tail if FAILED_MARK in line]
        reason = said[-1] if said else ""
        super().__init__(f"{what}: {reason} (log: {log})" if reason else f"{what}; end of {log}:")
        self.tail = [] if reason and not _UNEXPECTED.match(reason) else list(tail)


@dataclasses.dataclass(frozen=True)
class Machines:
    """How many processes on how many machines. ``processes`` and ``gpus_per_model`` count per machine.

    Args:
        processes: model copies per machine; each answers its share of the documents.
        machines, machine_rank, main_ip, main_port: as in ``accelerate launch``; every machine starts the same command.
        gpus_per_model: GPUs over which one copy of a model that is too large for one is spread.
    """

    processes: int = 1
    machines: int = 1
    machine_rank: int = 0
    main_ip: str | None = None
    main_port: str | None = None
    gpus_per_model: int = 1

    def __post_init__(self) -> None:
        for name in ("processes", "machines", "gpus_per_model"):
            if getattr(self, name) < 1:
                raise MethodError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if not 0 <= self.machine_rank < self.machines:
            last = self.machines - 1
            raise MethodError(f"machine_rank is {self.machine_rank}; with {self.machines} machines it is 0 to {last}.")
        if self.machines > 1 and not self.main_ip:
            raise MethodError("several machines need main_process_ip, the address of the machine of rank 0.")

    @property
    def world(self) -> int:
        return self.processes * self.machines

    def command(self, arguments: Sequence[str]) -> list[str]:
        """``arguments`` for the plugin's command, below what starts the processes."""
        module = ["-m", MODULE, *arguments]
        if self.world == 1:
            return [sys.executable, *module]
        if gpus():
            return [
                *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
                *("--num_processes", str(self.world)),
                *("--num_machines", str(self.machines), "--machine_rank", str(self.machine_rank)),
                *(("--main_process_ip", self.main_ip) if self.main_ip else ()),
                *(("--main_process_port", self.main_port) if self.main_port else ()),
                *module,
            ]
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(self.processes)),
            *("--nnodes", str(self.machines), "--node_rank", str(self.machine_rank)),
            *(("--master_addr", self.main_ip) if self.main_ip else ()),
            *(("--master_port", self.main_port) if self.main_port else ()),
            *module,
        ]


def gpus() -> int:
    """Visible GPUs."""
    import torch

    return torch.cuda.device_count()


def default_processes(gpus_per_model: int = 1) -> int:
    """Model copies that fit on the visible GPUs; 1 without any."""
    return max(1, gpus() // gpus_per_model)


def write_plan(runs: Sequence[Run], folder: Path, machine_rank: int = 0) -> Path:
    """PLAN.json as ``--runs`` reads it; every machine has its own, as they may share the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = [{"name": r.name, "output_path": str(r.output), "argv": list(r.argv)} for r in runs]
    path = folder / of_machine(PLAN, machine_rank)
    write_json(path, {"runs": entries})
    return path


def execute(
    runs: Sequence[Run],
    machines: Machines,
    folder: Path,
    console: Console,
    data: Path | None = None,
) -> None:
    """Do all runs that are not done yet, with progress bars and the time that is left.

    Runs whose folder holds a ``summary.json`` are skipped, and begun ones continued. The log is ``folder/log.txt``
    (of a machine of another rank: ``log_<rank>.txt``), ``folder/plan.json`` says what was asked for.

    Args:
        data: local data folder (see docs/benchmarks.md): the command runs offline on it.

    Raises:
        MethodError: the plugin is not installed.
        LaunchError: the command failed, with the end of its log.
    """
    if importlib.util.find_spec(MODULE) is None:
        raise MethodError("the lmms-eval plugin is not installed: pip install -c constraints.txt -e lmms-eval")
    command = machines.command(["--runs", str(write_plan(runs, folder, machines.machine_rank).resolve())])
    cwd, more = _surroundings(machines, data)
    environment = {**os.environ, **plugins.environment(), **_TOLD, **more}
    log_path = folder / of_machine(LOG, machines.machine_rank)
    tail: collections.deque[str] = collections.deque(maxlen=TAIL)
    pace = progress.Pace()  # every second is told how far a run is: too much for a log
    with log_path.open("a", encoding="utf-8", buffering=1) as log, Follower(len(runs), console) as follower:
        log.write(shlex.join(command) + "\n")
        with _started(command, cwd, environment) as process:
            for line in process.stdout:  # universal newlines: a bar that rewrites its line is lines, too
                if line.strip() and (not follower.see(line.rstrip()) or pace.is_due()):
                    log.write(line.rstrip() + "\n")
                    tail.append(line.rstrip())
    if process.returncode != 0:
        where = follower.running or "the start"
        raise LaunchError(f"{where} failed (exit code {process.returncode})", log_path, tail)


def _surroundings(machines: Machines, data: Path | None) -> tuple[Path | None, dict[str, str]]:
    """Working directory (None: this one) and environment variables of the command."""
    cwd, environment = None, {}
    if data is not None:
        from lmms_eval_accelerate.benchmarks.catalog import offline_environment

        cwd, environment = offline_environment(data)
    if machines.gpus_per_model > 1:
        environment = {**environment, "GPUS_PER_MODEL": str(machines.gpus_per_model)}
    return cwd, environment


def shell_prefix(machines: Machines, data: Path | None) -> str:
    """What stands before a printed command so that a shell runs it as :func:`execute` does."""
    cwd, environment = _surroundings(machines, data)
    changes = "".join(f"{name}={shlex.quote(value)} " for name, value in environment.items())
    return (f"cd {shlex.quote(str(cwd))} && " if cwd else "") + changes


@contextlib.contextmanager
def _started(command: list[str], cwd: Path | None, environment: dict[str, str]) -> Iterator[subprocess.Popen]:
    """The command as a child that ends with us: its processes would otherwise go on writing into our folders."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        cwd=cwd,
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
    )
    try:
        yield process
    except BaseException:
        process.terminate()
        raise
    finally:
        process.wait()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: also if we are killed
