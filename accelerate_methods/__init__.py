"""Visual-token compression methods for multimodal LLMs: methods x hosts.

Quick tour (importing this package loads neither torch nor transformers; attributes resolve on first use)::

    import accelerate_methods

    accelerate_methods.available()                                   # names of the methods
    method = accelerate_methods.get("fastvid", retention_ratio=0.1)  # a frozen dataclass of hyper-parameters
    with accelerate_methods.accelerate(model, method):               # on this instance, until the block ends
        with accelerate_methods.record() as records:                 # token counts, timings, FLOPs per request
            model.generate(input_ids, images=[video], modalities=["video"])

See ``docs/architecture.md`` for how methods, stages, signals and hosts fit together.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "accelerate": "hosts.attach",
    "detach": "hosts.attach",
    "Method": "stages.method",
    "SampleMethod": "stages.sample",
    "EncodeMethod": "stages.encode",
    "CompressMethod": "stages.compress",
    "PrefillMethod": "stages.prefill",
    "DecodeMethod": "stages.decode",
    "EvictMethod": "stages.decode",
    "VisualItem": "stages.compress",
    "Compressed": "stages.compress",
    "Pipeline": "registry.pipeline",
    "resolve": "registry.pipeline",
    "record": "engine.recording",
    "available": "registry",
    "get": "registry",
    "register": "registry",
    "MethodError": "stages.errors",
    "UnknownNameError": "stages.errors",
}

__all__ = [
    "__version__", "accelerate", "detach", "Method", "SampleMethod", "EncodeMethod", "CompressMethod",
    "PrefillMethod", "DecodeMethod", "EvictMethod", "VisualItem", "Compressed", "Pipeline", "resolve", "record",
    "available", "get", "register", "MethodError", "UnknownNameError",
]  # fmt: skip - written out: type checkers do not compute it

if TYPE_CHECKING:
    from accelerate_methods.engine.recording import record
    from accelerate_methods.hosts.attach import accelerate, detach
    from accelerate_methods.registry import available, get, register
    from accelerate_methods.registry.pipeline import Pipeline, resolve
    from accelerate_methods.stages.compress import Compressed, CompressMethod, VisualItem
    from accelerate_methods.stages.decode import DecodeMethod, EvictMethod
    from accelerate_methods.stages.encode import EncodeMethod
    from accelerate_methods.stages.errors import MethodError, UnknownNameError
    from accelerate_methods.stages.method import Method
    from accelerate_methods.stages.prefill import PrefillMethod
    from accelerate_methods.stages.sample import SampleMethod
else:

    def __getattr__(name: str):
        if name in _EXPORTS:
            return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
