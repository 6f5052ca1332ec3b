"""Host of this project's LLaVA tree: LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, LLaVA-Video."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from llava.model.layout import pool_2d
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.multimodal_encoder.pooling_head import SiglipPoolingHead

from ..errors import MethodError
from ..items import VisualItem
from ..pipeline import Pipeline
from .base import Host

_HEAD_SIGNALS = frozenset({"frame_features", "pooling_attention"})


class LlavaAcceleration:
    """What is attached to one model: the pipeline, and the side modules its signals need (outside the state dict)."""

    def __init__(self, model: LlavaMetaForCausalLM, pipeline: Pipeline):
        self.pipeline = pipeline
        self._config = model.config
        self._tower_config = model.get_vision_tower().hub_config
        self._head: SiglipPoolingHead | None = None
        if _HEAD_SIGNALS & pipeline.signals:
            tower = model.get_vision_tower()
            head = SiglipPoolingHead.from_tower(tower.vision_tower_name, tower.checkpoint)
            self._head = head.to(device=tower.device, dtype=tower.dtype)

    def resize(self, pixels: Tensor) -> Tensor:
        """[V, 3, S, S] views at the side that the sample stage wants."""
        method = self.pipeline.sample
        if method is None:
            return pixels
        side = method.input_side(pixels.shape[-1], self._tower_config.patch_size)
        if side == pixels.shape[-1]:
            return pixels
        # antialiased bicubic in float32: half precision has no CPU kernel, and the image is small
        small = nn.functional.interpolate(pixels.float(), (side, side), mode="bicubic", antialias=True)
        return small.to(pixels.dtype)

    def signals(self, item: VisualItem, features: Tensor) -> dict[str, Tensor]:
        """The signals that the attached methods ask for, for one item with patch features [V, P, M]."""
        method = self.pipeline.compress
        if method is None or item.modality not in method.modalities or not method.signals:
            return {}
        out: dict[str, Tensor] = {}
        if self._head is not None:
            if self._head.probe.device != features.device:  # the model was moved after attaching
                self._head.to(features.device)
            frame_features, attention = self._head(features.to(self._head.probe.dtype))
            out["frame_features"] = frame_features
            out["pooling_attention"] = self._to_token_grid(attention, item)
        return {name: value for name, value in out.items() if name in method.signals}

    def _to_token_grid(self, attention: Tensor, item: VisualItem) -> Tensor:
        """[F, P] over patches -> [F, N] over the tokens the LLM gets, pooled as the features were."""
        if item.modality != "video":
            return attention
        mode = getattr(self._config, "mm_spatial_pool_mode", "average")
        return pool_2d(attention[..., None], mode)[..., 0]


class LlavaHost(Host):
    family = "LLaVA"
    stages = frozenset({"sample", "compress", "prefill", "decode"})
    signals = _HEAD_SIGNALS

    def supports(self, model: Any) -> bool:
        return isinstance(model, LlavaMetaForCausalLM)

    def attach(self, model: Any, pipeline: Pipeline) -> Any:
        tower = model.get_vision_tower()
        if tower is None or not tower.is_loaded:
            raise MethodError(
                f"{type(model).__name__} has no loaded vision tower; there are no visual tokens to compress."
            )
        is_siglip = tower.hub_config.model_type == "siglip_vision_model"
        self.check(pipeline, _HEAD_SIGNALS if is_siglip else frozenset(), f"a {tower.hub_config.model_type} tower")
        self._check_layers(model, pipeline)
        previous = self.attached(model)
        model.acceleration = LlavaAcceleration(model, pipeline) if pipeline.methods else None
        return previous

    def attached(self, model: Any) -> Any:
        return model.__dict__.get("acceleration")

    def restore(self, model: Any, previous: Any) -> None:
        if previous is None:
            model.__dict__.pop("acceleration", None)
        else:
            model.acceleration = previous

    @staticmethod
    def _check_layers(model: Any, pipeline: Pipeline) -> None:
        """Ask layer questions now, so that a layer out of range is an error at attach time."""
        layers = model.config.num_hidden_layers
        if pipeline.prefill is not None:
            pipeline.prefill.prefill_layers(layers)
        if pipeline.decode is not None:
            pipeline.decode.decode_layer(layers)


HOST = LlavaHost()
