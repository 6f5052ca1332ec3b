"""The command line of a run, read as lmms-eval reads it and checked before anything is loaded."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from accelerate_methods.registry.yaml_files import read_yaml
from accelerate_methods.stages.errors import MethodError, UnknownNameError
from lmms_eval_accelerate import embedded
from lmms_eval_accelerate.benchmarks.catalog import require_judges
from lmms_eval_accelerate.benchmarks.task_names import checked_tasks
from lmms_eval_accelerate.manifest import model_ids
from lmms_eval_accelerate.model_args import meant, split_arguments
from lmms_eval_accelerate.runs.folder import RunError
from lmms_eval_accelerate.runs.options import documents

_LISTINGS = ("list", "list_groups", "list_tags", "list_subtasks")
_TYPES = {"int": int, "float": float, "str": str}
_KEPT = ("action", "dest", "default", "choices", "const", "nargs")
#: options that would be ignored, or end a run, with the models of this plugin -> what is wrong
_NOT_OURS = {
    "num_fewshot": "the examples that lmms-eval puts in front are text without their images or videos",
    "fewshot_as_multiturn": "the examples that lmms-eval puts in front are text without their images or videos",
    "apply_chat_template": "every model applies its own template (conv_template, chat_template)",
}


def own_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options that this command must know, and the arguments that go to lmms-eval.

    Raises:
        RunError, MethodError: options that lmms-eval does not have, are not written in full or contradict each other, a
            judge without a key, missing data.
    """
    own, passed = own_parser().parse_known_args(argv)
    seen = read(argv)
    file = _config_file(seen.config) if seen.config else {}
    nothing_given = read([])
    for name, default in vars(nothing_given).items():
        value = getattr(seen, name)
        setattr(own, name, file[name] if value == default and name in file else value)
    own.listing = own.tasks in _LISTINGS
    own.predict_only = own.predict_only or own.allow_no_score
    if own.resume and not own.output_path:
        raise RunError("--resume needs the --output_path of the run that was interrupted.")
    if own.use_cache is not None and not own.allow_cache:
        raise RunError("--use_cache gives answers without costs; add --allow_cache if that is meant.")
    if not own.listing:
        _check_values(own)
        if own.tasks and not os.path.isdir(own.tasks):  # a folder of task files
            more = own.include_path or ()
            checked_tasks(own.tasks, [more] if isinstance(more, str) else more)
        embedded.require_tasks(own.tasks or "")
        if not own.predict_only:
            require_judges(own.tasks or "", os.environ)
    return own, passed


def own_parser() -> argparse.ArgumentParser:
    """The options that lmms-eval does not have, or that this command reads itself."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output_path", help="folder of the run, samples included (default: a new one below logs/)")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run in --output_path")
    parser.add_argument("--allow_no_score", action="store_true", help="a task without any number is no failure")
    parser.add_argument("--allow_cache", action="store_true", help="let --use_cache give answers without costs")
    parser.add_argument("--log_samples", action="store_true", help=argparse.SUPPRESS)  # always on
    return parser


def read(argv: list[str]) -> argparse.Namespace:
    """All options, lmms-eval's and ours, by lmms-eval's rules; but their names have to be written in full.

    lmms-eval also takes the beginning of a name. What begins like an option that this command refuses, or reads itself,
    would pass it by.

    Raises:
        RunError: a name that is unknown or not complete, a value that is missing or of another type.
    """
    parser = _parser()
    seen, rest = parser.parse_known_args(argv)
    known = [name for action in parser._actions for name in action.option_strings]
    for word in rest:
        name = word.partition("=")[0]
        full = [option for option in known if len(name) > 2 and option.startswith(name)]
        if full:
            raise RunError(f"{name} is not written in full; write {' or '.join(full)}.")
        if word.startswith("-"):
            raise RunError(str(UnknownNameError("option", name, known)))
        raise RunError(f"{word!r} belongs to no option.")
    return seen


class _Parser(argparse.ArgumentParser):
    """A mistake is an error, not the end of the process with a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise RunError(message)


