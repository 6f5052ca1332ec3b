"""Names -> methods. Built-in methods are listed as strings, so that listing them imports nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any

from . import outside
from .errors import MethodError, UnknownNameError

if TYPE_CHECKING:
    from .base import Method

_BUILT_IN = {
    "fastvid": "accelerate_methods.fastvid:FastVID",
    "dycoke": "accelerate_methods.dycoke:DyCoke",
    "fastv": "accelerate_methods.fastv:FastV",
    "prunevid": "accelerate_methods.prunevid:PruneVid",
    "fastervlm": "accelerate_methods.fastervlm:FasterVLM",
    "visionzip": "accelerate_methods.visionzip:VisionZip",
    "random": "accelerate_methods.baselines:RandomTokens",
    "uniform": "accelerate_methods.baselines:UniformTokens",
    "pool": "accelerate_methods.baselines:PooledTokens",
    "downsample": "accelerate_methods.baselines:DownsampledInput",
    "random_prefill": "accelerate_methods.baselines:RandomPrefill",
}
_registered: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[type[Method]], type[Method]]:
    """Class decorator that makes a method available under ``name`` (it may not be taken by another class)."""

    def decorate(cls: type[Method]) -> type[Method]:
        taken = _registered.get(name)
        same = taken is not None and (taken.__module__, taken.__qualname__) == (cls.__module__, cls.__qualname__)
        if (taken is not None and not same) or (name in _BUILT_IN and _BUILT_IN[name] != _path(cls)):
            raise MethodError(f"method name {name!r} is already registered; choose another one for {cls.__qualname__}.")
        cls.name = name
        _registered[name] = cls
        return cls

    return decorate


def available() -> list[str]:
    """Sorted names of all methods: built in, registered in this process, and from outside (see ``outside.py``).

    Raises:
        MethodError: what the environment names cannot be imported.
    """
    outside.import_named()
    return sorted({*_BUILT_IN, *_registered, *(e.name for e in outside.offered())})


def method_class(name: str) -> type[Method]:
    """The class behind a name; :class:`UnknownNameError` with the nearest match otherwise."""
    if name in _registered:
        return _registered[name]
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    outside.import_named()
    if name in _registered:
        return _registered[name]
    for entry in outside.offered():
        if entry.name == name:
            return _loaded(entry)
    raise UnknownNameError("method", name, available())


def get(name: str, **params: Any) -> Method:
    """``get("fastvid", retention_ratio=0.1)``: a configured method.

    Raises:
        UnknownNameError: no such method or hyper-parameter (names the allowed ones and the nearest match).
        MethodError: a value out of range.
    """
    return method_class(name).create(**params)


def _loaded(entry: EntryPoint) -> type[Method]:
    """The class behind an entry point of another package."""
    where = f"method {entry.name!r} ({entry.value}, entry-point group {outside.GROUP})"
    try:
        cls = entry.load()
    except Exception as error:
        raise MethodError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from error
    if getattr(cls, "name", None) != entry.name:
        raise MethodError(f"{where} is registered under another name, or not at all; write @register({entry.name!r}).")
    return cls


def _path(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"
