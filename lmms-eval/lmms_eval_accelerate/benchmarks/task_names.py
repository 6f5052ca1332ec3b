"""The names that ``--tasks`` takes, read off the task files as text: lmms-eval itself takes a minute for that."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from accelerate_methods.stages.errors import MethodError
from lmms_eval_accelerate import TASKS

#: lines of a task file that name tasks, groups or tags: a key with its value, or an item of a list
_NAMES = re.compile(
    rb"""^[ \t-]*["']?(?:task|group|tag)["']?[ \t]*:([^\r\n#]*)|^[ \t]*-[ \t]+([\w.+"'-]+)[ \t]*\r?$""", re.MULTILINE
)
_WORD = re.compile(r"[\w.+-]+")


def checked_tasks(text: str, include: Sequence[str | Path] = ()) -> str:
    """Names of tasks with commas between them and nothing else, as lmms-eval splits them.

    Args:
        text: names, groups, tags or patterns (``mmlu_*``); spaces around a name are taken off.
        include: folders of further task files.

    Raises:
        MethodError: an empty name, one that is there twice, or one that no task file says.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if not name:
            raise MethodError(f"tasks {text!r}: an empty name; write NAME,NAME.")
        if names.count(name) > 1:
            raise MethodError(f"tasks {text!r}: {name} is there twice.")
        if name.endswith((".yaml", ".yml")) or "/" in name:
            if not Path(name).expanduser().exists():
                raise MethodError(f"tasks {text!r}: no such file: {name}.")
            continue
        known = task_names(tuple(map(str, include)))
        if name not in known and not fnmatch.filter(known, name):
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise MethodError(f"unknown task {name!r}.{hint} All names: lmms-eval-accelerate --tasks list.")
    return ",".join(names)


@functools.cache
def task_names(include: tuple[str, ...] = ()) -> frozenset[str]:
    """Every name in the files of lmms-eval, of this project, of the plug-ins of the environment and below ``include``.

    A few words that are no tasks are among them: lmms-eval decides, this only has to know what cannot be one.
    """
    found: set[str] = set()
    for file in _files([*_folders(), *include]):
        for match in _NAMES.finditer(file.read_bytes()):
            found.update(_WORD.findall(match[match.lastindex].decode("utf-8", "replace")))
    return frozenset(found)


def _folders() -> Iterator[str | Path]:
    yield TASKS
    for package in ("lmms_eval", *filter(None, os.environ.get("LMMS_EVAL_PLUGINS", "").split(","))):
        # not the specification of its tasks: that would import the package
        spec = importlib.util.find_spec(package) if "." not in package else None
        for place in spec.submodule_search_locations or () if spec is not None else ():
            yield Path(place) / "tasks"


def _files(folders: Sequence[str | Path]) -> Iterator[Path]:
    for folder in folders:
        for root, _, names in os.walk(folder):
            yield from (Path(root, name) for name in names if name.endswith(("yaml", ".yml")))  # "_template_yaml", too
