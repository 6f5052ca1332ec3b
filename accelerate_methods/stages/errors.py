"""Errors that a user of the toolkit can cause, each saying what was wrong and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
