"""The interface between methods and a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.signals import resolve_signal


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
            missing = sorted(name for name in method.signals if resolve_signal(method, name, available) is None)
            if missing:
                raise MethodError(
                    f"{method.name} needs {', '.join(missing)}, which {where} cannot give "
                    f"(it gives: {', '.join(sorted(available)) or 'none'})."
                )
