"""The interface between methods and a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from ..base import Method
from ..errors import MethodError
from ..pipeline import Pipeline


def given_for(method: Method, name: str, available: frozenset[str]) -> str | None:
    """The signal that ``method`` gets where it asks for ``name``: itself, its substitute, or None."""
    if name in available:
        return name
    substitute = method.substitutes.get(name)
    return substitute if substitute in available else None


class Host(ABC):
    """Knows one model family: where its signals come from and how its tokens are cut."""

    #: signals that this family can give (subset of ``base.SIGNALS``)
    signals: frozenset[str] = frozenset()
    #: stages at which this family can be acted on
    stages: frozenset[str] = frozenset()
    family: str = ""

    @abstractmethod
    def supports(self, model: Any) -> bool:
        """Whether ``model`` belongs to this family."""

    @abstractmethod
    def attach(self, model: Any, pipeline: Pipeline) -> Any:
        """Put ``pipeline`` on this model object and return its former state (opaque, for :meth:`restore`)."""

    @abstractmethod
    def attached(self, model: Any) -> Any:
        """The state that is on this model object now, None if nothing is attached."""

    @abstractmethod
    def restore(self, model: Any, previous: Any) -> None:
        """Put a former state back; None means nothing attached."""

    def check(self, pipeline: Pipeline, available: frozenset[str], where: str) -> None:
        """Refuse, with one clear error, what this family or this very model cannot do."""
        for method in pipeline.methods:
            for stage in method.stages:
                if stage not in self.stages:
                    raise MethodError(
                        f"{method.name} acts at the {stage} stage, which {self.family} models do not offer "
                        f"(offered: {', '.join(sorted(self.stages))})."
                    )
            missing = sorted(name for name in method.signals if given_for(method, name, available) is None)
            if missing:
                raise MethodError(
                    f"{method.name} needs {', '.join(missing)}, which {where} cannot give "
                    f"(it gives: {', '.join(sorted(available)) or 'none'})."
                )
