"""Names -> methods. Built-in methods are listed as strings, so that listing them imports nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

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
_ENTRY_POINT_GROUP = "accelerate_methods.methods"
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
    """Sorted names of all methods: built in, registered here, and offered by other packages as entry points."""
    return sorted({*_BUILT_IN, *_registered, *(e.name for e in _plugins())})


def method_class(name: str) -> type[Method]:
    """The class behind a name; :class:`UnknownNameError` with the nearest match otherwise."""
    if name in _registered:
        return _registered[name]
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    for entry in _plugins():
        if entry.name == name:
            return entry.load()
    raise UnknownNameError("method", name, available())


def get(name: str, **params: Any) -> Method:
    """``get("fastvid", retention_ratio=0.1)``: a configured method.

    Raises:
        UnknownNameError: no such method or hyper-parameter (names the allowed ones and the nearest match).
        MethodError: a value out of range.
    """
    return method_class(name).create(**params)


def _plugins():
    return entry_points(group=_ENTRY_POINT_GROUP)


def _path(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"
