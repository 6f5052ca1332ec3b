"""The runner behind ``compare`` and ``reproduce``: settings x tasks make runs, the results of runs make a table.

A command makes its list of :class:`~.request.Run` and reads the results; what lies between is the same for all and
stands here: the commands of a dry run, what is left to do, starting it on one machine or several.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lmms_eval_accelerate.runs import files, launch
from lmms_eval_accelerate.runs.launch import Machines
from lmms_eval_accelerate.runs.request import Run


@dataclasses.dataclass(frozen=True)
class Runner:
    """
    Attributes:
        folder: of the plan and the log.
        data: local data folder (docs/benchmarks.md): the runs are offline on it.
    """

    machines: Machines
    folder: Path
    data: Path | None
    console: Console

    @property
    def evaluates(self) -> bool:
        """Whether this machine makes the table: the one of rank 0 has the results of all."""
        return self.machines.machine_rank == 0

    def command(self, run: Run) -> str:
        """What a shell does one run with, alone."""
        return self._shell(run.arguments())

    def command_of_all(self) -> str:
        """What :meth:`run` starts: all runs with one loading of the weights."""
        return self._shell(["--runs", str(self.folder / files.PLAN)])

    def _shell(self, arguments: Sequence[str]) -> str:
        return launch.shell_prefix(self.machines, self.data) + shlex.join(self.machines.command(arguments))

    def run(
        self,
        runs: Sequence[Run],
        done: Callable[[Run], bool] | None = None,
        note: Callable[[Run], None] | None = None,
    ) -> None:
        """Do what is not there yet. Interrupted runs go on where they stopped.

        Args:
            done: whether a run's results are there; None: the started command looks itself.
            note: called for each run that is left, on the machine of rank 0, before anything starts.

        Raises:
            LaunchError: a run failed.
        """
        left = [run for run in runs if done is None or not done(run)]
        # machines that do not see the same files in time must still be told the same list; rank 0 says what is skipped
        wanted = runs if self.machines.machines > 1 else left
        if not wanted:
            return
        if note is not None and self.evaluates:
            for run in left:
                note(run)
        launch.execute(wanted, self.machines, self.folder, self.console, self.data)


def differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Keys under which two descriptions of runs differ: results of both must not be mixed."""
    return [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
