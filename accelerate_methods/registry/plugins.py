"""Methods and hosts that are not part of this project.

A package offers methods through the entry-point group ``accelerate_methods.methods`` (name = "module:Class"). A file
needs no package: the environment variable :data:`VARIABLE` names files or modules, separated as in ``PYTHONPATH``, and
whoever asks for methods or hosts imports them first. Processes that a command starts inherit it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import os
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from accelerate_methods.stages.errors import MethodError

VARIABLE = "ACCELERATE_METHODS_IMPORT"
GROUP = "accelerate_methods.methods"
_imported: set[str] = set()


def offered() -> list[EntryPoint]:
    """The methods that installed packages offer."""
    return list(_offered(tuple(sys.path)))


@functools.lru_cache(maxsize=1)  # every look reads the metadata of all packages
def _offered(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Those that can be found along ``sys.path``."""
    return tuple(entry_points(group=GROUP))


def named() -> list[str]:
    """What :data:`VARIABLE` names: absolute paths of files, and module names."""
    words = [word.strip() for word in os.environ.get(VARIABLE, "").split(os.pathsep)]
    return [str(_path(word)) if word.endswith(".py") else word for word in words if word]


def environment() -> dict[str, str]:
    """:data:`VARIABLE` for a process that starts in another folder; empty if it is not set."""
    return {VARIABLE: os.pathsep.join(named())} if named() else {}


def import_named() -> None:
    """Import what :data:`VARIABLE` names, each once per process.

    Raises:
        MethodError: a file that does not exist, or one that cannot be imported (with what went wrong in it).
    """
    for entry in named():
        if entry in _imported:
            continue
        _imported.add(entry)  # before the import: the file itself may ask for methods
        try:
            _import(entry)
        except Exception as error:
            _imported.discard(entry)
            if isinstance(error, FileNotFoundError) and error.filename == entry:
                raise MethodError(f"{VARIABLE}: there is no file {entry}.") from error
            raise MethodError(f"{VARIABLE}: {entry} cannot be imported: {type(error).__name__}: {error}") from error


def source_files() -> list[Path]:
    """The files that methods from outside stand in, for hashes of what a number depends on."""
    modules = [entry.module for entry in offered()]
    files = [Path(entry) for entry in named() if entry.endswith(".py")]
    for module in [*modules, *(entry for entry in named() if not entry.endswith(".py"))]:
        with contextlib.suppress(ImportError):  # whoever asks for the method is told
            spec = importlib.util.find_spec(module)
            if spec is not None and spec.origin is not None:
                files.append(Path(spec.origin))
    return sorted({file for file in files if file.is_file()})


def _import(entry: str) -> None:
    if not entry.endswith(".py"):
        importlib.import_module(entry)
        return
    path = Path(entry)
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", entry)
    loaded = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    if any(file and Path(file).name == path.name and Path(file).resolve() == path for file in loaded):
        return  # e.g. the script that runs
    # a name that no other module has, whatever the file is called
    name = f"{path.stem}_{hashlib.sha256(entry.encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _path(word: str) -> Path:
    return Path(word).expanduser().resolve()
