"""What a run is asked: a model with its arguments on tasks, and where its results go."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmms_eval_accelerate.model_args import joined

#: the plugin's command
MODULE = "lmms_eval_accelerate"


@dataclasses.dataclass(frozen=True)
class Request:
    """Arguments of ``lmms-eval-accelerate`` but for the output folder.

    Attributes:
        model: model id.
        model_args: arguments of the model, method and hyper-parameters among them.
        tasks: names with commas between them.
        limit: documents per task; None: all.
        extra: further arguments of lmms-eval.
    """

    model: str
    model_args: Mapping[str, Any]
    tasks: str
    batch_size: int | str = 1
    limit: int | str | None = None
    extra: tuple[str, ...] = ()

    def argv(self) -> tuple[str, ...]:
        """
        Raises:
            MethodError: a model argument that lmms-eval could not read.
        """
        return (
            *("--model", self.model, "--model_args", joined(self.model_args)),
            *("--tasks", self.tasks, "--batch_size", str(self.batch_size)),
            *(("--limit", str(self.limit)) if self.limit is not None else ()),
            *self.extra,
        )


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: its name in messages, its own folder, and what it is asked."""

    name: str
    output: Path
    argv: tuple[str, ...]

    def arguments(self) -> list[str]:
        """Of the command that does this run alone, going on where it was interrupted."""
        return [*self.argv, "--output_path", str(self.output), "--resume"]

    def command(self) -> list[str]:
        """That command in one process."""
        return [sys.executable, "-m", MODULE, *self.arguments()]
