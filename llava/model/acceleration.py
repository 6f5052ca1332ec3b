"""Host of this project's LLaVA tree: LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, LLaVA-Video."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from accelerate_methods.engine.encoder_attention import Encoded
from accelerate_methods.engine.encoder_blocks import acting_blocks
from accelerate_methods.hosts.base import Host
from accelerate_methods.hosts.layouts import tile_grid
from accelerate_methods.hosts.pooling_head import SiglipPoolingHead
from accelerate_methods.hosts.questions import (
    PromptText,
    asks,
    prompt_texts,
    question_reader,
    questions_of,
    signals_of_prompts,
)
from accelerate_methods.hosts.text_tower import TextTower, text_tower_name, text_tower_of
from accelerate_methods.registry import families
from accelerate_methods.registry.pipeline import ModelFacts, Pipeline
from accelerate_methods.stages.compress import ViewCompressMethod, VisualItem
from accelerate_methods.stages.encode import EncodeMethod
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.signals import ANYWHERE, IMAGE_TEXT, OF_PROMPT, resolve_signal
from accelerate_methods.stages.views import Views
from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.splice import Prompts
from llava.model.vision import VisualInput

_HEAD_SIGNALS = frozenset({"frame_features", "pooling_attention"})
#: config keys of checkpoints that were trained on videos
_VIDEO_KEYS = ("mm_spatial_pool_mode", "mm_spatial_pool_stride", "mm_newline_position")
_DENSE = Pipeline()
_NO_VIDEO = f"Its config has none of {', '.join(_VIDEO_KEYS)}: it was not trained on videos."


class LlavaAcceleration:
    """What is attached to one model: the pipeline, and the side modules its signals need (outside the state dict).

    Attributes:
        encoder_signals: names that the vision tower has to compute; encoder_layers: those whose inputs it has to keep.
        adaptations: signal that a method asks for -> what this tower gives instead.
        tokenizer: reads the question out of the prompt where the caller gives none; None: the caller has to.
    """

    tokenizer: Any = None

    def __init__(self, model: Any, pipeline: Pipeline, available: frozenset[str]):
        self.pipeline = pipeline
        self._config = model.config
        self._tower = model.get_vision_tower()
        self._pool = model.get_2dPool
        if pipeline.encode is not None:
            if self._tower.select_feature != "patch":
                raise MethodError(
                    f"{pipeline.encode.name}: the CLS token goes on to the language model with this checkpoint "
                    f"(mm_vision_select_feature={self._tower.select_feature!r}); only 'patch' is supported."
                )
            acting_blocks(pipeline.encode, self._tower.num_blocks)
        given = {name: resolve_signal(m, name, available) for m in pipeline.methods for name in m.signals}
        self.adaptations = {name: real for name, real in given.items() if name != real}
        names = frozenset(given.values())
        self._names = names
        self.encoder_signals = names - _HEAD_SIGNALS - IMAGE_TEXT - ANYWHERE
        self.encoder_layers = frozenset(self._tower.layers_of(self.encoder_signals).values())
        self._head: SiglipPoolingHead | None = None
        if _HEAD_SIGNALS & names:
            head = SiglipPoolingHead.from_tower(self._tower.vision_tower_name, self._tower.checkpoint)
            self._head = head.to(device=self._tower.device, dtype=self._tower.dtype)
        self._text: TextTower | None = None
        if IMAGE_TEXT & names:
            text = text_tower_of(model, text_tower_named(model, pipeline), self._tower.hidden_size, pipeline.name)
            self._text = text.on_device(self._tower.device, self._tower.dtype)

    def texts(self, model: Any, prompts: Prompts) -> list[PromptText] | None:
        """What the methods are told of the text of each prompt; None if they do not look at it.

        Raises:
            MethodError: nobody says what the question is.
        """
        by_rows = OF_PROMPT & self._names
        if not (by_rows or asks(self.pipeline, self._names)):
            return None
        ids, mask = prompts.input_ids, prompts.attention_mask
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()

        def rows() -> Iterator[tuple[Tensor, Tensor]]:
            for row, keep in zip(ids, real, strict=True):
                yield row[keep], row[keep] == IMAGE_TOKEN_INDEX

        given = questions_of(self.pipeline, self._names, prompts.questions, len(ids), self.tokenizer, rows)
        of_prompt = {}
        if by_rows:
            text = real & (ids != IMAGE_TOKEN_INDEX)
            embeds = model.get_model().embed_tokens(ids.masked_fill(~text, 0))
            of_prompt = signals_of_prompts(embeds, text, by_rows)
        read = question_reader(self.pipeline, self._names, self.tokenizer, model.get_model().embed_tokens)
        return prompt_texts(given, of_prompt, self._text, ids.shape[0], read)

    def acts_on_views(self, kind: str) -> bool:
        """Whether an item of this kind is compressed before the projector."""
        method = self.pipeline.compress
        if self.pipeline.loses_grid:  # tokens of views are then compressed as those of frames are
            return False
        return isinstance(method, ViewCompressMethod) and kind != "video" and "image" in method.modalities

    def encode_method(self, kind: str) -> EncodeMethod | None:
        """What acts inside the tower on an item of this kind."""
        method, modality = self.pipeline.encode, "video" if kind == "video" else "image"
        return method if method is not None and modality in method.modalities else None

    def resize(self, pixels: Tensor) -> Tensor:
        """[V, 3, S, S] views at the side that the sample stage wants."""
        method = self.pipeline.sample
        if method is None:
            return pixels
        side = method.input_side(pixels.shape[-1], self._tower.hub_config.patch_size)
        if side == pixels.shape[-1]:
            return pixels
        # antialiased bicubic in float32: half precision has no CPU kernel, and the image is small
        small = nn.functional.interpolate(pixels.float(), (side, side), mode="bicubic", antialias=True)
        return small.to(pixels.dtype)

    def views(self, model: Any, visual: VisualInput, encoded: Encoded, features: Tensor) -> Views:
        """One image before the projector, for a method that acts there; ``features`` [V, P, M] are the projector's."""
        rows = math.isqrt(encoded.patches.shape[1])
        special, tower_size = encoded.special, self._tower.image_size
        tiles = None if visual.kind == "plain" else tile_grid(len(features), visual.size, tower_size, self._config)
        padded = tiles is None and getattr(self._config, "image_aspect_ratio", None) == "pad"
        return Views(
            features=encoded.patches.to(features.dtype),
            special=None if special is None else special.to(features.dtype),
            grid=(rows, rows),
            tiles=tiles,
            signals=self.view_signals(encoded),
            uncompressed=lambda: model.lay_out(model.project(features), visual.kind, visual.size),
            project=model.project,
            size=visual.size if padded else None,
        )

    def view_signals(self, encoded: Encoded) -> dict[str, Tensor]:
        """The signals that a method acting on views asks for, over the patches of an image's views."""
        found = self._tower.signals(encoded, self.encoder_signals)
        if "image_embeds" in self._names:
            norm = self._tower.vision_tower.post_layernorm
            found["image_embeds"] = self._text.embed_patches(encoded.patches, norm)
        return found

    def signals(self, item: VisualItem, encoded: Encoded) -> dict[str, Tensor]:
        """The signals that the attached methods ask for, over the tokens of one item."""
        method = self.pipeline.compress
        acts = method is not None and item.modality in method.modalities
        if not acts or not (method.signals or encoded.carried):
            return {}
        out = self.view_signals(encoded) | encoded.carried
        if self._head is not None:
            if self._head.probe.device != encoded.hidden.device:  # the model was moved after attaching
                self._head.to(encoded.hidden.device)
            frames, out["pooling_attention"] = self._head(encoded.patches.to(self._head.probe.dtype))
        tokens = out if encoded.shortened else {name: self._to_tokens(value, item) for name, value in out.items()}
        return tokens if self._head is None else {**tokens, "frame_features": frames}

    def _to_tokens(self, signal: Tensor, item: VisualItem) -> Tensor:
        """[F, P, ...] over patches -> [F, N, ...] over the tokens that the LLM gets."""
        if item.modality == "video":  # pooled as the features are
            return self._pool(signal[..., None])[..., 0] if signal.ndim == 2 else self._pool(signal)
        return signal if item.source is None else signal.flatten(0, 1)[item.source][None]


