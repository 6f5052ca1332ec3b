"""Official name of the module with the CLIP tower."""

from llava.model.multimodal_encoder.tower import CLIPVisionTower

__all__ = ["CLIPVisionTower"]
