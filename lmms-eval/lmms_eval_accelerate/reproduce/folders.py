"""The folders of the units: what is done, whether what lies there is what the unit asks for, and the lock."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shlex
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate_methods.stages.errors import MethodError
from lmms_eval_accelerate.reproduce.plan import Unit
from lmms_eval_accelerate.runs import files, runner
from lmms_eval_accelerate.runs.files import SUMMARY, UNIT

#: model arguments that a run's summary holds in another form, or not at all
_REWRITTEN = ("method", "config", "dtype", "torch_dtype", "device", "device_map", "max_batch_size", "model_name")
#: packages that every run's summary names
_PACKAGES = ("python", "torch", "transformers", "lmms-eval", "decord", "av")


class FolderError(MethodError):
    """A folder holds something else than it should."""


def is_done(unit: Unit) -> bool:
    """Whether the unit's results are there.

    Raises:
        FolderError: the folder belongs to another unit, or holds the results of other settings.
    """
    note = unit.folder / UNIT
    if note.is_file():
        known = read_json(note)
        if known.get("hash") != unit.hash or known.get("identity") != unit.identity:
            differ = differences(known.get("identity") or {}, unit.identity)
            raise FolderError(
                f"{unit.folder} belongs to another unit ({UNIT}: {differ}); move the folder away or choose another "
                "--output."
            )
    if not (unit.folder / SUMMARY).is_file():
        return False
    read_summary(unit)
    return True


def read_summary(unit: Unit) -> dict[str, Any]:
    """The unit's ``summary.json``, checked against the unit.

    Raises:
        FolderError: it is missing, or says other settings.
    """
    path = unit.folder / SUMMARY
    if not path.is_file():
        raise FolderError(f"{unit.folder} has no {SUMMARY}: {unit.name} did not run.")
    summary = read_json(path)
    wrong = foreign(unit, summary)
    if wrong:
        raise FolderError(
            f"{path} is not the result of {unit.name}: {'; '.join(wrong)}. "
            "Move the folder away or choose another --output."
        )
    return summary


def foreign(unit: Unit, summary: Mapping[str, Any]) -> list[str]:
    """What in ``summary`` contradicts the unit's settings; empty if nothing does."""
    wanted, settings = unit.identity, summary.get("settings") or {}
    wrong = []

    def same(what: str, found: Any, expected: Any) -> None:
        if found != expected:
            wrong.append(f"{what} is {found!r} there, not {expected!r}")

    same("model", summary.get("model"), wanted["model"])
    methods = json.loads(json.dumps(settings.get("methods") or [], default=str))
    if (solved := settings.get("matched")) and "match" in wanted["model_args"] and len(methods) == 1:
        methods[0][solved["parameter"]] = wanted["model_args"].get(solved["parameter"])  # where solving began
    same("methods", methods, wanted["methods"])
    of_methods = {name for method in wanted["methods"] for name in method}
    for key, value in wanted["model_args"].items():
        if key not in _REWRITTEN and key not in of_methods and "." not in key:
            same(key, _plain(settings.get(key)), _plain(value))
    dtype = wanted["model_args"].get("dtype") or wanted["model_args"].get("torch_dtype") or "auto"
    if dtype != "auto":
        same("dtype", str(settings.get("dtype")).removeprefix("torch."), dtype)
    same("batch_size", settings.get("batch_size"), wanted["batch_size"])
    same("number of processes", settings.get("world_size", 1), wanted["processes"] * wanted["machines"])
    same("gpus_per_model", settings.get("gpus_per_model", wanted["gpus_per_model"]), wanted["gpus_per_model"])
    limit = summary.get("limit")
    same("limit", None if limit is None else float(limit), None if wanted["limit"] is None else float(wanted["limit"]))
    tasks = summary.get("tasks") or {}
    if missing := [task for task in unit.tasks if task not in tasks]:
        wrong.append(f"task {missing[0]} is not among {', '.join(tasks) or 'no tasks'}")
    for name in _PACKAGES:
        there = (summary.get("versions") or {}).get(name)
        if there is not None and name in wanted["versions"]:
            same(f"version of {name}", there, wanted["versions"][name])
    if summary.get("code") is not None:
        same("hash of the code (a source file was edited in between)", summary["code"], wanted["code"])
    return wrong


def _plain(value: Any) -> Any:
    """A model argument as it comes out of the text of ``--model_args``."""
    if isinstance(value, str) and value.lower() in ("none", "null"):
        return None
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Which entries of two identities differ."""
    keys = runner.differing(found, expected)
    return "; ".join(f"{k} {found.get(k)!r} / {expected.get(k)!r}" for k in keys) or "nothing"


def note(unit: Unit) -> None:
    """Write ``unit.json``, before the unit runs."""
    unit.folder.mkdir(parents=True, exist_ok=True)
    content = {
        "part": unit.part,
        "row": unit.row,
        "task": unit.task,
        "hash": unit.hash,
        "command": shlex.join(unit.run().command()),
        "written": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "identity": unit.identity,
    }
    files.write_json(unit.folder / UNIT, content)


@contextlib.contextmanager
def locked(output: Path, rank: int = 0, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold the output folder: a second command of the same machine rank is refused until this one has ended.

    The system gives the lock back when the process ends, however it ends. On a file system without locks it goes on
    without one and says so.

    Raises:
        FolderError: another command holds it.
    """
    output.mkdir(parents=True, exist_ok=True)
    path = output / (files.LOCK if rank == 0 else f"{files.LOCK}.{rank}")
    with path.open("a+", encoding="utf-8") as file:
        try:
            missing = files.lock(file)
        except BlockingIOError:
            file.seek(0)
            raise FolderError(
                f"another reproduce command is at work in {output} ({file.read().strip() or 'unknown'}); "
                "wait for it or choose another --output."
            ) from None
        if missing:
            say(f"no lock on {output} ({missing}): see to it that no second command works there.")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def read_json(path: Path) -> Any:
    """The content of a file of this command; :class:`FolderError` with its name if it cannot be read."""
    return files.read_json(path, FolderError)
