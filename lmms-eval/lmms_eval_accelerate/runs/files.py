"""The files of runs: their names, writing them whole, locks.

Everything that a command leaves behind is named here and nowhere else::

    <output of compare>/    comparison_plan.json  plan.json  log.txt  comparison.json  comparison.md  <run> ...
    <output of reproduce>/  lock  launch/plan.json  launch/log.txt  outcome.json  outcome.md  runs/<task>/<run> ...
    <run>/                  run.json  unit.json (reproduce)  answers/  provenance/  lmms-eval's own files
                            then summary.json and efficiency.json, or failed.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from accelerate_methods.stages.errors import MethodError, one_line

#: of one run: who works on it, why it failed, what it measured
CLAIM, FAILED, SUMMARY, EFFICIENCY = "run.json", "failed.json", "summary.json", "efficiency.json"
#: of one run: answers until it is complete, tokens kept in its first documents, what reproduce asked it for
ANSWERS, PROVENANCE, UNIT = "answers", "provenance", "unit.json"
#: of the command that did several runs: what was asked for, what it printed
PLAN, LOG = "plan.json", "log.txt"
#: of a comparison
COMPARISON_PLAN, COMPARISON, COMPARISON_TEXT = "comparison_plan.json", "comparison.json", "comparison.md"
#: of a reproduced table; ``LAUNCH`` is the folder of its plan and log, ``RUNS`` that of its runs
OUTCOME, OUTCOME_TEXT, LAUNCH, RUNS, LOCK = "outcome.json", "outcome.md", "launch", "runs", "lock"


def of_machine(name: str, rank: int) -> str:
    """A file's name on the machine of that rank: machines may share the folder, rank 0 has the plain name."""
    if rank == 0:
        return name
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}_{rank}{dot}{suffix}"


def read_json(path: Path, error: type[Exception] = MethodError) -> Any:
    """The content of ``path``; ``error`` with its name if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"cannot read {path}: {one_line(reason)}") from reason


def write_text(path: Path, text: str) -> None:
    """All of it or nothing, also if the process is killed: then the old file stays."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_json(path: Path, value: Any) -> None:
    """As :func:`write_text`; what is no JSON is written as its text."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def lock(file: TextIO) -> str:
    """Hold an open file until it is closed or the process ends, however it ends.

    Returns:
        why there is no lock, on a system or file system without them; empty if the file is held.

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return "this system has no file locks"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        return error.strerror or str(error)
    return ""
