"""Switch methods on and off for one model object."""

from __future__ import annotations

import logging
from typing import Any

from accelerate_methods.hosts import host_for
from accelerate_methods.registry.pipeline import Pipeline, resolve
from accelerate_methods.stages.errors import MethodError

_logger = logging.getLogger(__name__)


class Acceleration:
    """A pipeline attached to one model. Leaving the ``with`` block (or :meth:`detach`) restores what was there before.

    Nested accelerations of one model come off in the reverse order.
    """

    def __init__(self, model: Any, pipeline: Pipeline):
        self.pipeline = pipeline
        self._model = model
        self._host = host_for(model)
        self._previous = self._host.attach(model, pipeline)
        self._state = self._host.attached(model)
        self._attached = True
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
        if not self._attached:
            return
        current = self._host.attached(self._model)
        if current is not None and current is not self._state:
            raise MethodError(f"{self.pipeline.name} is covered by a later acceleration; detach that one first.")
        if current is self._state:  # otherwise detach(model) has taken everything off
            self._host.restore(self._model, self._previous)
        self._attached = False

    def __enter__(self) -> Acceleration:
        if not self._attached:
            raise MethodError("this acceleration was detached; call accelerate(model, ...) again.")
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = "attached to" if self._attached else "detached from"
        return f"<{self.pipeline.describe()} {state} {type(self._model).__name__}>"


def accelerate(model: Any, method: Any, **params: Any) -> Acceleration:
    """Attach ``method`` to this model object: at once, and until detached or the ``with`` block ends.

    Args:
        model: a model of a supported host (see ``accelerate_methods.hosts``).
        method: anything :func:`accelerate_methods.resolve` takes; None or "dense" runs the model uncompressed.
        params: hyper-parameters.

    Raises:
        MethodError: unknown method, bad parameter, a model no host knows, or a signal the model cannot give.
    """
    return Acceleration(model, resolve(method, **params))


def detach(model: Any) -> None:
    """Remove whatever is attached to ``model``."""
    host_for(model).restore(model, None)
