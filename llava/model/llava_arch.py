"""What makes a decoder a LLaVA: vision tower, projector, and three points between pixels and embeddings.

    encode    pixels -> visual items: tower, projector, and the layout in which the language model would read them
    compress  visual items -> visual sequences: what an attached method leaves of each
    embed     text and visual sequences -> embeddings, masks, positions and labels

``prepare_multimodal`` runs them one after the other; ``forward`` and ``generate`` (:mod:`.generation`) call it. A
trained architecture is a subclass that overrides the points where it differs. The mixins go in front of a transformers
decoder (``LlavaMetaModel``) and its causal LM (``LlavaMetaForCausalLM``). Without a method attached, the model computes
what the official code does (docs/llava_tree.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from accelerate_methods.engine import recording
from accelerate_methods.engine.cache import check_cache, request_state
from accelerate_methods.engine.cached_keys import cached_length
from accelerate_methods.engine.devices import computes_on, moved, own_weights
from accelerate_methods.engine.loop import needs_loop, run_decoder
from accelerate_methods.engine.prompt import PromptLayout
from accelerate_methods.engine.sequences import VisualSequence, compressed_sequence
from accelerate_methods.hosts import register_host
from accelerate_methods.hosts.calls import acts_on_text, refuse_outputs
from accelerate_methods.hosts.checkpoint_files import check_files, check_loaded, reading
from accelerate_methods.hosts.layouts import (
    flat_item,
    image_item,
    pool_2d,
    shortened_item,
    unpad_image,  # noqa: F401 (official name)
    video_item,
)
from accelerate_methods.registry.pipeline import ModelFacts, Pipeline
from accelerate_methods.stages.compress import VisualItem
from accelerate_methods.stages.encode import PatchMap
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.model.acceleration import LlavaHost
from llava.model.checkpoint import KEY_MAPPING, TOWER_PREFIX, has_tower_weights, load_config
from llava.model.generation import MultimodalGeneration, describe
from llava.model.inputs import MediaInputs
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.splice import Prompts, Spliced, beside_text, samples_of_items, splice_prompts
from llava.model.vision import VisualInput, by_kind, gather_visuals, has_images, meta_tokens, patch_grid, subset


class LlavaMetaModel:
    """Adds tower, projector and newline embedding to a decoder."""

    def __init__(self, config: Any):
        super().__init__(config)
        if getattr(config, "mm_vision_tower", None):
            self.vision_tower = self.build_tower(
                config,
                delay_load=getattr(config, "delay_load", False),
                checkpoint=getattr(config, "tower_checkpoint", None) or config.name_or_path or None,
            )
            # the tower stays in one piece when the model is spread over devices
            self._no_split_modules = {*(self._no_split_modules or ()), type(self.vision_tower).__name__}
            self.mm_projector = self.build_projector(config)
            if "unpad" in getattr(config, "mm_patch_merge_type", "flat"):
                self.image_newline = nn.Parameter(torch.randn(config.hidden_size) * config.hidden_size**-0.5)

    @staticmethod
    def build_tower(config: Any, **how: Any) -> nn.Module:
        """``how``: ``delay_load`` and ``checkpoint`` of the tower."""
        return build_vision_tower(config, **how)

    @staticmethod
    def build_projector(config: Any) -> nn.Module:
        return build_vision_projector(config)

    def get_vision_tower(self):
        return getattr(self, "vision_tower", None)

    def forward(self, *args: Any, pipeline: Pipeline | None = None, layout: PromptLayout | None = None,
                request: recording.RequestRecord | None = None, **kwargs: Any):
        """The decoder: transformers' own forward, or the decoder loop when a pipeline has visual tokens to act on."""
        if not needs_loop(pipeline):
            return super().forward(*args, **kwargs)
        refuse_outputs(pipeline, kwargs, self.config)
        cache = kwargs.get("past_key_values")
        check_cache(cache, pipeline.name)
        tokens = next(v for v in (kwargs.get("inputs_embeds"), *args[:1], kwargs.get("input_ids")) if v is not None)
        if cached_length(cache):
            acts = request_state(cache) is not None or pipeline.acts_on_text
        else:
            acts = layout is not None and any(layout.spans)
            acts = acts or acts_on_text(pipeline, kwargs, tokens, kwargs.get("position_ids"))
        if not acts:  # text alone: packed prompts and masks of any kind are as right as without a method
            return super().forward(*args, **kwargs)
        inputs_embeds = kwargs.get("inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(tokens)
        given = {n: kwargs.get(n) for n in ("attention_mask", "position_ids", "past_key_values", "use_cache")}
        return run_decoder(self, pipeline, inputs_embeds=inputs_embeds, layout=layout, request=request, **given)


class LlavaMetaForCausalLM(MediaInputs, MultimodalGeneration):
    """Adds images and videos to a causal LM.

    Attributes:
        weight_names: pattern of names in checkpoints -> names here, where they differ.
        unread_weights: beginnings of names of what checkpoints hold and nothing reads.
    """

    weight_names: ClassVar[Mapping[str, str]] = {}
    unread_weights: ClassVar[tuple[str, ...]] = ()

    # -- building ----------------------------------------------------------------------------------------------------

    def build(self, config: Any, model_class: type) -> None:
        """Decoder with vision side, and the head; called by the constructor of each decoder's class."""
        config.model_type = self.config_class.model_type
        self.model = model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any):
        """As in transformers, for checkpoints in the official format.

        Weights that the checkpoint lacks are an error, save those whose names start with one of ``allow_missing``, and
        so are weights beyond those of the config: layers that it does not count, a projector of another kind. A tower
        that is not inside the checkpoint (LLaVA-1.5) is left unloaded; call ``get_vision_tower().load_model()``, as
        ``load_pretrained_model`` does.
        """
        check_files(pretrained_model_name_or_path)
        config = kwargs.pop("config", None)
        overrides = kwargs.pop("overwrite_config", None) or {}
        if config is None:
            config = load_config(cls.config_class, pretrained_model_name_or_path)
        for key, value in overrides.items():
            setattr(config, key, value)
        if getattr(config, "mm_vision_tower", None):
            config.delay_load = not has_tower_weights(pretrained_model_name_or_path, kwargs)
        want_info = kwargs.pop("output_loading_info", False)
        allow_missing = kwargs.pop("allow_missing", ())
        kwargs["key_mapping"] = {**KEY_MAPPING, **cls.weight_names, **kwargs.get("key_mapping", {})}
        with reading(pretrained_model_name_or_path):
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *args,
                **{**kwargs, "config": config, "output_loading_info": True, "ignore_mismatched_sizes": True},
            )
        extra = (TOWER_PREFIX, *cls.unread_weights)  # a tower runs up to the selected layer, and its files have all
        check_loaded(info, pretrained_model_name_or_path, allow_missing, allow_extra=extra)
        return (model, info) if want_info else model

    def get_model(self) -> LlavaMetaModel:
        return self.model

    def own_facts(self, facts: ModelFacts) -> ModelFacts:
        """What methods can rely on, where an architecture differs from ``facts``, those of its tower and config."""
        return facts

    def get_vision_tower(self):
        return self.get_model().get_vision_tower()

    def initialize_vision_tokenizer(self, model_args: Any, tokenizer: Any) -> None:
        """Add the image tokens that the config asks for and fit the embedding matrix."""
        if model_args.mm_use_im_patch_token:
            tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
        if model_args.mm_use_im_start_end:
            tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
        self.resize_token_embeddings(len(tokenizer))

    # -- encode ------------------------------------------------------------------------------------------------------

    def encode(
        self,
        images: Any,
        modalities: list[str],
        image_sizes: Any = None,
        request: recording.RequestRecord | None = None,
    ) -> list[VisualItem]:
        """Features of every image and video, in the layout of the uncompressed sequence.

        Args:
            images: [N, 3, S, S] (N plain images), or a list / 5-D tensor of items, each [3, S, S] or [V, 3, S, S].
            modalities: "image" or "video" per item; image_sizes: (width, height) per item.

        The signals that an attached method asks for are filled in. Items that it compresses before the projector have
        ``views``, and only the form of their layout.
        """
        tower, acceleration = self.get_vision_tower(), self.acceleration
        tower.check_loaded()
        if getattr(self.config, "add_faster_video", False):
            raise ValueError("config.add_faster_video (slow/fast video tokens) is not supported; set it to False.")
        pixels, visuals = gather_visuals(images, modalities, image_sizes, tower.device)
        apart = acceleration is not None and acceleration.pipeline.encode is not None  # frames may keep fewer tokens
        items: list[VisualItem | None] = [None] * len(visuals)
        for numbers in by_kind(visuals) if apart else [range(len(visuals))]:
            own, views = subset(pixels, visuals, numbers)
            for number, item in zip(numbers, self._encode_together(own, views, request), strict=True):
                items[number] = item
        return items

    def encode_for(self, prompts: Prompts, *visuals: Any) -> list[VisualItem]:
        """:meth:`encode` for architectures that look at the text already there: an item for every placeholder."""
        return self.encode(*visuals)

    def _encode_together(
        self, pixels: Tensor, visuals: Sequence[VisualInput], request: recording.RequestRecord | None
    ) -> list[VisualItem]:
        """The items of one run of the tower; ``pixels`` [V, 3, S, S] on its device."""
        tower, acceleration = self.get_vision_tower(), self.acceleration
        device, full_side = tower.device, pixels.shape[-1]
        early = [acceleration is not None and acceleration.acts_on_views(visual.kind) for visual in visuals]
        with recording.stage(request, "vision", device):
            if acceleration is not None:
                pixels = acceleration.resize(pixels)
            method = None if acceleration is None else acceleration.encode_method(visuals[0].kind)
            dense = None if method is None else self._dense_tokens(visuals[0].kind, full_side)
            videos = [v.num_views for v in visuals] if visuals[0].kind == "video" else None
            keep = () if acceleration is None else acceleration.encoder_layers
            encoded = tower.look(pixels, keep, method, dense, videos)
            if acceleration is None or not acceleration.encoder_signals:
                encoded.before = None  # frees its memory
            features = tower.select(encoded).to(pixels.dtype)
            projected = features[..., :1] if all(early) else self.project(features)
        items = []
        for visual, on_views in zip(visuals, early, strict=True):
            # a method that acts on views needs the form of the layout only: one channel is enough
            rows = encoded.rows_of(visual.views)
            tokens = features[rows, :, :1] if on_views else projected[rows]
            full, fewer = None, encoded.shortened or encoded.frames is not None
            if pixels.shape[-1] != full_side or fewer:  # only the shape of what the dense model has
                dense_tokens = meta_tokens(visual.num_views, tokens.shape[2], tower, full_side)
                full = self.lay_out(dense_tokens, visual.kind, visual.size)
            if encoded.shortened:
                newline = None if full.newlines is None else self._newline(tokens)
                item = shortened_item(tokens, "video" if visual.kind == "video" else "image", newline)
                item.patches = PatchMap.of(encoded.merged[visual.views].tokens, patch_grid(tower, pixels.shape[-1]))
            else:
                item = self.lay_out(tokens, visual.kind, visual.size)
            if encoded.frames is not None:
                item.tell_frames(encoded.merged[visual.views].frames[0])
            if full is not None:
                item.full_tokens, item.full_length = full.num_tokens, full.length
            if acceleration is not None:  # what signals cost is the method's cost
                with recording.stage(request, "compress", device):
                    if on_views:
                        item.views = acceleration.views(self, visual, encoded[visual.views], features[rows])
                    else:
                        item.signals = acceleration.signals(item, encoded[visual.views])
            items.append(item)
        return items

    def _dense_tokens(self, kind: str, side: int) -> int:
        """Tokens that the language model gets of a frame, or of a view of an image, without a method."""
        rows, columns = patch_grid(self.get_vision_tower(), side)
        if kind != "video":
            return rows * columns
        return self.get_2dPool(torch.empty(1, rows * columns, 1, device="meta")).shape[1]

    def encode_images(self, images: Tensor) -> Tensor:
        """[V, 3, S, S] -> [V, P, D] projected patch features."""
        return self.project(self.get_vision_tower()(images))

    def project(self, features: Tensor) -> Tensor:
        """Projector in its own dtype, whatever the images came in. All of the visual side is on the tower's device."""
        projector = self.get_model().mm_projector
        parameter = next(projector.parameters(), None)
        return moved(projector(features if parameter is None else features.to(parameter.dtype)), features.device)

    def get_2dPool(self, image_feature: Tensor, stride: int = 2) -> Tensor:
        """[T, P, D] frames -> [T, q, D] by ``config.mm_spatial_pool_mode``."""
        return pool_2d(image_feature, getattr(self.config, "mm_spatial_pool_mode", "average"), stride)

    def lay_out(self, tokens: Tensor, kind: str, size: tuple[int, int] | None) -> VisualItem:
        """[V, P, D] projected patches of one item -> its tokens in reading order, with newlines.

        Args:
            kind: "plain", "image" or "video"; size: (width, height), as in :class:`llava.model.vision.VisualInput`.
        """
        if kind == "plain":
            return flat_item(tokens, tokens.shape[1])
        if kind == "video":
            return video_item(
                self.get_2dPool(tokens),
                self._newline(tokens),
                getattr(self.config, "mm_newline_position", "one_token"),
                getattr(self.config, "mm_patch_merge_type", "flat"),
            )
        return image_item(tokens, self._newline(tokens), size, self.get_vision_tower().image_size, self.config)

    def _newline(self, like: Tensor) -> Tensor | None:
        decoder = self.get_model()
        if getattr(decoder, "image_newline", None) is None:
            return None
        with own_weights(decoder):
            return decoder.image_newline.to(like)

    # -- compress ----------------------------------------------------------------------------------------------------

    def compress(self, items: Sequence[VisualItem], prompts: Prompts) -> list[VisualSequence]:
        """What goes to the language model of every item: all of it, or what the attached method leaves.

        ``prompts`` are for architectures that look at the text; methods are given their signals by :meth:`encode`.
        """
        method = self.acceleration.pipeline.compress if self.acceleration is not None else None
        return [compressed_sequence(item, method, self.project) for item in items]

    @property
    def padding_side(self) -> str:
        """Where ``forward`` pads a batch of prompts with images."""
        return getattr(self.config, "tokenizer_padding_side", "right")

    # -- embed -------------------------------------------------------------------------------------------------------

    def embed(self, prompts: Prompts, sequences: Sequence[VisualSequence]) -> Spliced:
        """Text embeddings with the sequences in the place of their placeholders, padded to one length."""
        return splice_prompts(
            prompts,
            [beside_text(sequence, prompts.input_ids.device) for sequence in sequences],
            self.get_model().embed_tokens,
            original_positions=self._gapped(),
            padding_side=prompts.padding_side or self.padding_side,
            max_length=getattr(self.config, "tokenizer_model_max_length", None),
        )

    # -- all three ---------------------------------------------------------------------------------------------------

    def prepare_multimodal(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        images: Any,
        modalities: str | list[str] = ("image",),
        image_sizes: Any = None,
        request: recording.RequestRecord | None = None,
        **how: Any,
    ) -> Spliced:
        """Encode, compress and embed: everything between raw inputs and the decoder.

        ``how``: ``padding_side``, ``dummies`` and ``questions`` of :class:`.splice.Prompts`, and ``visual_arguments``.
        """
        modalities = [modalities] * len(images) if isinstance(modalities, str) else list(modalities)
        own = {name: how.pop(name) for name in self.visual_arguments if name in how}
        prompts = Prompts(input_ids, attention_mask, labels, **how, own=own)
        prompts = moved(prompts, computes_on(self.get_model().embed_tokens))
        prompts.on_host  # noqa: B018 (read before there is anything to wait for)
        texts = None if self.acceleration is None else self.acceleration.texts(self, prompts)
        items = self.encode_for(prompts, images, modalities, image_sizes, request)
        if texts is not None:
            for item, number in zip(items, samples_of_items(prompts, len(items)), strict=True):
                texts[number].tell(item)
        with recording.stage(request, "compress", self.get_vision_tower().device):
            sequences = self.compress(items, prompts)
        spliced = self.embed(prompts, sequences)
        fits = self.told_fits(spliced, prompts, items)
        if request is not None:
            describe(request, items, sequences, spliced, fits)
        return spliced

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Any,
        labels: Tensor | None,
        images: Any,
        modalities: str | list[str] = ("image",),
        image_sizes: Any = None,
    ):
        """Official interface: (None, position_ids, attention_mask, past_key_values, inputs_embeds, labels).

        The outputs whose inputs were None are None. Differs from the official code in one thing: a batch is never cut
        to the number of ``modalities``.
        """
        decoding = past_key_values is not None and past_key_values.get_seq_length() > 0
        if self.get_vision_tower() is None or not has_images(images) or (decoding and input_ids.shape[1] == 1):
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        training = self.training or labels is not None
        spliced = self.prepare_multimodal(
            input_ids, attention_mask, labels, images, modalities, image_sizes, dummies=training
        )
        return (
            None,
            None if position_ids is None else spliced.position_ids,
            None if attention_mask is None else spliced.mask.to(attention_mask.dtype),
            past_key_values,
            spliced.inputs_embeds,
            None if labels is None else spliced.labels,
        )


register_host(LlavaHost(LlavaMetaForCausalLM))
