"""LLaVA-OneVision of transformers: SigLIP tower, any-resolution images, videos pooled to a quarter with one newline."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from accelerate_methods.engine.devices import computes_on
from accelerate_methods.engine.encoder_attention import Encoded
from accelerate_methods.hosts.layouts import pool_2d, video_item
from accelerate_methods.hosts.native.family import Seen
from accelerate_methods.hosts.native.llava_next_video import PooledVideos
from accelerate_methods.hosts.pooling_head import SiglipPoolingHead
from accelerate_methods.hosts.tower_files import TowerError
from accelerate_methods.registry import families
from accelerate_methods.stages.compress import VisualItem
from accelerate_methods.stages.errors import MethodError

_HEAD_SIGNALS = frozenset({"frame_features", "pooling_attention"})
#: the tower whose attention-pooling head the checkpoints leave out; methods may ask for it
_TOWER = "google/siglip-so400m-patch14-384"
#: environment variable that names another one: a folder, or a name on the hub
TOWER_VARIABLE = "SIGLIP_TOWER"
_POOL = "bilinear"


class LlavaOnevision(PooledVideos):
    about = families.LLAVA_ONEVISION_HF

    _head: SiglipPoolingHead | None = None

    @property
    def signals(self) -> frozenset[str]:
        headless = self.tower.is_clip or self.tower.joined
        return self.tower.signals if headless else self.tower.signals | _HEAD_SIGNALS

    @property
    def aspect(self) -> str:
        return self.config.vision_aspect_ratio

    def prepare(self, wanted: frozenset[str]) -> None:
        super().prepare(wanted)
        if wanted & _HEAD_SIGNALS:
            head = self._load_head(", ".join(sorted(wanted & _HEAD_SIGNALS)))
            tower = self.model.model.vision_tower
            self._head = head.to(device=computes_on(tower), dtype=tower.dtype)

    def _load_head(self, wanted: str) -> SiglipPoolingHead:
        """From the tower that the user names, else from the checkpoint's folder ``vision_tower``, else from the hub."""
        named = os.environ.get(TOWER_VARIABLE)
        where = (
            f"{wanted} come from the attention-pooling head of the SigLIP tower, which LLaVA-OneVision checkpoints "
            f"leave out. Say where that tower is with the environment variable {TOWER_VARIABLE} (a folder, or a name "
            f"on the hub; default {_TOWER}), or put it into the checkpoint as folder 'vision_tower'."
        )
        try:
            head = SiglipPoolingHead.from_tower(named or _TOWER, None if named else self.config.name_or_path or None)
        except TowerError as error:
            raise MethodError(f"{where} {error}") from error
        width, own = head.probe.shape[-1], self.tower.config.hidden_size
        if width != own:
            raise MethodError(f"{where} {named or _TOWER} has width {width}, the tower of this model {own}.")
        return head

    def _views(self, seen: Seen, sizes: list[tuple[int, int]], config: Any, total: int) -> list[int]:
        several = seen.arguments.get("batch_num_images")
        if several is None:
            return super()._views(seen, sizes, config, total)
        # prompts with several images show each as a single view
        alone = [n == 1 for n in torch.as_tensor(several).tolist() for _ in range(n)]
        tiled_sizes = [size for size, tiles in zip(sizes, alone, strict=True) if tiles]
        tiled = iter(super()._views(seen, tiled_sizes, config, total - alone.count(False)))
        return [next(tiled) if tiles else 1 for tiles in alone]

    def _pooled(self, patches: Tensor) -> Tensor:
        return pool_2d(patches, _POOL)

    def _video_layout(self, pooled: Tensor) -> VisualItem:
        return video_item(pooled, pooled.new_zeros(1), "one_token", "spatial_unpad")

    def _video_signals(self, encoded: Encoded, wanted: frozenset[str]) -> dict[str, Tensor]:
        found = super()._video_signals(encoded, wanted)
        if self._head is None:
            return found
        if self._head.probe.device != encoded.hidden.device:  # the model was moved after attaching
            self._head.to(encoded.hidden.device)
        frames, attention = self._head(encoded.patches.to(self._head.probe.dtype))
        attention = attention if encoded.shortened else self._per_token(attention)
        return found | {"pooling_attention": attention, "frame_features": frames}
