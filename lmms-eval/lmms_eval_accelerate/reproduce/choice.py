"""What the user asked for, and which parts, rows and columns of a table that are."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate_methods.bench.matching import Target, parameter_of, with_budget
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.stages.errors import MethodError, UnknownNameError
from lmms_eval_accelerate import embedded
from lmms_eval_accelerate.reproduce import guards
from lmms_eval_accelerate.reproduce.schema import DENSE, Column, Part, Table, TableRow
from lmms_eval_accelerate.runs.command_line import read
from lmms_eval_accelerate.runs.folder import RunError

if TYPE_CHECKING:
    from lmms_eval_accelerate.reproduce.plan import Unit

EMBEDDED = "embedded"  # in place of a checkpoint: the embedded model
#: arguments of lmms-eval's command line that this command sets itself, and what to use instead
_OURS = {
    **{"--model": "the table", "--model_args": "--model-args", "--tasks": "--columns", "--limit": "--limit"},
    **{"--batch_size": "--batch-size", "-b": "--batch-size", "--output_path": "--output", "--config": "--model-args"},
}
_NO_TABLE = {
    **dict.fromkeys(("--predict_only", "-x"), "gives no scores"),
    "--offset": "measures other documents than the table's",
}
_CACHES = ("--use_cache", "-c", "--allow_cache", "--cache_requests")


@dataclasses.dataclass(frozen=True)
class Choices:
    """What the user asked for. None: the table's own."""

    table: str
    part: str | None = None
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    limit: int | None = None
    pretrained: str | None = None
    model_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batch_size: int = 1
    data: Path | None = None
    extra: tuple[str, ...] = ()  # further arguments of lmms-eval
    match: str | None = None  # "tokens=0.25": budgets are solved for this in place of the table's

    def other_model(self, part: Part) -> bool:
        """Whether another checkpoint than the paper's is run, so that the published numbers are not its numbers.

        A folder or hub name that ends as the part's own is a copy of it; the guards look at its shape.
        """
        own = str(part.model.get("pretrained") or "")
        return self.pretrained is not None and model_name(self.pretrained) != model_name(own)

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


@dataclasses.dataclass
class ChosenPart:
    """The chosen rows and columns of one part."""

    part: Part
    rows: list[TableRow]
    columns: list[Column]
    #: (row name, column title) -> unit; rows that are not run have none
    units: dict[tuple[str, str], Unit] = dataclasses.field(default_factory=dict)


def select(table: Table, choices: Choices) -> list[ChosenPart]:
    """The parts with the chosen rows (dense always among them) and columns.

    Raises:
        UnknownNameError: a part, row or column that the table lacks.
        MethodError: nothing is left; or the given checkpoint is of another family than a chosen part, has the name of
            its checkpoint and another shape, or could stand for the models of several parts.
    """
    parts = [_named(table.parts, choices.part, "part", lambda p: p.name)] if choices.part else list(table.parts)
    if choices.pretrained == EMBEDDED:
        parts = _fit_for_embedded(parts, table)
    rows = [row for part in parts for row in part.rows]
    wanted = {row.name for name in choices.rows for row in _rows(rows, name)}
    titles = list(dict.fromkeys(column.title for part in parts for column in part.columns))
    columns = {_named(titles, name, "column", str) for name in choices.columns} or set(titles)
    chosen = []
    for part in parts:
        here = [r for r in part.rows if not wanted or r.name in wanted or r.dense]
        there = [column for column in part.columns if column.title in columns]
        only_dense = bool(wanted - {DENSE}) and len(here) == 1
        if (there or part.not_run) and not only_dense:
            chosen.append(ChosenPart(part, here, there))
    if not any(selection.columns for selection in chosen if not selection.part.not_run):
        if all(part.not_run for part in table.parts):
            reasons = "; ".join(f"{part.name}: {part.not_run}" for part in table.parts)
            raise MethodError(f"nothing of table {table.name} can be run: {reasons}.")
        raise MethodError(f"no part of table {table.name} that can be run has both the chosen rows and columns.")
    if choices.pretrained is not None:
        _check_given(choices, [selection.part for selection in chosen if not selection.part.not_run])
        chosen = [_fitting(selection, choices) for selection in chosen]
    if choices.match is not None:
        chosen = [equal_budgets(selection, Target.of(choices.match)) for selection in chosen]
    return chosen


