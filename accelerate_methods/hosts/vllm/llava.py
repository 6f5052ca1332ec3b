"""LLaVA-1.5 and LLaVA-NeXT in vLLM, with a compress method between vision tower and language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PixtralVisionConfig
from vllm.model_executor.models import llava as stock
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from accelerate_methods.engine.encoder_attention import ENCODER_SIGNALS, Encoded, asked_layers
from accelerate_methods.engine.sequences import compressed_sequence
from accelerate_methods.hosts.text_tower import TextTower, text_tower_name, text_tower_of
from accelerate_methods.hosts.vllm.layouts import Layout, LlavaLayouts, LlavaNextLayouts
from accelerate_methods.hosts.vllm.processing import CompressedInfo, CompressedProcessor
from accelerate_methods.hosts.vllm.served import Served, given_signals
from accelerate_methods.hosts.vllm.tower import ServedTower, in_parts
from accelerate_methods.hosts.vllm.workers import MethodWorker, groups, most_views
from accelerate_methods.registry import families
from accelerate_methods.registry.pipeline import ModelFacts
from accelerate_methods.stages.compress import VisualItem
from accelerate_methods.stages.signals import IMAGE_TEXT
from accelerate_methods.stages.views import Views


def text_tower_of_model(config: Any, checkpoint: str, method: Served) -> str | None:
    """Where the text half of the model's CLIP tower is to be had, None where that is not known."""
    if config.vision_config.model_type != "clip_vision_model" or not isinstance(config.vision_feature_layer, int):
        return None
    return method.text_tower or text_tower_name(None, checkpoint, config.vision_config)


def tower_signals(config: Any, checkpoint: str, method: Served) -> frozenset[str]:
    """What a method can have of a CLIP or SigLIP tower."""
    if config.vision_config.model_type != "clip_vision_model":
        return ENCODER_SIGNALS - {"cls_attention"}
    looks = method.signals & IMAGE_TEXT and text_tower_of_model(config, checkpoint, method) is not None
    return ENCODER_SIGNALS | IMAGE_TEXT if looks else ENCODER_SIGNALS


class LlavaInfo(CompressedInfo):
    """What the front end knows of a LLaVA model."""

    about = families.LLAVA_1_5_HF
    layouts_class: type = LlavaLayouts

    def __init__(self, ctx: Any) -> None:
        self.layouts = self.layouts_class(ctx.get_hf_config())
        super().__init__(ctx)

    def facts(self, method: Served) -> ModelFacts:
        config = self.get_hf_config()
        joined = not isinstance(config.vision_feature_layer, int)
        return ModelFacts(
            name=self.about.name,
            stages=frozenset({"compress"}),
            signals=frozenset() if joined else self.signals(method),
            modalities=self.about.modalities,
            layers=config.text_config.num_hidden_layers,
            limits=self.about.limits,
            signal_limits="Its features are not those of one encoder layer." if joined else "",
        )

    def signals(self, method: Served) -> frozenset[str]:
        return tower_signals(self.get_hf_config(), self.model_id, method)

    def check(self, method: Served) -> None:
        config = self.get_hf_config()
        depth, number = config.vision_config.num_hidden_layers, config.vision_feature_layer
        if not isinstance(number, int):
            return
        asked_layers(method.signals, depth, number - 1 if number > 0 else depth + number)
        if IMAGE_TEXT & given_signals(method, self.signals(method)):
            # read once here, where an error is the request's own
            name = text_tower_of_model(config, self.model_id, method)
            text_tower_of(self, name, config.vision_config.hidden_size, method.name)

    def layout(self, modality: str, items: Any, index: int, processed: Any) -> Layout:
        size = items.get_image_size(index)
        return self.layouts.image(size.height, size.width)


class CompressedLlavaInfo(LlavaInfo, stock.LlavaProcessingInfo):
    pass


class CompressedLlavaProcessor(CompressedProcessor, stock.LlavaMultiModalProcessor):
    pass


def _info(ctx: Any) -> Any:
    """Pixtral's models go by the same name; they are vLLM's own."""
    pixtral = isinstance(ctx.get_hf_config().vision_config, PixtralVisionConfig)
    return stock.PixtralHFProcessingInfo(ctx) if pixtral else CompressedLlavaInfo(ctx)


def _processor(info: Any, dummy_inputs: Any) -> Any:
    if isinstance(info, CompressedLlavaInfo):
        return CompressedLlavaProcessor(info, dummy_inputs)
    return stock._build_llava_or_pixtral_hf_processor(info, dummy_inputs)


