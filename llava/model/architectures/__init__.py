"""Trained architectures: models that were trained to use few visual tokens, one file each.

A file has a function ``recognises(config)``, which tells its checkpoints by keys of their config.json, and ``MODEL``,
the class that loads them. Names do not tell: official checkpoints carry LLaVA's own class names. Where config.json is
LLaVA's, too, ``recognises_tokens(tokens)`` tells by the tokens that were added to the tokenizer. Which there are is
declared in ``accelerate_methods.registry.architectures`` (docs/adding_an_architecture.md).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from accelerate_methods.hosts.checkpoint_files import check_files
from accelerate_methods.registry.architectures import ARCHITECTURES, Architecture
from llava.model.checkpoint import CheckpointError, read_config
from llava.tokenization import added_tokens


def architecture_of(config: dict[str, Any], path: str | Path | None = None) -> Any:
    """The class for a checkpoint with this config.json, None where it is plain LLaVA.

    Where an architecture has a class for each of several decoders, its ``model_of(config)`` says which.

    Args:
        path: of the checkpoint, whose tokenizer tells some of them.
    """
    modules = [importlib.import_module(f"{__name__}.{entry.file}") for entry in ARCHITECTURES]
    found = next((module for module in modules if module.recognises(config)), None)
    if found is None and path is not None:
        by_tokens = [module for module in modules if hasattr(module, "recognises_tokens")]
        tokens = added_tokens(path)
        found = next((module for module in by_tokens if module.recognises_tokens(tokens)), None)
    if found is None:
        return None
    return found.model_of(config) if hasattr(found, "model_of") else found.MODEL


def check_architecture(path: str, wanted: Architecture | None) -> None:
    """Whether the checkpoint of ``path`` is of the architecture that was asked for; None: of plain LLaVA.

    Raises:
        CheckpointError: it is of another one, with the model id that runs it.
    """
    check_files(path)
    found = architecture_of(read_config(path), path)
    about = None if found is None else found.about
    if about == wanted:
        return
    asked = "a plain LLaVA model" if wanted is None else f"{wanted.name} (model {wanted.key})"
    if about is None:
        example = f", e.g. {wanted.checkpoints[0]}" if wanted.checkpoints else ""
        raise CheckpointError(f"{path} is no checkpoint of {wanted.name}; model {wanted.key} runs those only{example}.")
    raise CheckpointError(f"{path} is a checkpoint of {about.name}, not of {asked}; run it as model {about.key}.")
