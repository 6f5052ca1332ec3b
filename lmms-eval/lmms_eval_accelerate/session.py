"""What the harness and a model tell each other beside ``--model_args``, and what runs of one process share.

lmms-eval makes the model from its arguments alone, and everything among them counts as a setting. What only says how a
run is carried out goes this way instead, as does what the model says of itself for the run's summary. Without a session
(plain ``lmms-eval``, library use) nothing is shared, kept or told.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmms_eval_accelerate.runs.folder import RunFolder


@dataclasses.dataclass
class Session:
    """
    Attributes:
        folder: of the run that is going on; None where a command of somebody else started it.
        journal: folder of the run's answers (see ``models/journal.py``), or None.
        share: whether to keep the weights for the next run.
        weights: (what was loaded with which arguments, the model) that was used last, if runs share it.
        settings: of the run's model, everything that can change an answer; written by the model.
        checkpoint: what its weights look like; written by the model.
    """

    folder: RunFolder | None = None
    journal: Path | None = None
    share: bool = False
    weights: tuple[Any, Any] | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    checkpoint: dict[str, Any] = dataclasses.field(default_factory=dict)

    def begin(self, folder: RunFolder, journal: Path | None) -> None:
        """Another run begins; what the model before said of itself is not of this one."""
        self.folder, self.journal = folder, journal
        self.settings, self.checkpoint = {}, {}


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
