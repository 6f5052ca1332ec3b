"""The folder of a run: one run each, claimed before the run and completed or marked as failed after it."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any, TextIO

from lmms_eval_accelerate.runs import files
from lmms_eval_accelerate.runs.files import ANSWERS, CLAIM, EFFICIENCY, FAILED, PROVENANCE, SUMMARY
from lmms_eval_accelerate.runs.fingerprint import code_hash, short_hash


class RunError(RuntimeError):
    """A run that cannot start or did not produce what it should have."""


def run_name(model: str, model_args: str) -> str:
    """Readable and specific: model id (or method) and a hash of the arguments."""
    return f"{re.sub(r'[^A-Za-z0-9_.+-]+', '_', model or 'run')}_{short_hash([model, model_args])}"


@dataclasses.dataclass
class RunFolder:
    """Folder of one run; only rank 0 writes.

    Attributes:
        lock: held as long as this process works on the run.
    """

    path: Path
    rank: int
    lock: TextIO | None = None

    @classmethod
    def claim(cls, wanted: str | None, name: str, rank: int, argv: list[str], resume: bool = False) -> RunFolder:
        """Make the folder and mark it as taken.

        Args:
            resume: go on with what an interrupted run of the same arguments left in ``wanted``.

        Raises:
            RunError: ``wanted`` holds a run already (finished, still running, or begun with other arguments).
        """
        stamp = datetime.datetime.now(datetime.timezone.utc)
        # absolute: lmms-eval would read a bare number as an int
        base = Path(wanted) if wanted else Path("logs") / f"{stamp:%Y%m%d_%H%M%S}_{name}"
        path = base.expanduser().resolve()
        if "," in str(path) or "=" in str(path):
            raise RunError(f"--output_path {path} holds a ',' or '=', which lmms-eval cannot read; choose another.")
        if rank != 0:
            return cls(path, rank)
        claim = {"command": shlex.join(argv), "started": stamp.isoformat(), "code": code_hash()}
        if resume:
            return cls._take_up(path, claim)
        number = 1
        while True:
            path.mkdir(parents=True, exist_ok=True)
            if wanted and _holds_results(path):
                raise RunError(f"{path} holds the results of a run; choose another --output_path or delete it.")
            try:
                with open(path / CLAIM, "x", encoding="utf-8") as file:
                    json.dump(claim, file, indent=2)
                break
            except FileExistsError:
                if wanted:
                    raise RunError(
                        f"{path} belongs to another run ({CLAIM}); choose another --output_path, or add --resume if it "
                        "was interrupted."
                    ) from None
                number += 1
                path = base.with_name(f"{base.name}_{number}").resolve()
        (path / FAILED).unlink(missing_ok=True)
        shutil.rmtree(path / ANSWERS, ignore_errors=True)  # of a failed run; --resume would have gone on with them
        return cls(path, rank, _locked(path / CLAIM))

    @classmethod
    def _take_up(cls, path: Path, claim: dict[str, str]) -> RunFolder:
        path.mkdir(parents=True, exist_ok=True)
        if (path / SUMMARY).exists():
            raise RunError(f"{path} holds the results of a run; there is nothing to resume.")
        for file in (path / CLAIM, path / FAILED):
            before = _read(file)
            _check_same(path, before, claim)
            claim["started"] = before.get("started", claim["started"])
        with open(path / CLAIM, "a", encoding="utf-8"):
            pass
        lock = _locked(path / CLAIM)
        with open(path / CLAIM, "r+", encoding="utf-8") as file:  # in place: the lock is on this file
            file.write(json.dumps(claim, indent=2))
            file.truncate()
        (path / FAILED).unlink(missing_ok=True)
        return cls(path, 0, lock)

    @property
    def answers(self) -> Path:
        """Where the answers are kept until the run is complete."""
        return self.path / ANSWERS

    @property
    def provenance(self) -> Path:
        """Where the tokens that a method kept in the first documents are saved."""
        return self.path / PROVENANCE

    @property
    def started(self) -> str | None:
        """When the run began, which tells its files from those that a failed attempt left in the same folder."""
        return _read(self.path / CLAIM).get("started")

    def release(self) -> None:
        """Give the folder up (a listing, or a failure: the same path may be used again)."""
        if self.rank == 0:
            self._unlock()
            (self.path / CLAIM).unlink(missing_ok=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()

    def failed(self, error: BaseException) -> None:
        """Write down why; the answers stay for ``--resume``."""
        if self.rank == 0:
            claim = _read(self.path / CLAIM)
            files.write_json(self.path / FAILED, {"error": type(error).__name__, "reason": str(error), **claim})
            self.release()

    def finish(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json`` and ``efficiency.json``: with them the run is complete."""
        files.write_json(self.path / EFFICIENCY, summary["costs"])
        files.write_json(self.path / SUMMARY, summary)
        shutil.rmtree(self.answers, ignore_errors=True)  # the samples files hold them all
        self._unlock()

    def _unlock(self) -> None:
        if self.lock is not None:
            self.lock.close()
            self.lock = None


def finished(folder: Path, argv: list[str]) -> bool:
    """Whether ``folder`` holds the results of a run with these arguments and this code.

    Raises:
        RunError: it holds those of another run.
    """
    if not (folder / SUMMARY).exists():
        return False
    _check_same(folder, _read(folder / CLAIM), {"command": shlex.join(argv), "code": code_hash()})
    return True


def _read(path: Path) -> dict[str, str]:
    """A claim; empty if there is none, or if the process was killed while it wrote it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _check_same(path: Path, before: dict[str, str], now: dict[str, str]) -> None:
    if before.get("command", now["command"]) != now["command"]:
        raise RunError(
            f"{path} was begun with other arguments; choose another --output_path or delete it.\n"
            f"  then: {before['command']}\n  now:  {now['command']}"
        )
    if before.get("code", now["code"]) != now["code"]:
        raise RunError(
            f"{path} was begun with another state of the code ({before['code']}, now {now['code']}); results of both "
            "are not mixed: choose another --output_path or delete it."
        )


def _locked(path: Path) -> TextIO | None:
    """Hold ``path`` as long as this process lives; None on a system or file system without locks.

    Raises:
        RunError: another process holds it.
    """
    file = path.open("r+", encoding="utf-8")
    try:
        missing = files.lock(file)
    except BlockingIOError:
        file.close()
        raise RunError(f"{path.parent} is being written by a run that is still going on.") from None
    if missing:
        file.close()
        return None
    return file


def _holds_results(path: Path) -> bool:
    patterns = ("*_results.json", "*_samples_*.jsonl", SUMMARY)
    return any(next(path.rglob(pattern), None) is not None for pattern in patterns)
