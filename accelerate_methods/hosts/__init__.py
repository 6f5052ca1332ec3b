"""Hosts: one module per model family. A host knows how a family is built and no method by name.

A package whose models need a host of their own registers it when its models are imported (:func:`register_host`): this
project's llava tree does so, and so may anybody. transformers' own models belong to ``hosts.native``, where
``register_family`` adds a family.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from accelerate_methods.registry import plugins
from accelerate_methods.stages.errors import MethodError

if TYPE_CHECKING:
    from accelerate_methods.hosts.base import Host

_registered: list[Host] = []


def register_host(host: Host) -> Host:
    """Add a host for models that no host here knows; it is asked before them, and one registered later before it."""
    _registered.insert(0, host)
    return host


#: where wrappers keep their model: peft, DataParallel and its kin, torch.compile, pipelines and trainers
_WRAPPERS = ("get_base_model", "module", "_orig_mod", "model")
_MOST_WRAPPERS = 3  # around each other


def host_for(model: Any) -> Host:
    """The host of ``model``; :class:`MethodError` naming the supported families if there is none."""
    plugins.import_named()
    host = _find(model)
    if host is not None:
        return host
    inside = _inside(model, _MOST_WRAPPERS)
    if inside is not None:
        raise MethodError(
            f"{type(model).__name__} is a wrapper around a model. Give the model inside it (its {inside}); what is "
            "called through the wrapper then runs with the method, too."
        )
    native = importlib.import_module("accelerate_methods.hosts.native.host")
    raise MethodError(
        f"no host for {type(model).__module__}.{type(model).__qualname__}. Supported: models of this project's llava "
        "package (LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, LLaVA-Video), as returned by llava.model.builder, and of "
        f"transformers: {', '.join(native.class_names())}."
    )


def _find(model: Any) -> Host | None:
    for host in _registered:
        if host.supports(model):
            return host
    if "transformers.modeling_utils" in sys.modules:
        host = importlib.import_module("accelerate_methods.hosts.native").HOST
        if host.supports(model):
            return host
    return None


def _inside(wrapper: Any, depth: int) -> str | None:
    """Where the model with a host stands inside ``wrapper``, as one would write it; None: there is none."""
    for name in _WRAPPERS if depth else ():
        inner = getattr(wrapper, name, None)
        if name.startswith("get_") and callable(inner):
            name, inner = f"{name}()", inner()
        if inner is None:
            continue
        rest = "" if _find(inner) is not None else _inside(inner, depth - 1)
        if rest is not None:
            return f".{name}{rest}"
    return None
