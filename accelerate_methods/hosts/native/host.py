"""Which family a transformers model belongs to, and attaching to it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from accelerate_methods.hosts.base import Host
from accelerate_methods.hosts.native.acceleration import NativeAcceleration
from accelerate_methods.hosts.native.family import Family
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.stages.errors import MethodError

#: module of transformers -> module here that knows its models
_FAMILIES = {
    "transformers.models.llava.modeling_llava": "llava",
    "transformers.models.llava_next.modeling_llava_next": "llava",
    "transformers.models.llava_next_video.modeling_llava_next_video": "llava_next_video",
    "transformers.models.llava_onevision.modeling_llava_onevision": "llava_onevision",
    "transformers.models.qwen2_vl.modeling_qwen2_vl": "qwen_vl",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl": "qwen_vl",
    "transformers.models.qwen3_vl.modeling_qwen3_vl": "qwen_vl",
    "transformers.models.internvl.modeling_internvl": "internvl",
}
#: (module, family) of :func:`register_family`
_registered: list[tuple[str, type[Family]]] = []


def register_family(module: str) -> Callable[[type[Family]], type[Family]]:
    """Class decorator: the family of the models that ``module`` defines and ``Family.classes`` names.

    It is asked before the families of this package, and one registered later before it.

    Raises:
        MethodError: a class that is no :class:`Family`, or names no model classes.
    """

    def decorate(family: type[Family]) -> type[Family]:
        if not (isinstance(family, type) and issubclass(family, Family)):
            raise MethodError(f"register_family is for subclasses of Family, not for {family!r}.")
        if not family.classes or isinstance(family.classes, str):
            raise MethodError(f"{family.__name__}.classes must be a tuple of class names, not {family.classes!r}.")
        _registered.insert(0, (module, family))
        return family

    return decorate


def family_class(model: Any) -> type[Family] | None:
    """The family of ``model``; only modules whose models are loaded are looked at."""
    return family_of(type(model))


def family_of(model_class: type) -> type[Family] | None:
    """The family that a class of models belongs to."""
    for module, family in _registered:
        if model_class.__module__ == module and model_class.__name__ in family.classes:
            return family
    for trigger, module in _FAMILIES.items():
        if trigger in sys.modules:
            for family in importlib.import_module(f"{__package__}.{module}").FAMILIES:
                if model_class.__name__ in family.classes and model_class.__module__ == trigger:
                    return family
    return None


def class_names() -> list[str]:
    """Names of the classes of models that have a family."""
    here = [f for m in set(_FAMILIES.values()) for f in importlib.import_module(f"{__package__}.{m}").FAMILIES]
    return sorted({name for family in [*here, *(family for _, family in _registered)] for name in family.classes})


class NativeHost(Host):
    """Every family of this package."""

    family = "transformers"
    stages = frozenset({"compress", "prefill", "decode"})

    def supports(self, model: Any) -> bool:
        return family_class(model) is not None

    def attach(self, model: Any, pipeline: Pipeline) -> Any:
        family = family_class(model)(model)
        self.check(pipeline, family.signals, f"this {family.name} model")
        for method in pipeline.methods:
            if not method.modalities & family.modalities:
                raise MethodError(
                    f"{method.name} cannot act on {family.name} models: it acts on {', '.join(method.modalities)} "
                    f"only, they have {', '.join(family.modalities)} only. {family.only}".rstrip()
                )
        layers = len(family.language.layers)
        if pipeline.prefill is not None or pipeline.decode is not None:
            family.check_attention()
        if pipeline.prefill is not None:
            pipeline.prefill.prefill_layers(layers)
        if pipeline.decode is not None:
            pipeline.decode.decode_layer(layers)
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
