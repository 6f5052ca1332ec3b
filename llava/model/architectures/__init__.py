"""Trained architectures: models that were trained to use few visual tokens, one file each.

A file has a function ``recognises(config)``, which tells its checkpoints by keys of their config.json, and ``MODEL``,
the class that loads them. Names do not tell: official checkpoints carry LLaVA's own class names. Which there are is
declared in ``accelerate_methods.registry.architectures`` (docs/adding_an_architecture.md).
"""

from __future__ import annotations

import importlib
from typing import Any

from accelerate_methods.registry.architectures import ARCHITECTURES


def architecture_of(config: dict[str, Any]) -> Any:
    """The class for a checkpoint with this config.json, None where it is plain LLaVA."""
    for entry in ARCHITECTURES:
        module = importlib.import_module(f"{__name__}.{entry.file}")
        if module.recognises(config):
            return module.MODEL
    return None