def equal_budgets(selection: ChosenPart, target: Target) -> ChosenPart:
    """A row per method, the budget of each to be solved for ``target``, in place of the table's rows and numbers.

    Rows that differ in their budget alone become one; those without a free budget stay as they are, with the reason.
    """
    rows: dict[Any, TableRow] = {}
    for row in selection.rows:
        if row.pipeline is None:
            continue
        plain = dataclasses.replace(row, published={}, unmeasured={}, tflops=None, secondary=False)
        if row.dense or len(row.pipeline.methods) != 1:
            rows.setdefault(row.name, plain)
            continue
        (method,) = row.pipeline.methods
        try:
            parameter = parameter_of(type(method), target.kind)
        except MethodError as error:
            rows.setdefault(row.name, dataclasses.replace(plain, note=f"not matched: {error}"))
            continue
        own = set(method.budget_fields())
        pipeline = Pipeline((with_budget(method, parameter, target.value),), row.pipeline.models)
        same = [r for r in rows.values() if r.pipeline == pipeline]
        if not same:
            name = method.name if method.name not in rows else row.name
            params = {key: value for key, value in row.params.items() if key not in own} | {parameter: target.value}
            arguments = {"match": str(target).replace("=", ":")}
            new = dataclasses.replace(plain, name=name, pipeline=pipeline, params=params, arguments=arguments)
            rows[name] = dataclasses.replace(new, note=f"budget solved for {target}")
    return dataclasses.replace(selection, rows=list(rows.values()))


def model_name(pretrained: str) -> str:
    """Last part of a folder or hub name, in small letters; of a snapshot in the hub's cache the repository's."""
    parts = Path(pretrained).parts
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
    return (cached or [Path(pretrained).name])[-1].lower()


def given_config(pretrained: str) -> dict[str, Any]:
    """``config.json`` of a given checkpoint folder; empty for a hub name."""
    path = (embedded.MODEL if pretrained == EMBEDDED else Path(pretrained).expanduser()) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise MethodError(f"cannot read {path}: {error}") from error
    return {**(config.get("text_config") or {}), **config}


def _check_given(choices: Choices, parts: list[Part]) -> None:
    """Refuse a checkpoint that cannot stand in the place of the parts' own."""
    given, config = choices.pretrained, given_config(choices.pretrained)
    models = dict.fromkeys(str(part.model["pretrained"]) for part in parts)
    if given != EMBEDDED and len(models) > 1:
        raise MethodError(
            f"--pretrained {given} would take the place of {' and '.join(models)}; say of which with --part: "
            f"{', '.join(repr(part.name) for part in parts)}."
        )
    kind = [config.get("model_type"), *(config.get("architectures") or ())]
    for part in parts:
        own, here = part.model["pretrained"], f"{part.name} is {part.family}"
        family = None if given == EMBEDDED else guards.family_of(model_name(given))
        if family not in (None, part.family):
            raise MethodError(f"--pretrained {given} is a {family} model by its name; part {here}.")
        if part.model_class is not None:
            built = config.get("architectures") or [part.model_class]
            if part.model_class not in built:
                raise MethodError(f"--pretrained {given} is a {built[0]}; {part.name} is a {part.model_class}.")
        elif any(kind) and not any("llava" in str(word).lower() for word in kind):
            raise MethodError(f"--pretrained {given} is a {kind[0] or kind[1]} model; part {here}.")
        wrong = {k: config[k] for k, v in part.checkpoint.items() if config.get(k) not in (None, v)}
        if wrong and not choices.other_model(part):
            found = ", ".join(f"{k} {v}, not {part.checkpoint[k]}" for k, v in wrong.items())
            raise MethodError(
                f"--pretrained {given} has the name of the paper's checkpoint ({own}), but another shape: {found}."
            )


