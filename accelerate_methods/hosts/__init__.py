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


def host_for(model: Any) -> Host:
    """The host of ``model``; :class:`MethodError` naming the supported families if there is none."""
    plugins.import_named()
    for host in _registered:
        if host.supports(model):
            return host
    if "transformers.modeling_utils" in sys.modules:
        host = importlib.import_module("accelerate_methods.hosts.native").HOST
        if host.supports(model):
            return host
    native = importlib.import_module("accelerate_methods.hosts.native.host")
    raise MethodError(
        f"no host for {type(model).__module__}.{type(model).__qualname__}. Supported: models of this project's llava "
        "package (LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, LLaVA-Video), as returned by llava.model.builder, and of "
        f"transformers: {', '.join(native.class_names())}."
    )
