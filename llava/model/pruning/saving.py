"""A pruned checkpoint in the format of the one that it was made from: the same files, with other numbers in some."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from accelerate_methods.hosts.checkpoint_files import CheckpointError, find_file, weight_names
from llava.model.pruning.policy import matrices_of


def changed_weights(model: Any, projector: bool) -> dict[str, Tensor]:
    """The matrices of the decoder, and the projector's weights if it was fitted, by their names in the checkpoint."""
    found = {f"{name}.weight": part.weight for name, part in matrices_of(model).items()}
    if projector:
        state = model.get_model().mm_projector.state_dict()
        found |= {f"model.mm_projector.{name}": value for name, value in state.items()}
    return {name: value.detach() for name, value in found.items()}


def save_checkpoint(source: str | Path, target: str | Path, weights: Mapping[str, Tensor]) -> None:
    """Copy the checkpoint ``source`` to the folder ``target`` with ``weights`` in the place of its own.

    File by file, each tensor in the dtype that it has there; a weight that was zero stays zero.

    Raises:
        CheckpointError: ``target`` is there already and not empty, or ``source`` lacks one of the weights.
    """
    target = Path(target)
    if target.exists() and any(target.iterdir()):
        raise CheckpointError(f"{str(target)!r} is there already; give a folder that is new or empty.")
    config = find_file(source, "config.json")
    if config is None:
        raise CheckpointError(f"{str(source)!r} is not a checkpoint: it has no config.json.")
    missing = sorted(set(weights) - weight_names(source))
    if missing:
        raise CheckpointError(f"{str(source)!r} has no weight {missing[0]}: its names are not those of the model.")
    folder = config.parent
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir()):
        copy = target / file.name
        if file.is_dir():
            shutil.copytree(file, copy)
        elif file.suffix == ".safetensors":
            _write_safetensors(file, copy, weights)
        elif file.suffix == ".bin" and file.name.startswith(("pytorch_model", "mm_projector")):
            held = torch.load(file, map_location="cpu", weights_only=True)
            torch.save({name: _as_there(value, weights.get(name)) for name, value in held.items()}, copy)
        else:
            shutil.copy2(file, copy)


def _write_safetensors(file: Path, copy: Path, weights: Mapping[str, Tensor]) -> None:
    with safe_open(file, framework="pt") as opened:
        names, metadata = list(opened.keys()), opened.metadata()
        if not set(names) & set(weights):
            shutil.copy2(file, copy)
            return
        held = {name: _as_there(opened.get_tensor(name), weights.get(name)) for name in names}
    save_file(held, copy, metadata=metadata)


def _as_there(value: Tensor, new: Tensor | None) -> Tensor:
    return value if new is None else new.to(device="cpu", dtype=value.dtype).contiguous()
