"""What a table needs: one unit per row and task, each with everything that can change its answers and numbers.

A unit is one run of ``python -m lmms_eval_accelerate``. Its folder carries a hash of :attr:`Unit.identity`, so results
of two settings, checkpoints, data folders, machines or states of the code can never stand for each other.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate_methods.registry.pipeline import resolve
from accelerate_methods.stages.errors import MethodError, UnknownNameError
from lmms_eval_accelerate import ROOT, embedded
from lmms_eval_accelerate.benchmarks import contents
from lmms_eval_accelerate.manifest import any_method
from lmms_eval_accelerate.models.arguments import parse
from lmms_eval_accelerate.reproduce.choice import EMBEDDED, Choices, ChosenPart, check_extra
from lmms_eval_accelerate.reproduce.schema import Column, Part, TableRow
from lmms_eval_accelerate.reproduce.tables import MODEL_KEYS
from lmms_eval_accelerate.runs.files import RUNS
from lmms_eval_accelerate.runs.fingerprint import checkpoint_facts, code_hash, short_hash, versions
from lmms_eval_accelerate.runs.launch import Machines, gpus
from lmms_eval_accelerate.runs.request import Request, Run

#: model arguments that no table decides, and those that have an option of this command
_OF_THE_RUN = ("device", "device_map", "on_error", "on_long_prompt", "save_provenance")
_OPTIONS = {"pretrained": "--pretrained", "batch_size": "--batch-size", "gpus_per_model": "--gpus-per-model"}
#: settings that choose the judge of ActivityNet-QA and Video-ChatGPT (never its key)
JUDGE = ("API_TYPE", "OPENAI_API_URL", "MODEL_VERSION")


@dataclasses.dataclass(frozen=True)
class Unit:
    """One run: a row of a part on one task.

    Attributes:
        part, row: the first ones that need it; others with the same identity share it.
        argv: arguments of the plugin's command without the output folder.
        identity: JSON-able; everything that can change an answer or a number.
        weights: equal where units can share the loaded weights.
        tasks: what has results: the task, or the subtasks of a group.
    """

    part: str
    row: str
    task: str
    argv: tuple[str, ...]
    identity: dict[str, Any]
    folder: Path
    dense: bool
    weights: str
    tasks: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.row}, {self.task}"

    @property
    def hash(self) -> str:
        return short_hash(self.identity)

    def run(self) -> Run:
        return Run(self.name, self.folder, self.argv)


def plan(selections: list[ChosenPart], choices: Choices, machines: Machines, output: Path) -> list[Unit]:
    """All units, dense first within a model and units of one model together; fills ``selection.units``.

    Raises:
        MethodError: arguments that contradict the table, or that would spoil the measurement.
    """
    check_extra(choices.extra)
    shared = _shared(choices, machines)
    data: dict[str, Any] = {}  # read once per benchmark: a folder may hold thousands of videos
    units: dict[tuple[str, str], Unit] = {}
    order: list[tuple[int, int, int, Unit]] = []
    models: dict[str, int] = {}
    for selection in selections:
        if selection.part.not_run:
            continue
        part, common = selection.part, _model_arguments(selection.part, choices)
        of_part = {
            **shared,
            "model": any_method(part.family),
            "checkpoint": checkpoint_facts(common["pretrained"]),
        }
        for number, row in enumerate(r for r in selection.rows if r.pipeline is not None):
            for column in selection.columns:
                measured = column.benchmark
                if measured.name not in data:
                    data[measured.name] = contents.facts(measured, choices.data)
                unit = _unit(part, row, column, choices, common, {**of_part, "data": data[measured.name]}, output)
                known = units.setdefault((unit.task, unit.hash), unit)
                selection.units[row.name, column.title] = known
                if known is unit:
                    weights = models.setdefault(unit.weights, len(models))
                    order.append((weights, 0 if unit.dense else 1, number, unit))
    return [unit for *_, unit in sorted(order, key=lambda entry: entry[:3])]


def _shared(choices: Choices, machines: Machines) -> dict[str, Any]:
    """The part of the identity that all units have in common."""
    return {
        "format": 1,
        "limit": choices.limit,
        "batch_size": choices.batch_size,
        "processes": machines.processes,
        "machines": machines.machines,
        "gpus_per_model": machines.gpus_per_model,
        "extra": list(choices.extra),
        "device": device(),
        "versions": versions(),
        "code": code_hash(),
    }


def _unit(
    part: Part,
    row: TableRow,
    column: Column,
    choices: Choices,
    common: Mapping[str, Any],
    shared: Mapping[str, Any],
    output: Path,
) -> Unit:
    measured = column.benchmark
    arguments = {**common, **row.model_args()}
    _check_method(row, arguments)
    identity = {
        **shared,
        "model_args": arguments,
        "methods": row.pipeline.to_dict(),
        "task": measured.task,
        "judge": judge_facts() if measured.needs_judge else None,
    }
    identity = json.loads(json.dumps(identity, default=str))
    limits = {"batch_size": choices.batch_size, "limit": choices.limit}
    argv = Request(identity["model"], arguments, measured.task, **limits, extra=choices.extra).argv()
    parse(shared["model"], arguments)  # what the run would refuse
    folder = output / RUNS / measured.task / f"{row.folder}_{short_hash(identity)}"
    weights = short_hash([identity["model"], common])
    return Unit(part.name, row.name, measured.task, argv, identity, folder, row.dense, weights, measured.tasks)


def _model_arguments(part: Part, choices: Choices) -> dict[str, Any]:
    """Arguments that all rows of a part share."""
    pretrained = choices.pretrained or part.model["pretrained"]
    table = {k: v for k, v in part.model.items() if k not in ("family", "pretrained")}
    if pretrained == EMBEDDED:
        embedded.require_model()
        pretrained = str(embedded.MODEL)
        if not gpus():
            table.pop("dtype", None)  # half precision is slower than float32 on a CPU
    folder = Path(pretrained).expanduser()
    if choices.pretrained is None and not folder.is_dir():
        folder = ROOT / pretrained  # a table may name a checkpoint of this project
    if folder.is_dir():  # absolute: with a data folder the run has another working directory
        pretrained = str(folder.resolve())
    allowed = {*MODEL_KEYS[part.family], *_OF_THE_RUN} - {"pretrained"}
    for key in choices.model_args:
        if key not in allowed:
            hint = f" Use {_OPTIONS[key]}." if key in _OPTIONS else ""
            raise MethodError(
                f"--model-args {key}=...: not an argument that all rows of part {part.name} can share.{hint} "
                f"{UnknownNameError('argument', key, allowed)}"
            )
    return {"pretrained": pretrained, **table, **choices.model_args}


def _check_method(row: TableRow, arguments: Mapping[str, Any]) -> None:
    """The arguments must give the row's very method back (defaults and budgets could get in the way)."""
    own = {k: v for k, v in arguments.items() if k in row.method_args() and k != "method"}
    if resolve(row.method_args().get("method"), **own).to_dict() != row.pipeline.to_dict():
        raise MethodError(f"{row.pipeline.describe()} (row {row.name!r}) cannot be written as model arguments.")


def hub_commits(units: Sequence[Unit]) -> dict[str, str]:
    """Commits of the checkpoints that came from the hub, as its local cache has them now.

    Not part of the identity: before the first download there is none, so that a killed first command would not find its
    own units again, and machines with caches of their own would not agree on the list.
    """
    from huggingface_hub import constants

    found = {}
    for name in dict.fromkeys(unit.identity["model_args"]["pretrained"] for unit in units):
        main = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "refs" / "main"
        if not Path(name).is_absolute() and main.is_file():
            found[name] = main.read_text(encoding="utf-8").strip()
    return found


def judge_facts() -> dict[str, str | None]:
    """Which judge scores (its key does not matter, and must not be written down)."""
    return {name: os.environ.get(name) for name in JUDGE}


def device() -> str:
    """What answers come from: numbers of another device may differ in the last digit, times do."""
    if not gpus():
        return f"cpu ({platform.machine()})"
    import torch

    return torch.cuda.get_device_name(0)
