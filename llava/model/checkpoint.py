"""What the files of an official checkpoint hold: config, tower weights, and whether everything was loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from accelerate_methods.hosts.checkpoint_files import (
    CheckpointError,
    find_file,
    read_config,
    read_json,
    weight_names,
)
from accelerate_methods.stages.errors import one_line

#: transformers >= 5.6 dropped the inner ``vision_model`` of its CLIP and SigLIP vision models
KEY_MAPPING = {r"^model\.vision_tower\.vision_tower\.vision_model\.": "model.vision_tower.vision_tower."}
TOWER_PREFIX = "model.vision_tower."


def load_config(config_class: Any, path: str | Path) -> Any:
    """A LLaVA config object. Official files say model_type "llava", which transformers would warn about."""
    raw = read_config(path) if not str(path).endswith(".json") else read_json(Path(path))
    raw["model_type"] = config_class.model_type
    try:
        config = config_class.from_dict(raw)
    except Exception as error:  # every release of transformers checks values in its own way
        raise CheckpointError(f"cannot use the config of {str(path)!r}: {one_line(error)}") from error
    config.name_or_path = str(path)
    return config


def has_tower_weights(path: str | Path, kwargs: Mapping[str, Any] | None = None) -> bool:
    """Whether the vision tower lies inside the checkpoint (1.6, OneVision, Video) or must come from the hub (1.5)."""
    state = (kwargs or {}).get("state_dict")
    names = set(state) if state is not None else weight_names(path)
    return any(name.startswith(TOWER_PREFIX) for name in names)


def check_whole_tower(info: Mapping[str, Any], path: Any, tower: str) -> None:
    """CheckpointError if files hold weights of a tower that has no place for them: of one that runs as a whole.

    Args:
        info: ``output_loading_info`` of ``from_pretrained``; tower: what it is called.
    """
    extra = sorted(name for name in info["unexpected_keys"] if name.startswith(TOWER_PREFIX))
    if extra:
        raise CheckpointError(
            f"checkpoint {str(path)!r} does not fit the model: {tower} has no place for {len(extra)} of its weights "
            f"(first: {extra[0]})."
        )


def share_weight_conversion(source: str, model_type: str) -> None:
    """Load (and save) weights of ``model_type`` as transformers does those of ``source``: it fuses experts."""
    mapping = get_checkpoint_conversion_mapping(source)
    if mapping is not None:
        register_checkpoint_conversion_mapping(model_type, mapping, overwrite=True)


__all__ = [
    "KEY_MAPPING",
    "TOWER_PREFIX",
    "CheckpointError",
    "check_whole_tower",
    "find_file",
    "has_tower_weights",
    "load_config",
    "read_config",
    "share_weight_conversion",
    "weight_names",
]
