"""Which family a transformers model belongs to, and attaching to it."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from accelerate_methods.hosts.base import Host
from accelerate_methods.hosts.native.acceleration import NativeAcceleration
from accelerate_methods.hosts.native.family import Family
from accelerate_methods.registry import families
from accelerate_methods.registry.families import ModelFamily
from accelerate_methods.registry.pipeline import ModelFacts, Pipeline
from accelerate_methods.stages.errors import MethodError


def register_family(family: type[Family]) -> type[Family]:
    """Class decorator: a family from outside, which ``Family.about`` declares.

    It is asked before the families of this package, and one registered later before it.

    Raises:
        MethodError: a class that is no :class:`Family`, or whose declaration names no model classes.
    """
    if not (isinstance(family, type) and issubclass(family, Family)):
        raise MethodError(f"register_family is for subclasses of Family, not for {family!r}.")
    about = getattr(family, "about", None)
    if not isinstance(about, ModelFamily):
        raise MethodError(f"{family.__name__}.about must be a ModelFamily (accelerate_methods.registry.families).")
    if not about.classes or isinstance(about.classes, str) or not about.module:
        raise MethodError(
            f"{family.__name__}.about must name its models: classes must be a tuple of class names, not "
            f"{about.classes!r}, and module what defines them, not {about.module!r}."
        )
    families.add(dataclasses.replace(about, host=family))
    return family


def family_class(model: Any) -> type[Family] | None:
    """The family of ``model``."""
    return family_of(type(model))


def family_of(model_class: type) -> type[Family] | None:
    """The family that a class of models belongs to."""
    about = families.family_of_class(model_class.__module__, model_class.__name__)
    if about is None or about.host is None:
        return None
    if isinstance(about.host, type):
        return about.host
    module, _, name = about.host.partition(":")
    return getattr(importlib.import_module(module), name)


def class_names() -> list[str]:
    """Names of the classes of models that have a family."""
    return sorted({name for family in families.families() for name in family.classes})


class NativeHost(Host):
    """Every family of this package."""

    def supports(self, model: Any) -> bool:
        return family_class(model) is not None

    def attach(self, model: Any, pipeline: Pipeline) -> Any:
        family = family_class(model)(model)
        about = family.about
        pipeline.check(
            ModelFacts(
                name=about.name,
                stages=about.stages,
                signals=family.signals,
                modalities=about.modalities,
                layers=len(family.language.layers),
                limits=about.limits,
            )
        )
        if pipeline.prefill is not None or pipeline.decode is not None:
            family.check_attention()
        state = NativeAcceleration(model, family, pipeline)
        previous = self.attached(model)
        if previous is not None:
            previous.remove()
        try:
            state.install()
        except BaseException:
            state.remove()
            if previous is not None:
                previous.install()
            raise
        model.__dict__["acceleration"] = state
        return previous

    def attached(self, model: Any) -> Any:
        return model.__dict__.get("acceleration")

    def restore(self, model: Any, previous: Any) -> None:
        current = self.attached(model)
        if current is not None:
            current.remove()
            del model.__dict__["acceleration"]
        if previous is not None:
            previous.install()
            model.__dict__["acceleration"] = previous


HOST = NativeHost()
