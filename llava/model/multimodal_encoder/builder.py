"""Choose the tower class by what the tower is, not by how its name is spelt."""

from __future__ import annotations

from typing import Any

from transformers import CLIPVisionConfig

from accelerate_methods.hosts.tower_files import TowerError, tower_config
from llava.model.multimodal_encoder.tower import CLIPVisionTower, SigLipVisionTower, VisionTower


def build_vision_tower(vision_tower_cfg: Any, **kwargs: Any) -> VisionTower:
    """Tower for a LLaVA config. ``kwargs``: ``delay_load``, ``checkpoint``."""
    name = getattr(vision_tower_cfg, "mm_vision_tower", None) or getattr(vision_tower_cfg, "vision_tower", None)
    if not name:
        raise TowerError("the config names no vision tower (mm_vision_tower).")
    if getattr(vision_tower_cfg, "s2", False):
        raise TowerError("multi-scale (s2) vision towers are not supported.")
    config = tower_config(name, kwargs.get("checkpoint"))
    tower_class = CLIPVisionTower if isinstance(config, CLIPVisionConfig) else SigLipVisionTower
    return tower_class(name, args=vision_tower_cfg, **kwargs)
