"""Wrappers around the methods of single objects, which come off again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn


class Wrappers:
    """What was put on an object, and how to take it off."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def wrap(self, module: nn.Module, name: str, wrapper: Callable[..., Any]) -> Callable[..., Any]:
        """Put ``wrapper`` in the place of a method, on this object only; returns what was there."""
        before, own = getattr(module, name), module.__dict__.get(name)

        @functools.wraps(before)  # generate reads signatures
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return wrapper(*args, **kwargs)

        setattr(module, name, wrapped)

        def undo() -> None:
            if own is None:
                delattr(module, name)
            else:  # e.g. accelerate's, of a model that is spread over devices
                setattr(module, name, own)

        self._undo.append(undo)
        return before

    def keep(self, handles: list[Any]) -> None:
        """Hooks of torch, removed with the rest."""
        self._undo += [handle.remove for handle in handles]

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()
