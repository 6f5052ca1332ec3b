"""Wrappers around the methods of single objects, which come off again."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from torch import nn

_logger = logging.getLogger(__name__)


class Wrappers:
    """What was put on an object, and how to take it off."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def wrap(self, module: nn.Module, name: str, wrapper: Callable[..., Any]) -> Callable[..., Any]:
        """Put ``wrapper`` in the place of a method, on this object only; returns what was there.

        Somebody else may put something around the wrapper meanwhile (torch.compile, a tracer). That is not ours to
        remove: it stays, and the wrapper inside it hands every call on from then.
        """
        before, own = getattr(module, name), module.__dict__.get(name)
        acting = True

        @functools.wraps(before)  # generate reads signatures
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return wrapper(*args, **kwargs) if acting else before(*args, **kwargs)

        setattr(module, name, wrapped)

        def undo() -> None:
            nonlocal acting
            acting = False
            if module.__dict__.get(name) is not wrapped:
                _logger.warning(
                    "%s.%s was changed while a method was attached; the change stays, without the method.",
                    type(module).__name__, name,
                )  # fmt: skip
            elif own is None:
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