@functools.cache
def _parser() -> argparse.ArgumentParser:
    """Options of lmms-eval as its source adds them, and ours. Importing it, only to say what is wrong, takes long."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    (folder,) = importlib.util.find_spec("lmms_eval").submodule_search_locations
    source = ast.parse(Path(folder, "__main__.py").read_text(encoding="utf-8"))
    functions = (node for node in source.body if isinstance(node, ast.FunctionDef) and node.name == "parse_eval_args")
    calls = (node for function in functions for node in ast.walk(function) if isinstance(node, ast.Call))
    for call in calls:
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            names = [name.value for name in call.args if isinstance(name, ast.Constant)]
            parser.add_argument(*names, **_keywords(call))
    taken = {name for action in parser._actions for name in action.option_strings}
    if "--model_args" not in taken:
        raise RunError(f"cannot read the options of lmms-eval in {folder}; this plugin is made for version 0.7.3.")
    for action in own_parser()._actions:
        if not taken & set(action.option_strings):
            parser._add_action(action)
    return parser


def _keywords(call: ast.Call) -> dict[str, Any]:
    """What an ``add_argument`` says of how an option is read; a type that is computed is left to lmms-eval."""
    found: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg == "type" and isinstance(keyword.value, ast.Name) and keyword.value.id in _TYPES:
            found["type"] = _TYPES[keyword.value.id]
        elif keyword.arg in _KEPT and isinstance(keyword.value, (ast.Constant, ast.List, ast.Tuple)):
            found[keyword.arg] = ast.literal_eval(keyword.value)
    return found


def _check_values(own: argparse.Namespace) -> None:
    """Refuse values that would be ignored, or would end the run after minutes."""
    if not own.tasks and not (own.power_analysis or own.tui):
        raise RunError("name what is evaluated with --tasks NAME,...; --tasks list shows all names.")
    if own.limit is not None:
        try:
            documents(f"{own.limit:g}" if isinstance(own.limit, float) else str(own.limit))
        except argparse.ArgumentTypeError as error:
            raise RunError(f"--limit: {error}.") from error
    for name in ("gen_kwargs", "model_args"):
        if not isinstance(getattr(own, name), str):
            raise RunError(f"{name} of the config file must be text, k=v,k=v, as --{name} takes it.")
    family, _ = model_ids().get(own.model, (None, None))
    if family is None:
        return  # a model of lmms-eval itself
    for name, why in _NOT_OURS.items():
        if getattr(own, name):
            raise RunError(f"--{name} is not possible with {own.model}: {why}.")
    if own.system_instruction is not None and family == "hf":
        raise RunError("--system_instruction would be ignored by a chat model; use the model argument system_prompt=.")
    from lmms_eval_accelerate.models.generation import check_given  # loads torch, which help and listings do without

    check_given(own.gen_kwargs, family, _model_arguments(own.model_args))


def _model_arguments(text: str) -> Mapping[str, Any]:
    found = {}
    for piece in split_arguments(text) if text.strip() else ():
        key, equals, value = piece.partition("=")
        if not equals:
            raise MethodError(f"--model_args: {piece!r} is not of the form name=value.")
        found[key] = meant(value)
    return found


def _config_file(path: str) -> dict[str, Any]:
    try:
        content = read_yaml(path)
    except MethodError as error:
        raise RunError(f"--config: {error}") from error
    if isinstance(content, list):
        if len(content) != 1:
            raise RunError(f"{path} describes {len(content)} runs; start this command once per run (one folder each).")
        content = content[0]
    if not isinstance(content or {}, dict):
        raise RunError(f"{path} must hold options of lmms-eval with their values, not {type(content).__name__}.")
    allowed = {*vars(read([])), "env"}
    for key in content or {}:
        if key not in allowed:
            raise RunError(f"{path}: {UnknownNameError('option', str(key), allowed)}")
    return content or {}
