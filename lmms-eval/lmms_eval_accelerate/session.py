"""What runs of one process share: the weights, and the folder in which a run's answers are kept as they come.

lmms-eval makes the model from its arguments alone, and everything among them counts as a setting. What only says how a
run is carried out comes from here instead. Without a session (plain ``lmms-eval``) nothing is shared or kept.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@dataclasses.dataclass
class Session:
    """Attributes:
    journal: folder of the run's answers (see ``journal.py``), or None.
    weights: (what was loaded with which arguments, the model) that was used last, if runs share it.
    share: whether to keep the weights for the next run.
    """

    journal: Path | None = None
    share: bool = False
    weights: tuple[Any, Any] | None = None


_current: contextvars.ContextVar[Session] = contextvars.ContextVar("session")


def current() -> Session:
    """The session around this run; a fresh, empty one outside of any."""
    return _current.get(None) or Session()


@contextlib.contextmanager
def session(share: bool = False) -> Iterator[Session]:
    """Everything inside shares one :class:`Session`; the weights are dropped at the end."""
    token = _current.set(Session(share=share))
    try:
        yield _current.get()
    finally:
        _current.reset(token)
