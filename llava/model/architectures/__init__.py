"""Trained architectures: models that were trained to use few visual tokens, one file each.

A file has a function ``recognises(config)``, which tells its checkpoints by keys of their config.json, and ``MODEL``,
the class that loads them. Names do not tell: official checkpoints carry LLaVA's own class names.
"""

from __future__ import annotations

import importlib
from typing import Any

#: files of this folder, in the order in which they are asked
ARCHITECTURES = ("mqt",)


def architecture_of(config: dict[str, Any]) -> Any:
    """The class for a checkpoint with this config.json, None where it is plain LLaVA."""
    for name in ARCHITECTURES:
        module = importlib.import_module(f"{__name__}.{name}")
        if module.recognises(config):
            return module.MODEL
    return None