def text_tower_named(model: Any, pipeline: Pipeline) -> str | None:
    """Where the text tower of the model is to be had, or the one that a method names; None if nowhere."""
    tower = model.get_vision_tower()
    return pipeline.text_tower or text_tower_name(tower.vision_tower_name, tower.checkpoint, tower.hub_config)


def facts_of(model: Any, pipeline: Pipeline = _DENSE) -> ModelFacts:
    """What this very model can do: which of the tree's families it is, by its tower and by what its config says of
    images and videos."""
    config, kind = model.config, model.get_vision_tower().hub_config.model_type
    pools_videos = any(getattr(config, key, None) is not None for key in _VIDEO_KEYS)
    if kind == "siglip_vision_model":
        grid = getattr(config, "mm_newline_position", None) == "grid"
        family = families.LLAVA_VIDEO if grid else families.LLAVA_ONEVISION
    else:
        plain = getattr(config, "mm_patch_merge_type", "flat") == "flat"
        family = families.LLAVA_1_5 if plain else families.LLAVA_NEXT
    facts = ModelFacts(
        name=family.name,
        stages=family.stages,
        signals=family.signals if text_tower_named(model, pipeline) is not None else family.signals - IMAGE_TEXT,
        # LLaVA-NeXT-Video checkpoints: LLaVA-NeXT's tower, and pooling of videos
        modalities=family.modalities | ({"video"} if pools_videos else set()),
        layers=config.num_hidden_layers,
        limits="" if pools_videos else _NO_VIDEO,
    )
    if model.about is not None:  # a trained architecture says so itself
        about = model.about
        facts = ModelFacts(about.name, about.stages, about.signals, about.modalities, facts.layers, about.limits)
    return model.own_facts(facts)


class LlavaHost(Host):
    def __init__(self, model_class: type):
        self._model_class = model_class

    def supports(self, model: Any) -> bool:
        return isinstance(model, self._model_class)

    def attach(self, model: Any, pipeline: Pipeline) -> Any:
        tower = model.get_vision_tower()
        if tower is None or not tower.is_loaded:
            raise MethodError(
                f"{type(model).__name__} has no loaded vision tower; there are no visual tokens to compress."
            )
        if pipeline.methods and (getattr(model, "_tp_size", None) or 1) > 1:  # loaded by from_pretrained itself
            raise MethodError(
                f"{pipeline.name} cannot act on a tensor-parallel model: it reads attention over all heads, and this "
                f"process holds one of {model._tp_size} parts of them. Load it with device_map='auto' instead."
            )
        facts = facts_of(model, pipeline)
        pipeline.check(facts)
        previous = self.attached(model)
        model.acceleration = LlavaAcceleration(model, pipeline, facts.signals) if pipeline.methods else None
        return previous

    def attached(self, model: Any) -> Any:
        return model.__dict__.get("acceleration")

    def restore(self, model: Any, previous: Any) -> None:
        if previous is None:
            model.__dict__.pop("acceleration", None)
        else:
            model.acceleration = previous
