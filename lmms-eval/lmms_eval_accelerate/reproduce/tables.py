"""The published tables, ``configs/reproduce/*.yaml``: models, settings, benchmarks, and the numbers that were printed.

    table, title, paper, source, secondary, note, relative (how "% of dense" is made: mean_of_ratios, ratio_of_means)
    parts:
      - name, model (arguments of --model_args with ``family``), checkpoint (what the right weights look like),
        model_class (of transformers, for the family hf),
        columns {title: {benchmark, metric, scale, note}}, unmeasured {title: why it is not measured here},
        source, secondary, note, not_run, relative
        rows:
          - name ("dense" is the first row), method or config, params, published {title: number}, tflops,
            source, secondary, note, not_run

Everything is checked when a table is loaded: keys, methods, parameters, benchmarks, whether a method runs on the family
and its layers exist in the model. Every error is one line that names file, part and row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate_methods.registry import compatibility
from accelerate_methods.registry.architectures import architecture_named
from accelerate_methods.registry.configs import read_config
from accelerate_methods.registry.families import keys
from accelerate_methods.registry.pipeline import Pipeline, resolve
from accelerate_methods.registry.yaml_files import read_yaml
from accelerate_methods.stages.errors import MethodError, UnknownNameError
from lmms_eval_accelerate import ROOT
from lmms_eval_accelerate.benchmarks.catalog import benchmark
from lmms_eval_accelerate.models.arguments import defaults_of
from lmms_eval_accelerate.reproduce.options import FOLDER, available
from lmms_eval_accelerate.reproduce.schema import DENSE, RELATIVE, Column, Part, Table, TableRow

__all__ = [
    *("DENSE", "FOLDER", "MODEL_KEYS", "OTHER_KEYS", "Column", "Part", "TableRow", "Table", "TableError"),
    *("available", "load"),
]

#: arguments of the plugin that are the row's (method, config) or the run's, not a setting of the model
OTHER_KEYS = (
    *("method", "config", "match", "device", "device_map", "gpus_per_model", "batch_size", "max_batch_size"),
    *("on_error", "on_long_prompt", "save_provenance"),
)
#: key of a family -> model arguments that a part may set: those of the plugin that belong to the setting
MODEL_KEYS: dict[str, tuple[str, ...]] = {
    key: tuple(name for name in defaults_of(key) if name not in OTHER_KEYS)
    for key in keys()
}
_CHECKPOINT_KEYS = ("hidden_size", "num_hidden_layers")
_TABLE_KEYS = ("table", "title", "paper", "source", "secondary", "note", "relative", "parts")
_PART_KEYS = (
    *("name", "model", "checkpoint", "columns", "unmeasured", "rows"),
    *("source", "secondary", "note", "not_run", "relative", "model_class"),
)
_COLUMN_KEYS = ("benchmark", "metric", "scale", "note")
_ROW_KEYS = (
    *("name", "method", "config", "params", "arguments", "published", "tflops"),
    *("source", "secondary", "note", "not_run"),
)


class TableError(MethodError):
    """A table file that cannot be used, in one line: file, part, row, and what is wrong."""


def load(table: str | Path) -> Table:
    """The table of a name, or of a path to a YAML file.

    Raises:
        UnknownNameError: no such table.
        TableError: the file says something impossible.
    """
    path = Path(table)
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{table}.yaml"
        if str(table) not in available():
            raise UnknownNameError("table", table, available())
    elif not path.is_file():
        raise TableError(f"{path}: no such file; tables here: {', '.join(available())}.")
    content = read_yaml(path, TableError)
    return _table(content, path)


def _table(content: Any, path: Path) -> Table:
    where = path.name
    content = _mapping(content, _TABLE_KEYS, where, needed=("table", "title", "paper", "source", "parts"))
    if content["table"] != path.stem:
        raise TableError(f"{where}: table is {content['table']!r}; it must be the file's name, {path.stem!r}.")
    parts = tuple(_part(part, content, where) for part in _list(content["parts"], f"{where}: parts"))
    _unique([part.name for part in parts], f"{where}: part")
    return Table(path.stem, content["title"], content["paper"], content["source"], content.get("note", ""), parts)


def _part(content: Any, table: Mapping[str, Any], where: str) -> Part:
    where = f"{where}: part {_name(content, f'{where}: part')}"
    content = _mapping(content, _PART_KEYS, where, needed=("model", "rows"))
    not_run = _text(content, "not_run", where)
    model = _model(content["model"], bool(not_run), f"{where}: model")
    checkpoint = _mapping(content.get("checkpoint", {}), _CHECKPOINT_KEYS, f"{where}: checkpoint")
    if not not_run and not all(isinstance(checkpoint.get(key), int) for key in _CHECKPOINT_KEYS):
        raise TableError(f"{where}: checkpoint needs {' and '.join(_CHECKPOINT_KEYS)}, as integers.")
    columns = tuple(
        _column(title, column, f"{where}: column {title}")
        for title, column in _mapping(content.get("columns", {}), None, f"{where}: columns").items()
    )
    if not columns and not not_run:
        raise TableError(f"{where}: no columns; a part without any needs not_run.")
    unmeasured = _mapping(content.get("unmeasured", {}), None, f"{where}: unmeasured")
    _unique([*(column.title for column in columns), *unmeasured], f"{where}: column")
    for title, why in unmeasured.items():
        if not isinstance(why, str) or not why:
            raise TableError(f"{where}: unmeasured: {title} needs a reason.")
    relative = content.get("relative", table.get("relative", RELATIVE[0]))
    if relative not in RELATIVE:
        raise TableError(f"{where}: {UnknownNameError('value of relative:', relative, RELATIVE)}")
    note = _text(content, "note", where)
    part = Part(content["name"], model, checkpoint, columns, unmeasured, (), note, not_run, relative)
    part = dataclasses.replace(part, model_class=_model_class(content, part, where))
    inherited = {key: content.get(key, table.get(key)) for key in ("source", "secondary")}
    rows = tuple(_row(row, part, inherited, where) for row in _list(content["rows"], f"{where}: rows"))
    _unique([row.folder for row in rows], f"{where}: row")
    if rows[0].name != DENSE:
        raise TableError(f"{where}: the first row is {rows[0].name!r}; it must be {DENSE!r}.")
    if rows[0].not_run and not not_run:
        raise TableError(f"{where}: the dense row is not run, but rows that need it for comparison are.")
    return dataclasses.replace(part, rows=rows)


def _model_class(content: Any, part: Part, where: str) -> str | None:
    """Class of transformers that a part's model is of; needed where one family key stands for many."""
    name = _text(content, "model_class", where) or None
    known = [c for family in keys().get(str(part.family), ()) for c in family.classes]
    if part.not_run or not (known or name):
        return None
    if name not in known:
        raise TableError(f"{where}: {UnknownNameError(f'model_class of the family {part.family}:', str(name), known)}")
    return name


