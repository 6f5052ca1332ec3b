"""Switch methods on and off for one model object."""

from __future__ import annotations

import dataclasses
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any

from accelerate_methods.hosts import host_for
from accelerate_methods.hosts.frame_sampler import FrameSampler, frame_sampler
from accelerate_methods.registry.pipeline import Pipeline, resolve
from accelerate_methods.stages.errors import MethodError

_logger = logging.getLogger(__name__)
_lock = threading.RLock()  # attaching looks at what is there and changes it


@dataclasses.dataclass
class _Place:
    """Where an attached state stands; kept on the state as ``place``. Copies of a model start with a fresh one.

    Attributes:
        previous: the state that was there before.
        owner: the :class:`Acceleration` that can take it off, as long as somebody holds it.
        thread: whose ``with`` block it is, None outside of one.
        given_up: detached already.
    """

    previous: Any = None
    owner: Callable[[], Acceleration | None] = lambda: None
    thread: int | None = None
    given_up: bool = False

    def __reduce__(self) -> Any:
        return (_Place, ())

    @property
    def replaced(self) -> bool:
        """Whether nobody can take the state off: given up, or outside a block and its owner is forgotten."""
        return self.given_up or (self.thread is None and self.owner() is None)


def _place(state: Any) -> _Place:
    return getattr(state, "place", None) or _Place()


class Acceleration:
    """A pipeline attached to one model.

    ``with accelerate(model, ...)``: leaving the block restores what was there before it; blocks nest.

    ``a = accelerate(model, ...)`` stands until ``a.detach()``, which also restores what was there before, save what
    nobody can detach any more: a notebook cell that is run twice attaches twice and forgets the first ``a``, which is
    thereby replaced.
    """

    def __init__(self, model: Any, pipeline: Pipeline, tokenizer: Any = None):
        self.pipeline = pipeline
        self._model = model
        self._host = host_for(model)
        with _lock:
            inside = _place(self._host.attached(model))
            if inside.thread not in (None, threading.get_ident()):
                raise MethodError(
                    "another thread is inside a `with accelerate(...)` block on this model object, and methods belong "
                    "to the object. Give each thread a model of its own, or attach once for all of them."
                )
            previous = self._host.attach(model, pipeline)
            self._state = self._host.attached(model)
            self._place = _Place(previous, weakref.ref(self))
            if self._state is not None:
                self._state.place = self._place
                if tokenizer is not None:
                    self._state.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
        #: chooses the frames of videos where they are read (``load_video(..., sampler=)``); None if no method does
        self.frame_sampler: FrameSampler | None = frame_sampler(pipeline, getattr(model, "device", "cpu"))
        if self.frame_sampler is not None:
            _logger.warning(
                "%s acts where videos are read: load_video(..., sampler=acceleration.frame_sampler, question=...).",
                self.frame_sampler.method.name,
            )
        #: signal that a method asks for -> what this model gives instead; empty where the method runs as published
        self.adaptations: dict[str, str] = dict(getattr(self._state, "adaptations", {}))
        for asked, given in self.adaptations.items():
            _logger.warning(
                "%s on this model is an adaptation: its vision encoder has no %s, %s is used instead.",
                pipeline.name, asked, given,
            )  # fmt: skip

    def detach(self) -> None:
        """Restore the model's former state; calling it again does nothing.

        Raises:
            MethodError: something attached later is still there.
        """
        with _lock:
            if self._place.given_up:
                return
            current = self._host.attached(self._model)
            if current is not None and current is not self._state:
                raise MethodError(f"{self.pipeline.name} is covered by a later acceleration; detach that one first.")
            self._place.given_up = True
            if current is self._state:  # otherwise detach(model) has taken everything off
                self._host.restore(self._model, self._before())

    def _before(self) -> Any:
        """The state to go back to. What a block covers comes back whoever holds it."""
        in_block, state = self._place.thread is not None, self._place.previous
        while state is not None and (_place(state).given_up if in_block else _place(state).replaced):
            state = _place(state).previous
        return state

    def __enter__(self) -> Acceleration:
        with _lock:
            if self._place.given_up:
                raise MethodError("this acceleration was detached; call accelerate(model, ...) again.")
            if self._host.attached(self._model) is not self._state:
                self._place.given_up = True
                raise MethodError(
                    f"something else was attached after {self.pipeline.name}, perhaps by another thread; write "
                    "`with accelerate(model, ...):` in one go, and give each thread a model of its own."
                )
            self._place.thread = threading.get_ident()
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = "detached from" if self._place.given_up else "attached to"
        return f"<{self.pipeline.describe()} {state} {type(self._model).__name__}>"


def accelerate(model: Any, method: Any, *, tokenizer: Any = None, **params: Any) -> Acceleration:
    """Attach ``method`` to this model object: at once, and until detached, replaced or the ``with`` block ends.

    Args:
        model: a model of a supported host (see ``accelerate_methods.hosts``).
        method: anything :func:`accelerate_methods.resolve` takes; None or "dense" runs the model uncompressed.
        tokenizer: the model's tokenizer or processor, for methods that look at the question: it is then read out of the
            prompt wherever ``generate`` is not told (``questions=[...]``).
        params: hyper-parameters.

    Raises:
        MethodError: unknown method, bad parameter, a model no host knows, something that the model lacks, or a block of
            another thread on the same object.
    """
    return Acceleration(model, resolve(method, **params), tokenizer)


def detach(model: Any) -> None:
    """Remove whatever is attached to ``model``."""
    with _lock:
        host_for(model).restore(model, None)
