"""The folder of a run: one run each, claimed before the run and completed or marked as failed after it."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

from lmms_eval_accelerate.arguments import short_hash

CLAIM, FAILED, SUMMARY, EFFICIENCY = "run.json", "failed.json", "summary.json", "efficiency.json"


class RunError(RuntimeError):
    """A run that cannot start or did not produce what it should have."""


def run_name(model: str, model_args: str) -> str:
    """Readable and specific: model id (or method) and a hash of the arguments."""
    return f"{re.sub(r'[^A-Za-z0-9_.+-]+', '_', model or 'run')}_{short_hash([model, model_args])}"


@dataclasses.dataclass
class RunFolder:
    """Folder of one run; only rank 0 writes."""

    path: Path
    rank: int

    @classmethod
    def claim(cls, wanted: str | None, name: str, rank: int, argv: list[str]) -> RunFolder:
        """Make the folder and mark it as taken.

        Raises:
            RunError: ``wanted`` holds a run already (finished, or still running).
        """
        stamp = datetime.datetime.now(datetime.timezone.utc)
        # absolute: lmms-eval would read a bare number as an int
        base = Path(wanted) if wanted else Path("logs") / f"{stamp:%Y%m%d_%H%M%S}_{name}"
        path = base.expanduser().resolve()
        if "," in str(path) or "=" in str(path):
            raise RunError(f"--output_path {path} holds a ',' or '=', which lmms-eval cannot read; choose another.")
        if rank != 0:
            return cls(path, rank)
        number = 1
        while True:
            path.mkdir(parents=True, exist_ok=True)
            if wanted and _holds_results(path):
                raise RunError(f"{path} holds the results of a run; choose another --output_path or delete it.")
            try:
                with open(path / CLAIM, "x", encoding="utf-8") as file:
                    json.dump({"command": shlex.join(argv), "started": stamp.isoformat()}, file, indent=2)
                break
            except FileExistsError:
                if wanted:
                    raise RunError(f"{path} belongs to another run ({CLAIM}); choose another --output_path.") from None
                number += 1
                path = base.with_name(f"{base.name}_{number}").resolve()
        (path / FAILED).unlink(missing_ok=True)
        return cls(path, rank)

    def release(self) -> None:
        """Give the folder up (a listing, or a failure: the same path may be used again)."""
        if self.rank == 0:
            (self.path / CLAIM).unlink(missing_ok=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()

    def failed(self, error: BaseException) -> None:
        if self.rank == 0:
            reason = {"error": type(error).__name__, "reason": str(error)}
            (self.path / FAILED).write_text(json.dumps(reason, indent=2) + "\n", encoding="utf-8")
            self.release()

    def finish(self, outcome: dict[str, Any], options: argparse.Namespace) -> None:
        """Check the results and write ``summary.json`` and ``efficiency.json``; print them.

        Raises:
            RunError: no results, or a task without a number.
        """
        from lmms_eval_accelerate import summary

        results, samples = outcome.get("results"), outcome.get("samples")
        if not results:
            raise RunError("lmms-eval returned no results.")
        if not list(self.path.rglob("*_results.json")):
            raise RunError(f"lmms-eval wrote no results file below {self.path}.")
        if not options.predict_only:
            check_scores(results)
        report = summary.build(results, samples or {}, options)
        dump(self.path / EFFICIENCY, report["costs"])
        dump(self.path / SUMMARY, report)
        summary.show(report, self.path)


def check_scores(results: dict[str, Any]) -> None:
    """Every task must have at least one number, and none may be NaN."""
    groups = set(results.get("group_subtasks", {}))
    for task, values in results.get("results", {}).items():
        numbers = scores(values)
        if not numbers and not (task in groups and results["group_subtasks"][task]):
            raise RunError(f"task {task} has no score (found: {values}); for submission tasks add --allow_no_score.")
        bad = [name for name, number in numbers.items() if math.isnan(number)]
        if bad:
            raise RunError(f"task {task}: {', '.join(bad)} is NaN.")
    if not results.get("results"):
        raise RunError("no task has results.")


def scores(values: dict[str, Any]) -> dict[str, float]:
    """Metrics of one task without standard errors and bookkeeping; ``exact_match,none`` becomes ``exact_match``."""
    numbers = {}
    for key, value in values.items():
        name, _, kind = key.partition(",")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and kind and "stderr" not in name:
            numbers[name if kind == "none" else key] = float(value)
    return numbers


def dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")


def _holds_results(path: Path) -> bool:
    patterns = ("*_results.json", "*_samples_*.jsonl", SUMMARY)
    return any(next(path.rglob(pattern), None) is not None for pattern in patterns)