def _model(content: Any, not_run: bool, where: str) -> dict[str, Any]:
    model = _mapping(content, None, where)
    if not_run:  # no model of ours; what is known of it
        return _mapping(content, None, where, needed=("family",))
    family = model.get("family")
    if family not in MODEL_KEYS:
        raise TableError(f"{where}: {UnknownNameError('family', family, MODEL_KEYS)}")
    model = dict(_mapping(content, ("family", *MODEL_KEYS[family]), where, needed=("pretrained",)))
    ours = ROOT / str(model["pretrained"])  # a checkpoint of the project, wherever the command is started
    return {**model, "pretrained": str(ours)} if ours.is_dir() else model


def _column(title: str, content: Any, where: str) -> Column:
    content = _mapping(content, _COLUMN_KEYS, where, needed=("benchmark",))
    try:
        found = benchmark(content["benchmark"])
    except UnknownNameError as error:
        raise TableError(f"{where}: {error}") from error
    scale = content.get("scale", found.scale)
    if not _is_number(scale) or scale <= 0:
        raise TableError(f"{where}: scale must be a number above 0, got {scale!r}.")
    return Column(title, found, content.get("metric", found.metric), scale, _text(content, "note", where))


def _row(content: Any, part: Part, inherited: Mapping[str, Any], where: str) -> TableRow:
    where = f"{where}: row {_name(content, f'{where}: row')}"
    content = _mapping(content, _ROW_KEYS, where)
    not_run = _text(content, "not_run", where) or part.not_run
    spec, params = _method(content, bool(not_run), where)
    arguments = _arguments(content, part, where)
    titles = [column.title for column in part.columns]
    numbers = _mapping(content.get("published", {}), [*titles, *part.unmeasured], f"{where}: published")
    if "tflops" in content:
        numbers = {**numbers, "tflops": content["tflops"]}
    for title, value in numbers.items():
        if not _is_number(value):
            raise TableError(f"{where}: {title} must be a number, got {value!r}.")
    secondary = content.get("secondary", inherited["secondary"]) or False
    if not isinstance(secondary, bool):
        raise TableError(f"{where}: secondary must be true or false, got {secondary!r}.")
    return TableRow(
        name=content["name"],
        method=spec,
        params=params,
        pipeline=None if not_run else _pipeline(spec, params, part, where),
        published={title: numbers[title] for title in titles if title in numbers},
        unmeasured={title: numbers[title] for title in part.unmeasured if title in numbers},
        tflops=numbers.get("tflops"),
        note=_text(content, "note", where),
        not_run=not_run,
        secondary=secondary,
        source=_text(content, "source", where) or inherited["source"],
        arguments=arguments,
    )


