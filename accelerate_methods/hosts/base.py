"""The interface between methods and the models of one library."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from accelerate_methods.registry.pipeline import Pipeline


class Host(ABC):
    """Knows how a library's models are built: where their signals come from and how their tokens are cut."""

    @abstractmethod
    def supports(self, model: Any) -> bool:
        """Whether ``model`` is one that this host knows."""

    @abstractmethod
    def attach(self, model: Any, pipeline: Pipeline) -> Any:
        """Put ``pipeline`` on this model object and return its former state (opaque, for :meth:`restore`).

        Asks ``pipeline.check`` first, with what this very model has.

        Raises:
            MethodError: something that the model lacks.
        """

    @abstractmethod
    def attached(self, model: Any) -> Any:
        """The state that is on this model object now, None if nothing is attached."""

    @abstractmethod
    def restore(self, model: Any, previous: Any) -> None:
        """Put a former state back; None means nothing attached."""
