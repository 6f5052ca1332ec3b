"""Names -> methods.

The methods of this project are the files of ``accelerate_methods``, one method each (``baselines.py`` holds several):
names are read off their ``@register("name")`` lines, so that listing them imports nothing and no list has to be kept.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate_methods.registry import plugins
from accelerate_methods.stages.errors import MethodError, UnknownNameError

if TYPE_CHECKING:
    from accelerate_methods.stages.method import Method

_PACKAGE = __name__.partition(".")[0]
_LINE = re.compile(r'^@register\("(\w+)"\)$', re.MULTILINE)
#: "fastvid@0.25", "dycoke(k=0.3)": a word of ``registry.settings``
_WITH_PARAMETERS = re.compile(r"(\w+)(?:@(\S+)|\((.*)\))")
_registered: dict[str, type[Method]] = {}


@functools.cache
def built_in() -> dict[str, str]:
    """Name -> module of the methods of this project."""
    files = sorted(Path(__file__).resolve().parents[1].glob("*.py"))
    found = ((name, path.stem) for path in files for name in _LINE.findall(path.read_text(encoding="utf-8")))
    return {name: f"{_PACKAGE}.{module}" for name, module in found}


def register(name: str) -> Callable[[type[Method]], type[Method]]:
    """Class decorator that makes a method available under ``name`` (it may not be taken by another class)."""

    def decorate(cls: type[Method]) -> type[Method]:
        taken = _registered.get(name)
        same = taken is not None and (taken.__module__, taken.__qualname__) == (cls.__module__, cls.__qualname__)
        if (taken is not None and not same) or built_in().get(name, cls.__module__) != cls.__module__:
            raise MethodError(f"method name {name!r} is already registered; choose another one for {cls.__qualname__}.")
        cls.name = name
        _registered[name] = cls
        return cls

    return decorate


def available() -> list[str]:
    """Sorted names of all methods: built in, registered in this process, and from outside (see ``plugins.py``).

    Raises:
        MethodError: what the environment names cannot be imported.
    """
    plugins.import_named()
    return sorted({*built_in(), *_registered, *(e.name for e in plugins.offered())})


def method_class(name: str) -> type[Method]:
    """The class behind a name.

    Raises:
        UnknownNameError: there is none, with the nearest match.
        MethodError: a name with parameters, as comparisons write it.
    """
    if name in _registered:
        return _registered[name]
    if name in built_in():
        importlib.import_module(built_in()[name])
        return _registered[name]
    plugins.import_named()
    if name in _registered:
        return _registered[name]
    for entry in plugins.offered():
        if entry.name == name:
            return _loaded(entry)
    with_parameters = _WITH_PARAMETERS.fullmatch(name)
    if with_parameters and with_parameters[1] in available():
        given = f"retention_ratio={with_parameters[2]}" if with_parameters[2] else with_parameters[3]
        raise MethodError(
            f"{name!r} is how comparisons and benches write a method with its parameters; here the method is called "
            f"{with_parameters[1]!r}, and parameters are given beside it ({given})."
        )
    raise UnknownNameError("method", name, available())


def get(name: str, /, **params: Any) -> Method:
    """``get("fastvid", retention_ratio=0.1)``: a configured method.

    Raises:
        UnknownNameError: no such method or hyper-parameter (names the allowed ones and the nearest match).
        MethodError: a value out of range.
    """
    return method_class(name).create(**params)


def _loaded(entry: EntryPoint) -> type[Method]:
    """The class behind an entry point of another package."""
    where = f"method {entry.name!r} ({entry.value}, entry-point group {plugins.GROUP})"
    try:
        cls = entry.load()
    except Exception as error:
        raise MethodError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from error
    if getattr(cls, "name", None) != entry.name:
        raise MethodError(f"{where} is registered under another name, or not at all; write @register({entry.name!r}).")
    return cls