def _method(content: Mapping[str, Any], not_run: bool, where: str) -> tuple[str | None, dict[str, Any]]:
    """Method and parameters of a row: none for the dense one and for rows that are not run, needed for the others."""
    given = [content[key] for key in ("method", "config") if key in content]
    if not_run or content["name"] == DENSE:
        if given or "params" in content:
            why = "the dense row" if content["name"] == DENSE else "a row with not_run"
            raise TableError(f"{where}: {why} has no method, config or params.")
        return None, {}
    if not given and "arguments" in content:
        return None, {}
    if len(given) != 1 or not isinstance(given[0], str):
        raise TableError(f"{where}: give one of method, config, arguments and not_run.")
    return given[0], dict(_mapping(content.get("params") or {}, None, f"{where}: params"))


def _arguments(content: Mapping[str, Any], part: Part, where: str) -> dict[str, Any]:
    """Run parameters of a row, and ``max_frames_num``; of trained architectures only, what others are told belongs to
    the whole part."""
    given = _mapping(content.get("arguments", {}), None, f"{where}: arguments")
    entry = architecture_named(str(part.family))
    if given and entry is None:
        raise TableError(f"{where}: arguments are run parameters of a trained architecture; {part.family} has none.")
    frames = {name: given[name] for name in ("max_frames_num",) if name in given and "video" in entry.modalities}
    own = {name: value for name, value in given.items() if name not in frames}
    try:
        return {**frames, **{name: entry.argument(name).checked(entry.name, value) for name, value in own.items()}}
    except MethodError as error:
        raise TableError(f"{where}: {error}") from error


def _pipeline(spec: str | None, params: Mapping[str, Any], part: Part, where: str) -> Pipeline:
    try:
        pipeline = resolve(spec, **params)
        if spec is not None and not pipeline.methods:
            raise MethodError(f"{spec!r} is no method; only the row {DENSE!r} has none.")
        if spec is not None and "/" in spec:
            of_config = (read_config(spec).get("model") or {}).get("family", part.family)
            if of_config != part.family:
                raise MethodError(f"config {spec} is for the family {of_config}, this part is {part.family}.")
        compatibility.check(pipeline, part.family, part.model_class)
        pipeline.check_layers(part.checkpoint["num_hidden_layers"])
    except MethodError as error:
        raise TableError(f"{where}: {error}") from error
    return pipeline


def _mapping(content: Any, allowed: Iterable[str] | None, where: str, needed: tuple[str, ...] = ()) -> dict[Any, Any]:
    if not isinstance(content, dict):
        raise TableError(f"{where}: expected a mapping, found {type(content).__name__}.")
    for key in content:
        if not isinstance(key, str):
            raise TableError(f"{where}: the key {key!r} must be text; put it in quotes.")
        if allowed is not None and key not in allowed:
            raise TableError(f"{where}: {UnknownNameError('key', key, allowed)}")
    for key in needed:
        if not content.get(key):
            raise TableError(f"{where}: {key} is missing.")
    return content


def _list(content: Any, where: str) -> list[Any]:
    if not isinstance(content, list) or not content:
        raise TableError(f"{where}: expected a list with at least one entry.")
    return content


def _text(content: Mapping[str, Any], key: str, where: str) -> str:
    value = content.get(key) or ""
    if not isinstance(value, str):
        raise TableError(f"{where}: {key} must be text, got {value!r}.")
    return value


def _name(content: Any, where: str) -> str:
    name = content.get("name") if isinstance(content, dict) else None
    if not isinstance(name, str) or not name:
        raise TableError(f"{where} without a name; name must be text, got {name!r}.")
    return name


def _unique(names: list[str], where: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise TableError(f"{where} {name} is there twice.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