def _fitting(selection: ChosenPart, choices: Choices) -> ChosenPart:
    """Rows whose methods name layers that the given checkpoint lacks are not run, with the reason."""
    layers = given_config(choices.pretrained).get("num_hidden_layers")
    if not isinstance(layers, int):
        return selection
    rows = []
    for row in selection.rows:
        try:
            if row.pipeline is not None:
                row.pipeline.check_layers(layers)
        except MethodError as error:
            reason = f"the given checkpoint is too shallow: {str(error).rstrip('.')}"
            row = dataclasses.replace(row, pipeline=None, not_run=reason)
        rows.append(row)
    left = [row for row in rows if row.pipeline is not None]
    if len(left) == 1 and any(r.pipeline is not None for r in selection.rows[1:]):
        reasons = "; ".join(f"{r.name}: {r.not_run}" for r in rows if r.pipeline is None)
        raise MethodError(f"part {selection.part.name}: no row but the dense one can be run ({reasons}).")
    return dataclasses.replace(selection, rows=rows)


def _fit_for_embedded(parts: list[Part], table: Table) -> list[Part]:
    fit = [part for part in parts if part.family in embedded.FAMILIES and not part.not_run]
    if not fit:
        raise MethodError(
            f"the embedded model runs as {' or '.join(embedded.FAMILIES)}; table {table.name} needs "
            f"{', '.join(dict.fromkeys(str(p.family) for p in parts))}. Choose another table or part."
        )
    return fit


def _rows(rows: list[TableRow], name: str) -> list[TableRow]:
    """The rows called ``name``, or all rows of the method ``name``."""
    of_method = [r for r in rows if not r.dense and r.pipeline is not None and r.pipeline.name == name]
    if of_method:
        return of_method
    found = _named(rows, name, "row", lambda r: r.name)
    return [row for row in rows if row.name == found.name]


def _named(things: Sequence[Any], name: str, what: str, key: Any) -> Any:
    """The thing called ``name``, upper and lower case alike."""
    for thing in things:
        if key(thing).casefold() == name.casefold():
            return thing
    raise UnknownNameError(what, name, {key(t) for t in things})


def check_extra(extra: Sequence[str]) -> None:
    """Refuse arguments for lmms-eval that would contradict the table, take answers out of a cache, or are none of its.

    Raises:
        MethodError: with what to use instead.
    """
    for word in extra:
        flag = word.partition("=")[0]
        if short := re.match("-w*([bcx])", word):  # -b4, -cfolder, and behind -w, which takes no value
            flag = f"-{short[1]}"
        if _is_one_of(flag, _CACHES):
            raise MethodError(
                f"{flag} takes answers or requests from a cache of lmms-eval, such as its response cache: they have no "
                "times and may be those of another setting. A killed run goes on where it stopped without it: start "
                "the same command again."
            )
        for name, why in _NO_TABLE.items():
            if _is_one_of(flag, (name,)):
                raise MethodError(f"{flag} {why}.")
        for name in _OURS:
            if _is_one_of(flag, (name,)):
                raise MethodError(f"{flag} is set by this command; use {_OURS[name]}.")
    try:
        read(list(extra))
    except RunError as error:
        raise MethodError(f"behind --: {error}") from error


def _is_one_of(flag: str, names: Sequence[str]) -> bool:
    """Whether lmms-eval could read ``flag`` as one of ``names``; it takes unique beginnings of long names, too."""
    return flag in names or (len(flag) > 3 and flag[:2] == "--" and any(name.startswith(flag) for name in names))
