"""Where a vision tower's configuration and weights come from.

Order: the folder ``vision_tower`` inside the checkpoint, an existing directory, the name on the hub (through its local
cache when offline); a path of another machine that ends like an official tower's name stands for that one. The
structure of the two official towers is also shipped with the package (``text_config.json``: of their text halves), so
that a checkpoint that carries its own tower weights needs no hub access at all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import CLIPVisionConfig, SiglipVisionConfig

from accelerate_methods.hosts.checkpoint_files import INDEXES, SINGLE, CheckpointError, find_file, read_json, weight_map

_KNOWN = Path(__file__).parent / "known_towers"
_CONFIG_CLASSES = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}
VisionConfig = CLIPVisionConfig | SiglipVisionConfig


class TowerError(CheckpointError):
    """A vision tower that cannot be identified or loaded."""


def tower_folder(name: str, checkpoint: str | None) -> Path | None:
    """A local folder holding the tower ``name``, or None if only the hub can have it."""
    if checkpoint and (Path(checkpoint) / "vision_tower" / "config.json").is_file():
        return Path(checkpoint) / "vision_tower"
    if (Path(name) / "config.json").is_file():
        return Path(name)
    return None


def official_name(name: str) -> str:
    """The hub's name of an official tower that is called by a path of another machine, else ``name`` as it is.

    Checkpoints keep the path from which their training read the tower.
    """
    if not re.search(r"^[/.~]|/.*/", name) or Path(name).is_dir():
        return name
    last = Path(name).name
    known = (folder.name.replace("--", "/") for folder in _KNOWN.iterdir())
    return next((hub for hub in known if hub.rpartition("/")[2] == last), name)


def tower_file(name: str, checkpoint: str | None, filename: str) -> Path:
    """Path of one file of the tower; downloads it from the hub if it is not here.

    Raises:
        TowerError: it is nowhere to be had (names every place looked at).
    """
    folder = tower_folder(name, checkpoint)
    if folder is not None:
        if (folder / filename).is_file():
            return folder / filename
        raise TowerError(f"vision tower folder {folder} has no {filename}.")
    name = official_name(name)
    cached = _cached(name, filename)
    if cached is not None:
        return cached
    known = _KNOWN / name.replace("/", "--") / filename
    if known.is_file():
        return known
    reason, cause = "the hub has no such file", None
    try:
        found = find_file(name, filename)
    except CheckpointError as error:
        found, reason, cause = None, str(error), error
    if found is None:
        raise TowerError(
            f"cannot find {filename} of vision tower {name!r}: no folder 'vision_tower' in the checkpoint "
            f"({checkpoint or 'path unknown'}), and no directory of that name; {reason}"
        ) from cause
    return found


def _cached(name: str, filename: str) -> Path | None:
    """The file in the local hub cache, without asking the hub."""
    from huggingface_hub import try_to_load_from_cache

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):  # a path, not a name on the hub
        return None
    found = try_to_load_from_cache(name, filename)
    return Path(found) if isinstance(found, str) else None


def tower_config(name: str, checkpoint: str | None) -> VisionConfig:
    """Configuration of the tower as it lies on the hub (all its layers)."""
    path = tower_file(name, checkpoint, "config.json")
    raw = read_json(path)
    kind = str(raw.get("model_type", ""))
    vision = raw.get("vision_config", raw)
    for family, config_class in _CONFIG_CLASSES.items():
        if kind in (family, f"{family}_vision_model"):
            return config_class.from_dict(vision)
    raise TowerError(f"{path}: model_type {kind!r} is not a supported vision tower (clip, siglip).")


def text_config(name: str, checkpoint: str | None) -> dict[str, Any]:
    """The ``text_config`` of the CLIP or SigLIP checkpoint that a tower is of.

    Raises:
        TowerError: its files do not say it.
    """
    path = tower_file(name, checkpoint, "config.json")
    found = read_json(path).get("text_config")
    if isinstance(found, dict):
        return found
    known = _KNOWN / official_name(name).replace("/", "--") / "text_config.json"
    if known.is_file():
        return read_json(known)
    raise TowerError(f"{path} has no text_config: it is of a vision tower without its text tower.")


def tower_weights(name: str, checkpoint: str | None, prefix: str = "") -> dict[str, torch.Tensor]:
    """Vision weights below ``vision_model.<prefix>``, named relative to ``vision_model.``; safetensors or .bin."""
    wanted = f"vision_model.{prefix}"
    weights = weights_named(weight_files(name, checkpoint), (wanted,))
    if not weights:
        raise TowerError(f"the files of vision tower {name!r} hold no weights named {wanted}*.")
    return {k.removeprefix("vision_model."): v for k, v in weights.items()}


def weights_named(paths: Sequence[Path], prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The weights in these files whose names begin with one of ``prefixes``; safetensors or .bin."""
    found: dict[str, torch.Tensor] = {}
    for path in paths:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as source:
                found.update({key: source.get_tensor(key) for key in source.keys() if key.startswith(prefixes)})
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            found.update({key: value for key, value in content.items() if key.startswith(prefixes)})
    return found


def weight_files(name: str, checkpoint: str | None) -> list[Path]:
    """The weight files of a tower, all shards; :class:`TowerError` if there are none."""
    tried = []
    for index, single in zip(INDEXES, SINGLE, strict=True):
        try:
            return [tower_file(name, checkpoint, single)]
        except TowerError as error:
            tried.append(str(error))
        try:
            listing = tower_file(name, checkpoint, index)
        except TowerError:
            continue
        return [tower_file(name, checkpoint, shard) for shard in sorted(set(weight_map(listing).values()))]
    raise TowerError(tried[0])
