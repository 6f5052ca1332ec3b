"""Which family a transformers model belongs to, and attaching to it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
from typing import Any

from accelerate_methods.engine.points import check_halves
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
                signals=family.available(pipeline),
                modalities=about.modalities,
                layers=len(family.language.layers),
                limits=about.limits,
                signal_limits=family.signal_limits,
            )
        )
        if pipeline.prefills or pipeline.decode is not None:
            family.check_attention()
        check_halves(family.language, pipeline)
        state = NativeAcceleration(model, family, pipeline)
        previous = self.attached(model)
        self._off(model)
        try:
            self._on(model, state)
        except BaseException:
            if previous is not None:
                self._on(model, previous)
            raise
        return previous

    def attached(self, model: Any) -> Any:
        return model.__dict__.get("acceleration")

    def restore(self, model: Any, previous: Any) -> None:
        self._off(model)
        if previous is not None:
            self._on(model, previous)

    def _on(self, model: Any, state: NativeAcceleration) -> None:
        try:
            state.install()
        except BaseException:
            state.remove()
            raise
        model.__dict__["acceleration"] = state
        model.__dict__["__deepcopy__"] = functools.partial(self._copied, model)
        model.__dict__["__reduce_ex__"] = functools.partial(_cannot_be_pickled, state.pipeline.name)

    def _off(self, model: Any) -> NativeAcceleration | None:
        """Take off what is attached, and return it."""
        state = model.__dict__.pop("acceleration", None)
        if state is not None:
            state.remove()
            del model.__dict__["__deepcopy__"], model.__dict__["__reduce_ex__"]
        return state

    def _copied(self, model: Any, memo: dict[int, Any]) -> Any:
        """What ``copy.deepcopy(model)`` gives: a model without the method, whose wrappers belong to the original."""
        state = self._off(model)
        try:
            return copy.deepcopy(model, memo)
        finally:
            if state is not None:
                self._on(model, state)


def _cannot_be_pickled(name: str, protocol: Any) -> Any:
    raise MethodError(f"a model with {name} attached cannot be pickled; detach it first, or save its state_dict().")


HOST = NativeHost()
