"""Hosts: one module per model family. A host knows how a family is built and no method by name.

``host_for(model)`` asks each host module whether it knows the model, importing only those whose model code is already
loaded. Hosts from outside come first: :func:`register_host` here, or a family of transformers models with
``hosts.native.register_family``.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from .. import outside
from ..errors import MethodError

if TYPE_CHECKING:
    from .base import Host

#: package whose presence in sys.modules makes the host worth asking -> host module
_HOSTS = {
    "llava.model.llava_arch": "accelerate_methods.hosts.llava",
    "transformers.modeling_utils": "accelerate_methods.hosts.native",
}
_registered: list[Host] = []


def register_host(host: Host) -> Host:
    """Add a host for models that no host here knows; it is asked before them, and one registered later before it."""
    _registered.insert(0, host)
    return host


def host_for(model: Any) -> Host:
    """The host of ``model``; :class:`MethodError` naming the supported families if there is none."""
    outside.import_named()
    for host in _registered:
        if host.supports(model):
            return host
    for trigger, module in _HOSTS.items():
        if trigger in sys.modules:
            host = importlib.import_module(module).HOST
            if host.supports(model):
                return host
    native = importlib.import_module("accelerate_methods.hosts.native.host")
    raise MethodError(
        f"no host for {type(model).__module__}.{type(model).__qualname__}. Supported: models of this project's llava "
        "package (LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, LLaVA-Video), as returned by llava.model.builder, and of "
        f"transformers: {', '.join(native.class_names())}."
    )
