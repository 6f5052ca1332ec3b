"""FastViTHD as a vision tower: one token for each cell of its last map."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from accelerate_methods.engine.encoder_attention import Encoded
from accelerate_methods.engine.flops import MacCounter
from accelerate_methods.hosts.tower_files import TowerError
from llava.image_processing import clip_image_processor
from llava.model.architectures.fastvlm.fastvithd import FastViTHD, FastViTHDConfig
from llava.model.multimodal_encoder.tower import VisionTower

_NAME = re.compile(r"(?P<kind>[a-z]+_[a-z0-9]+)(?:_[a-z0-9]+)*?_(?P<side>\d+)")
OFFICIAL = "mobileclip_l"


class FastViTHDTower(VisionTower):
    """The tower ``mobileclip_l_<side>``: (side / 64)^2 tokens for each view, 256 at 1024 pixels.

    Its weights are always those of the checkpoint. ``mm_vision_select_layer`` and ``mm_vision_select_feature`` say
    nothing here, as in the official code: there is one map, and no CLS token.
    """

    model_class = FastViTHD

    def __init__(self, name: str, args: Any, delay_load: bool = False, checkpoint: str | None = None):
        # built in any case: weights that the checkpoint lacks are missed while it is read
        super().__init__(name, args, delay_load=False, checkpoint=checkpoint)
        self.select_feature = "patch"

    def _read_config(self, args: Any) -> FastViTHDConfig:
        found = _NAME.fullmatch(self.vision_tower_name.rpartition("/")[2].lower())
        settings = getattr(args, "fastvithd_config", None)
        if found is None or (settings is None and found["kind"] != OFFICIAL):
            raise TowerError(
                f"mm_vision_tower {self.vision_tower_name!r} is not FastVLM's: {OFFICIAL}_<side in pixels> is "
                "(another encoder needs its numbers in fastvithd_config)."
            )
        return FastViTHDConfig.of(int(found["side"]), settings)

    def _layers_to_run(self) -> int:
        return sum(self.config.layers)

    def look(self, images: Tensor, *nothing: Any, **inside: Any) -> Encoded:
        """[V, 3, S, S] -> tokens row by row; S may be any multiple of the stride. No method acts inside the encoder.

        Raises:
            ValueError: another S.
        """
        stride = self.config.patch_size
        if images.shape[-1] % stride or images.shape[-2] % stride:
            raise ValueError(f"FastVLM needs views whose sides are multiples of {stride} pixels, got {images.shape}.")
        maps = self.vision_tower(images.to(device=self.device, dtype=self.dtype))
        return Encoded(maps.flatten(2).transpose(1, 2), self.special_tokens, None)

    def layers_of(self, names: Collection[str]) -> dict[str, int]:
        return {}

    def signals(self, encoded: Encoded, names: Collection[str]) -> dict[str, Tensor]:
        return {}

    def macs(self, views: int, side: int | None = None) -> int:
        counter = MacCounter()
        with torch.device("meta"):
            twin, pixels = FastViTHD(self.config), torch.empty(1, 3, *[side or self.image_size] * 2)
        with torch.no_grad(), counter.counting():
            twin(pixels)
        return views * counter.macs

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.head.proj.dtype

    def _make_processor(self) -> Any:
        return clip_image_processor(self.image_size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
