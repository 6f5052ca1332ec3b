"""What the files of an official checkpoint hold: config, tower weights, and whether everything was loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.utils import cached_file

#: transformers >= 5.6 dropped the inner ``vision_model`` of its CLIP and SigLIP vision models
KEY_MAPPING = {r"^model\.vision_tower\.vision_tower\.vision_model\.": "model.vision_tower.vision_tower."}
_TOWER_PREFIX = "model.vision_tower."
_IGNORABLE = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be loaded as asked."""


def find_file(path: str | Path, name: str) -> Path | None:
    """A file of a local checkpoint folder or hub repository (through the cache); None if there is no such file."""
    if Path(path).is_dir():
        found = Path(path) / name
        return found if found.is_file() else None
    if str(path).startswith((".", "/", "~")):
        raise CheckpointError(f"cannot reach checkpoint {str(path)!r}: no such folder.")
    try:
        found = cached_file(str(path), name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        message = f"cannot reach checkpoint {str(path)!r}: no such folder, and the hub says: {error}"
        raise CheckpointError(message) from error
    return None if found is None else Path(found)


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json as a dict."""
    found = find_file(path, "config.json")
    if found is None:
        raise CheckpointError(f"{str(path)!r} is not a checkpoint: it has no config.json.")
    return json.loads(found.read_text(encoding="utf-8"))


def load_config(config_class: Any, path: str | Path) -> Any:
    """A LLaVA config object. Official files say model_type "llava", which transformers would warn about."""
    raw = read_config(path) if not str(path).endswith(".json") else json.loads(Path(path).read_text(encoding="utf-8"))
    raw["model_type"] = config_class.model_type
    config = config_class.from_dict(raw)
    config.name_or_path = str(path)
    return config


def weight_names(path: str | Path) -> set[str]:
    """Names of all tensors in the checkpoint, read from the index or the file header only where possible."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (found := find_file(path, index)) is not None:
            return set(json.loads(found.read_text(encoding="utf-8"))["weight_map"])
    if (found := find_file(path, "model.safetensors")) is not None:
        with safe_open(found, framework="pt") as source:
            return set(source.keys())
    if (found := find_file(path, "pytorch_model.bin")) is not None:
        return set(torch.load(found, map_location="meta", weights_only=True, mmap=True))
    raise CheckpointError(
        f"{str(path)!r} has no weights: looked for model.safetensors and pytorch_model.bin, single or sharded (with "
        "index)."
    )


def has_tower_weights(path: str | Path, kwargs: Mapping[str, Any] | None = None) -> bool:
    """Whether the vision tower lies inside the checkpoint (1.6, OneVision, Video) or must come from the hub (1.5)."""
    state = (kwargs or {}).get("state_dict")
    names = set(state) if state is not None else weight_names(path)
    return any(name.startswith(_TOWER_PREFIX) for name in names)


def share_weight_conversion(source: str, model_type: str) -> None:
    """Load (and save) weights of ``model_type`` as transformers does those of ``source``: it fuses experts."""
    mapping = get_checkpoint_conversion_mapping(source)
    if mapping is not None:
        register_checkpoint_conversion_mapping(model_type, mapping, overwrite=True)


def check_loaded(info: Mapping[str, Any], path: Any, allow_missing: tuple[str, ...] = ()) -> None:
    """Refuse a checkpoint that left weights of the model uninitialised; a half-loaded model answers nonsense."""
    missing = sorted(
        k for k in info["missing_keys"] if not _IGNORABLE.search(k) and not k.startswith(tuple(allow_missing))
    )
    mismatched = [str(m[0] if isinstance(m, tuple) else m) for m in info.get("mismatched_keys", ())]
    errors = info.get("error_msgs") or []
    if missing or mismatched or errors:
        example = (missing or mismatched or errors)[0]
        raise CheckpointError(
            f"checkpoint {str(path)!r} does not fit the model: {len(missing)} weights missing, "
            f"{len(mismatched)} of the wrong shape{', ' + str(errors) if errors else ''} (first: {example})."
        )
