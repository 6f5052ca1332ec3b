"""LLaVA-OneVision in vLLM: images as LLaVA-NeXT's, videos pooled to a quarter with one newline behind them.

Videos of different lengths in one step are encoded one by one: vLLM's own code gives such a batch back in a shape that
its runner does not take.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from torch import Tensor
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from accelerate_methods.engine.sequences import compressed_sequence
from accelerate_methods.hosts.native.llava_onevision import TOWER_VARIABLE
from accelerate_methods.hosts.pooling_head import SiglipPoolingHead
from accelerate_methods.hosts.tower_files import TowerError
from accelerate_methods.hosts.vllm.layouts import Layout, LlavaOnevisionLayouts
from accelerate_methods.hosts.vllm.llava import LlavaEncoding, LlavaInfo
from accelerate_methods.hosts.vllm.processing import CompressedProcessor
from accelerate_methods.hosts.vllm.served import Served
from accelerate_methods.registry import families
from accelerate_methods.stages.errors import MethodError

_HEAD_SIGNALS = frozenset({"frame_features", "pooling_attention"})
_TOWER = "google/siglip-so400m-patch14-384"


@functools.lru_cache(maxsize=4)
def pooling_head(checkpoint: str, width: int) -> SiglipPoolingHead:
    """The attention-pooling head that the checkpoint leaves out, from where the native host takes it, too.

    Raises:
        MethodError: it is not to be had, or is of another tower.
    """
    named = os.environ.get(TOWER_VARIABLE)
    try:
        head = SiglipPoolingHead.from_tower(named or _TOWER, None if named else checkpoint)
    except TowerError as error:
        raise MethodError(
            f"{', '.join(sorted(_HEAD_SIGNALS))} come from the attention-pooling head of the SigLIP tower, which the "
            f"checkpoint leaves out. Name the tower with {TOWER_VARIABLE} (a folder or a name on the hub). {error}"
        ) from error
    if head.probe.shape[-1] != width:
        raise MethodError(f"{named or _TOWER} has width {head.probe.shape[-1]}, the tower of this model {width}.")
    return head


def with_head(signals: frozenset[str]) -> frozenset[str]:
    """With those of the attention-pooling head that SigLIP towers have."""
    return signals if "cls_attention" in signals else signals | _HEAD_SIGNALS


class CompressedLlavaOnevisionInfo(LlavaInfo, LlavaOnevisionProcessingInfo):
    about = families.LLAVA_ONEVISION_HF
    layouts_class = LlavaOnevisionLayouts

    def signals(self, method: Served) -> frozenset[str]:
        return with_head(super().signals(method))

    def check(self, method: Served) -> None:
        super().check(method)
        if method.signals & _HEAD_SIGNALS:
            pooling_head(self.model_id, self.get_hf_config().vision_config.hidden_size)

    def layout(self, modality: str, items: Any, index: int, processed: Any) -> Layout:
        if modality == "image":
            return super().layout(modality, items, index, processed)
        return self.layouts.video(items.get_num_frames(index))


class CompressedLlavaOnevisionProcessor(CompressedProcessor, LlavaOnevisionMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    CompressedLlavaOnevisionProcessor,
    info=CompressedLlavaOnevisionInfo,
    dummy_inputs=LlavaOnevisionDummyInputsBuilder,
)
class CompressedLlavaOnevision(LlavaEncoding, LlavaOnevisionForConditionalGeneration):
    layouts_class = LlavaOnevisionLayouts

    def embed_multimodal(self, **kwargs: Any) -> Any:
        # vLLM gives videos of different lengths a batch dimension too many
        return tuple(part[0] if part.ndim == 3 else part for part in super().embed_multimodal(**kwargs))

    def _available(self, method: Served) -> frozenset[str]:
        return with_head(super()._available(method))

    def _image_views(self, kwargs: dict[str, Any]) -> tuple[list[Tensor], list[tuple[int, int]]]:
        return list(kwargs["pixel_values"]), [(width, height) for height, width in kwargs["image_sizes"].tolist()]

    def _embedded(self, modality: str, served: list[Served], kwargs: dict[str, Any]) -> list[Tensor]:
        if modality == "image":
            return super()._embedded(modality, served, kwargs)
        return [self._video(*pair) for pair in zip(served, kwargs["pixel_values_videos"], strict=True)]

    def _video(self, method: Served, pixels: Tensor) -> Tensor:
        wanted = self._wanted([method])
        encoded, signals = self._encode(pixels, wanted)
        found = {name: self._layouts.pooled(value) for name, value in signals.items()}
        if wanted & _HEAD_SIGNALS:
            found |= self._head_signals(encoded.patches)
        item = self._layouts.video_item(
            self._layouts.pooled(self.multi_modal_projector(encoded.patches)), self.image_newline
        )
        item.signals = found
        return compressed_sequence(item, method, self.multi_modal_projector).tokens

    def _head_signals(self, patches: Tensor) -> dict[str, Tensor]:
        head = pooling_head(self._checkpoint, patches.shape[-1]).to(device=patches.device, dtype=patches.dtype)
        frames, attention = head(patches)
        return {"frame_features": frames, "pooling_attention": self._layouts.pooled(attention)}
