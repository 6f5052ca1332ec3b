"""Errors that a user of the toolkit can cause, each saying what was wrong and what is allowed."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


class MethodError(ValueError):
    """A method, its hyper-parameters or its combination with a model is not usable."""


class UnknownNameError(MethodError):
    """A name (method, hyper-parameter, config, signal ...) that does not exist."""

    def __init__(self, what: str, name: object, allowed: Iterable[str]):
        allowed = sorted(allowed)
        spelt = {word.lower(): word for word in reversed(allowed)}
        close = [spelt[word] for word in difflib.get_close_matches(str(name).lower(), spelt, n=1, cutoff=0.5)]
        hint = f" Did you mean {close[0]!r}?" if close else ""
        super().__init__(f"unknown {what} {name!r}.{hint} Allowed: {', '.join(allowed) or '(none)'}.")
        self.name, self.allowed, self.suggestion = name, allowed, close[0] if close else None


def one_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(" ".join(lines).split()) or type(error).__name__


def check_writable(folder: Path, what: str) -> None:
    """Refuse an output folder before the work whose results would go there; it need not exist, and nothing is made.

    Args:
        what: what the user gave, in front of the reason.

    Raises:
        MethodError: a part of its path is no folder, or may not be written.
    """
    for place in (folder.absolute(), *folder.absolute().parents):
        if not os.path.lexists(place):
            continue
        if not place.is_dir():
            raise MethodError(f"{what}: {place} is no folder.")
        if not os.access(place, os.W_OK | os.X_OK):
            raise MethodError(f"{what}: no permission to write into {place}.")
        return
