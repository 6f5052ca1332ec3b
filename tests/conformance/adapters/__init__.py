"""Adapters from golden contracts to our implementation: those that every method shares, and a method's own.

``shared.py`` holds the first. A file named after the method holds the second, where there are any:

    ADAPTERS = {(method, stage): adapter}       adapter(inputs, params, context) -> outputs without "out."
    TEXT_CHECKS = {section of text.json: check}
    PARAMETERS = {parameter of its cases: field of the method}
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from accelerate_methods.registry import available, method_class

Adapter = Callable[[dict, dict, Any], dict]

_MODULES = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
_SHARED = importlib.import_module(f"{__name__}.shared").ADAPTERS
_OWN = [module for module in _MODULES if not module.__name__.endswith(".shared")]

ADAPTERS = {key: adapter for module in _OWN for key, adapter in getattr(module, "ADAPTERS", {}).items()}
TEXT_CHECKS = {key: check for module in _OWN for key, check in getattr(module, "TEXT_CHECKS", {}).items()}


def find(method: str, stage: str) -> Adapter | None:
    """The method's own adapter of a stage, or the shared one if the method is there and has such a stage."""
    if (method, stage) in ADAPTERS:
        return ADAPTERS[method, stage]
    if stage not in _SHARED or method not in available():
        return None
    return next((adapter for kind, adapter in _SHARED[stage] if issubclass(method_class(method), kind)), None)