class LlavaEncoding(MethodWorker):
    """Mixin in front of a LLaVA model of vLLM: encodes images under the method that came with each."""

    layouts_class: type = LlavaLayouts

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config, self._checkpoint = self.config, vllm_config.model_config.model
        self._served_tower: ServedTower | None = None
        if config.vision_config.model_type in ("clip_vision_model", "siglip_vision_model"):
            self._served_tower = ServedTower(self.vision_tower, config.vision_config)
            self._layouts = self.layouts_class(config)
        self._most_views = most_views()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return super().load_weights(weights if self._served_tower is None else self._served_tower.renamed(weights))

    def embed_multimodal(self, **kwargs: Any) -> Any:
        modality, served = self._taken(kwargs)
        return super().embed_multimodal(**kwargs) if served is None else tuple(self._embedded(modality, served, kwargs))

    def _embedded(self, modality: str, served: list[Served], kwargs: dict[str, Any]) -> list[Tensor]:
        return self._images(served, kwargs)

    # -- images ------------------------------------------------------------------------------------------------------

    def _image_views(self, kwargs: dict[str, Any]) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """Views [V, 3, H, W] and (width, height) of each image."""
        pixels = kwargs["pixel_values"]
        side = self._layouts.size
        return [image[None] for image in pixels], [(side, side)] * len(pixels)

    def _images(self, served: list[Served], kwargs: dict[str, Any]) -> list[Tensor]:
        pixels, sizes = self._image_views(kwargs)
        layouts = [self._layouts.image(height, width) for width, height in sizes]
        # images that are processed together may be padded to as many views as the largest has
        pixels = [views[: layout.views] for views, layout in zip(pixels, layouts, strict=True)]
        out: list[Tensor] = []
        for part in groups([layout.views for layout in layouts], self._most_views):
            wanted = self._wanted([served[i] for i in part])
            encoded, signals = self._encode(torch.cat([pixels[i] for i in part]), wanted)
            first = 0
            for i in part:
                here = slice(first, first + layouts[i].views)
                first = here.stop
                own = {name: value[here] for name, value in signals.items()}
                out.append(self._image(served[i], layouts[i], sizes[i], encoded[here], own))
        return out

    def _available(self, method: Served) -> frozenset[str]:
        return tower_signals(self.config, self._checkpoint, method)

    def _text_tower(self, method: Served) -> TextTower | None:
        if not IMAGE_TEXT & self._wanted([method]):
            return None
        name, like = text_tower_of_model(self.config, self._checkpoint, method), next(self.vision_tower.parameters())
        tower = text_tower_of(self, name, self.config.vision_config.hidden_size, method.name)
        return tower.on_device(like.device, like.dtype)

    def _encode(self, pixels: Tensor, wanted: frozenset[str]) -> tuple[Encoded, dict[str, Tensor]]:
        """Patches of all views, and signals over them; the tower gets so many views at a time."""
        runs = [
            self._served_tower.run(lambda part: self._image_pixels_to_features(self.vision_tower, part), part, wanted)
            for part in in_parts(pixels, self._most_views)
        ]
        hidden = torch.cat([encoded.hidden for encoded, _ in runs])
        signals = {name: torch.cat([found[name] for _, found in runs]) for name in runs[0][1]}
        return Encoded(hidden, self._served_tower.special, None), signals

    def _image(
        self, method: Served, layout: Layout, size: tuple[int, int], encoded: Encoded, signals: dict[str, Tensor]
    ) -> Tensor:
        newline, text = getattr(self, "image_newline", None), self._text_tower(method)
        if text is not None:
            signals = signals | {"image_embeds": text.embed_patches(encoded.patches, self._served_tower.post_norm)}

        def whole() -> VisualItem:
            return self._layouts.image_item(self.multi_modal_projector(encoded.patches), newline, size)

        if layout.before_projector(method):
            item = moved_layout(layout.item, encoded.hidden.device, newline)
            item.views = Views(
                features=encoded.patches,
                special=encoded.special,
                grid=layout.patches,
                tiles=layout.tiles,
                signals=signals,
                uncompressed=whole,
                project=self.multi_modal_projector,
            )
        else:
            item = whole()
            item.signals = {name: value.flatten(0, 1)[item.source][None] for name, value in signals.items()}
        return compressed_sequence(item, method, self.multi_modal_projector).tokens


def moved_layout(item: VisualItem, device: torch.device, newline: Tensor | None) -> VisualItem:
    """A layout without numbers on a device, with the model's newline."""
    moved = {
        field.name: value.to(device)
        for field in dataclasses.fields(item)
        if isinstance(value := getattr(item, field.name), Tensor)
    }
    if item.newlines is not None:
        moved["newlines"] = newline.expand(item.newlines.shape[0], -1)
    return dataclasses.replace(item, **moved)


@MULTIMODAL_REGISTRY.register_processor(_processor, info=_info, dummy_inputs=stock.LlavaDummyInputsBuilder)
class CompressedLlava(LlavaEncoding, stock.LlavaForConditionalGeneration):
    pass


class CompressedLlavaNextInfo(LlavaInfo, LlavaNextProcessingInfo):
    about = families.LLAVA_NEXT_HF
    layouts_class = LlavaNextLayouts


class CompressedLlavaNextProcessor(CompressedProcessor, LlavaNextMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    CompressedLlavaNextProcessor, info=CompressedLlavaNextInfo, dummy_inputs=stock.LlavaDummyInputsBuilder
)
class CompressedLlavaNext(LlavaEncoding, LlavaNextForConditionalGeneration):
    layouts_class = LlavaNextLayouts

    def _image_views(self, kwargs: dict[str, Any]) -> tuple[list[Tensor], list[tuple[int, int]]]:
        return list(kwargs["pixel_values"]), [(width, height) for height, width in kwargs["image_sizes"].tolist()]
