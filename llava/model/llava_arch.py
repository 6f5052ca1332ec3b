"""The multimodal part of every LLaVA model: towers, projector, splicing visual tokens into the prompt, generation.

The two mixins go in front of a transformers decoder (``LlavaMetaModel``) and its causal LM (``LlavaMetaForCausalLM``).
A compression pipeline attached to a model object (``accelerate_methods.accelerate``) is read here, at the stages of
``shared/design.md``; without one the model computes exactly what the official code does (specs/base.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from accelerate_methods.engine import recording
from accelerate_methods.engine.devices import computes_on, moved, own_weights
from accelerate_methods.engine.loop import DecoderOutput, needs_loop, run_decoder
from accelerate_methods.engine.prompt import PromptLayout
from accelerate_methods.engine.sequences import VisualSequence, compressed_sequence
from accelerate_methods.hosts import register_host
from accelerate_methods.hosts.layouts import flat_item, image_item, pool_2d, tile_grid, video_item
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.stages.compress import VisualItem
from accelerate_methods.stages.views import Views
from llava.model.acceleration import LlavaHost
from llava.model.checkpoint import KEY_MAPPING, check_loaded, has_tower_weights, load_config
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.tower import Encoded
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.splice import Spliced, splice


class LlavaMetaModel:
    """Adds tower, projector and newline embedding to a decoder."""

    def __init__(self, config: Any):
        super().__init__(config)
        if getattr(config, "mm_vision_tower", None):
            self.vision_tower = build_vision_tower(
                config,
                delay_load=getattr(config, "delay_load", False),
                checkpoint=getattr(config, "tower_checkpoint", None) or config.name_or_path or None,
            )
            # the tower stays in one piece when the model is spread over devices
            self._no_split_modules = {*(self._no_split_modules or ()), type(self.vision_tower).__name__}
            self.mm_projector = build_vision_projector(config)
            if "unpad" in getattr(config, "mm_patch_merge_type", "flat"):
                self.image_newline = nn.Parameter(torch.randn(config.hidden_size) * config.hidden_size**-0.5)

    def get_vision_tower(self):
        return getattr(self, "vision_tower", None)

    def forward(self, *args: Any, pipeline: Pipeline | None = None, layout: PromptLayout | None = None,
                request: Any = None, **kwargs: Any):
        """The decoder: transformers' own forward, or the decoder loop when a pipeline needs it."""
        if not needs_loop(pipeline):
            return super().forward(*args, **kwargs)
        inputs_embeds = kwargs.get("inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(args[0] if args else kwargs["input_ids"])
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.get(name):
                raise ValueError(f"{name} is not available while {pipeline.name} is attached; detach it first.")
        return run_decoder(
            self,
            pipeline,
            inputs_embeds=inputs_embeds,
            attention_mask=kwargs.get("attention_mask"),
            position_ids=kwargs.get("position_ids"),
            past_key_values=kwargs.get("past_key_values"),
            use_cache=kwargs.get("use_cache"),
            layout=layout,
            request=request,
        )


class LlavaMetaForCausalLM:
    """Adds images to ``forward`` and ``generate`` of a causal LM."""

    #: pipeline attached to this object; an instance attribute, set and removed by the host
    acceleration: Any = None

    def build(self, config: Any, model_class: type) -> None:
        """Decoder with vision side, and the head; called by the constructor of each family's class."""
        config.model_type = self.config_class.model_type
        self.model = model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_model(self) -> LlavaMetaModel:
        return self.model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any):
        """As in transformers, for checkpoints in the official format.

        Weights that the checkpoint lacks are an error, save those whose names start with one of ``allow_missing``. A
        tower that is not inside the checkpoint (LLaVA-1.5) is left unloaded; call ``get_vision_tower().load_model()``,
        as ``load_pretrained_model`` does.
        """
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
        model, info = super().from_pretrained(
            pretrained_model_name_or_path,
            *args,
            config=config,
            key_mapping={**KEY_MAPPING, **kwargs.pop("key_mapping", {})},
            output_loading_info=True,
            **kwargs,
        )
        check_loaded(info, pretrained_model_name_or_path, allow_missing)
        return (model, info) if want_info else model

    def get_vision_tower(self):
        return self.get_model().get_vision_tower()

    # -- visual side -------------------------------------------------------------------------------------------------

    def encode_images(self, images: Tensor) -> Tensor:
        """[V, 3, S, S] -> [V, P, D] projected patch features."""
        return self.project(self.get_vision_tower()(images))

    def project(self, features: Tensor) -> Tensor:
        """Projector in its own dtype, whatever the images came in. All of the visual side is on the tower's device."""
        projector = self.get_model().mm_projector
        parameter = next(projector.parameters(), None)
        return moved(projector(features if parameter is None else features.to(parameter.dtype)), features.device)

    def get_2dPool(self, image_feature: Tensor, stride: int = 2) -> Tensor:
        return pool_2d(image_feature, getattr(self.config, "mm_spatial_pool_mode", "average"), stride)

    def visual_items(
        self,
        images: Any,
        modalities: list[str],
        image_sizes: Any = None,
        request: recording.RequestRecord | None = None,
    ) -> list[VisualItem]:
        """Encode every image and video and give its tokens in the layout of the uncompressed sequence.

        ``images``: [N, 3, S, S] (N plain images), or a list / 5-D tensor of items, each [3, S, S] or [V, 3, S, S].
        Signals that the attached pipeline asks for are filled in. Sections 7.1 and 7.2 of specs/base.md.
        """
        tower = self.get_vision_tower()
        if not tower.is_loaded:
            raise RuntimeError("the vision tower is not loaded; call model.get_vision_tower().load_model() first.")
        device = self._visual_device()
        plain = isinstance(images, Tensor) and images.ndim == 4
        views = [images] if plain else [v[None] if v.ndim == 3 else v for v in images]
        pixels = torch.cat([v.to(device) for v in views])
        self._check_modalities(modalities)
        acceleration = self.acceleration
        side = pixels.shape[-1]
        with recording.stage(request, "vision", device):
            if acceleration is not None:
                pixels = acceleration.resize(pixels)
            encoded = tower.look(pixels)
            if acceleration is None or not acceleration.encoder_signals:
                encoded.before = None  # frees its memory
            features = tower.select(encoded).to(pixels.dtype)
        # plain integers: the grid arithmetic is that of python floats
        sizes = [] if image_sizes is None else [tuple(int(edge) for edge in size) for size in image_sizes]
        if getattr(self.config, "add_faster_video", False):
            raise ValueError("config.add_faster_video (slow/fast video tokens) is not supported; set it to False.")
        counts = [1] * len(pixels) if plain else [len(v) for v in views]
        kinds = ["plain" if plain else modalities[i] if i < len(modalities) else "image" for i in range(len(counts))]
        by_view = [acceleration is not None and acceleration.acts_on_views(kind) for kind in kinds]
        with recording.stage(request, "vision", device):
            projected = features[..., :1] if all(by_view) else self.project(features)
        items = []
        ends = list(itertools.accumulate(counts))
        for index, (count, end, kind) in enumerate(zip(counts, ends, kinds, strict=True)):
            here = slice(end - count, end)
            size = sizes[index] if index < len(sizes) else None
            # a method that acts on views needs the form of the layout only: one channel is enough
            tokens = features[here, :, :1] if by_view[index] else projected[here]
            item = self._lay_out(tokens, kind, size)
            if pixels.shape[-1] != side:  # only the shape of what the full-size input would have given
                full = self._lay_out(self._full_size(tokens, pixels.shape[-1], side), kind, size)
                item.full_tokens, item.full_length = full.num_tokens, full.length
            if acceleration is not None:  # what signals cost is the method's cost
                with recording.stage(request, "compress", device):
                    if by_view[index]:
                        item.views = self._views(encoded[here], features[here], kind, size)
                    else:
                        item.signals = acceleration.signals(item, encoded[here])
            items.append(item)
        return items

    def _views(self, encoded: Encoded, features: Tensor, kind: str, size: tuple[int, int] | None) -> Views:
        """One image before the projector, for a method that acts there."""
        tower = self.get_vision_tower()
        rows = math.isqrt(encoded.patches.shape[1])
        special = encoded.special
        return Views(
            features=encoded.patches.to(features.dtype),
            special=None if special is None else special.to(features.dtype),
            grid=(rows, rows),
            tiles=None if kind == "plain" else tile_grid(len(features), size, tower.image_size, self.config),
            signals=self.acceleration.view_signals(encoded),
            uncompressed=lambda: self._lay_out(self.project(features), kind, size),
        )

    def _lay_out(self, tokens: Tensor, modality: str, size: tuple[int, int] | None) -> VisualItem:
        """[V, P, D] projected patches of one item -> its layout."""
        if modality == "plain":
            return flat_item(tokens, tokens.shape[1])
        if modality == "video":
            return video_item(
                self.get_2dPool(tokens),
                self._newline(tokens),
                getattr(self.config, "mm_newline_position", "one_token"),
                getattr(self.config, "mm_patch_merge_type", "flat"),
            )
        return image_item(tokens, self._newline(tokens), size, self.get_vision_tower().image_size, self.config)

    def _full_size(self, tokens: Tensor, side: int, full_side: int) -> Tensor:
        """A meta tensor shaped as the tokens would be at ``full_side`` instead of ``side`` pixels."""
        patch = self.get_vision_tower().hub_config.patch_size
        special = tokens.shape[1] - (side // patch) ** 2
        return torch.empty(tokens.shape[0], (full_side // patch) ** 2 + special, tokens.shape[2], device="meta")

    def _visual_device(self) -> torch.device:
        return self.get_vision_tower().device

    def _newline(self, like: Tensor) -> Tensor | None:
        decoder = self.get_model()
        if getattr(decoder, "image_newline", None) is None:
            return None
        with own_weights(decoder):
            return decoder.image_newline.to(like)

    @staticmethod
    def _check_modalities(modalities: list[str]) -> None:
        for value in modalities:
            if value not in ("image", "video", "text"):
                raise ValueError(f"modality {value!r} is not known; allowed: image, video, text.")

    def prepare_multimodal(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        images: Any,
        modalities: str | list[str] = ("image",),
        image_sizes: Any = None,
        padding_side: str | None = None,
        request: recording.RequestRecord | None = None,
    ) -> Spliced:
        """Encode, compress and splice: everything between raw inputs and the decoder."""
        modalities = [modalities] * len(images) if isinstance(modalities, str) else list(modalities)
        device = computes_on(self.get_model().embed_tokens)
        items = self.visual_items(images, modalities, image_sizes, request)
        with recording.stage(request, "compress", self._visual_device()):
            method = self.acceleration.pipeline.compress if self.acceleration is not None else None
            sequences = [compressed_sequence(item, method, self.project) for item in items]
        spliced = splice(
            input_ids.to(device),
            None if attention_mask is None else attention_mask.to(device),
            None if labels is None else labels.to(device),
            [_beside_text(s, device) for s in sequences],
            self.get_model().embed_tokens,
            original_positions=self.acceleration is not None and self.acceleration.pipeline.positions == "original",
            padding_side=padding_side or getattr(self.config, "tokenizer_padding_side", "right"),
            max_length=getattr(self.config, "tokenizer_model_max_length", None),
        )
        if request is not None:
            _describe(request, items, sequences, spliced)
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
        if self.get_vision_tower() is None or not _any(images) or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        spliced = self.prepare_multimodal(input_ids, attention_mask, labels, images, modalities, image_sizes)
        return (
            None,
            None if position_ids is None else spliced.position_ids,
            None if attention_mask is None else spliced.mask.to(attention_mask.dtype),
            past_key_values,
            spliced.inputs_embeds,
            None if labels is None else spliced.labels,
        )

    # -- forward and generate ----------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images: Any = None,
        image_sizes: Any = None,
        return_dict: bool | None = None,
        modalities: str | list[str] = ("image",),
        dpo_forward: bool = False,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        layout: PromptLayout | None = None,
        request: recording.RequestRecord | None = None,
        **kwargs: Any,
    ):
        """Causal LM over the expanded sequence; ``images`` are spliced in when ``input_ids`` hold placeholders.

        ``layout`` and ``request`` travel from :meth:`generate` to the decoder loop and the recorder.
        """
        if inputs_embeds is None and _any(images) and input_ids.shape[1] > 1:
            request = request or recording.new_request()
            spliced = self.prepare_multimodal(
                input_ids,
                attention_mask,
                labels,
                images,
                modalities,
                image_sizes,
                padding_side="left" if self._cuts_inside() else None,
                request=request,
            )
            inputs_embeds, input_ids = spliced.inputs_embeds, None
            labels = None if labels is None else spliced.labels
            attention_mask = spliced.mask.long() if len(set(spliced.lengths)) > 1 else None
            position_ids = spliced.position_ids if self._gapped() or attention_mask is not None else None
            layout = spliced.layout
        passed = dict(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        if self.acceleration is not None:
            passed.update(pipeline=self.acceleration.pipeline, layout=layout, request=request)
        if output_attentions is not None:
            passed["output_attentions"] = output_attentions
        if output_hidden_states is not None:
            passed["output_hidden_states"] = output_hidden_states
        tokens = inputs_embeds if inputs_embeds is not None else input_ids
        decoding = past_key_values is not None and past_key_values.get_seq_length() > 0
        if request is not None and not decoding:
            request.started(self.config.num_hidden_layers)
        with _llm_stage(request, tokens, decoding):
            outputs = self.model(input_ids=input_ids, inputs_embeds=inputs_embeds, **passed)
            hidden = outputs.last_hidden_state
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            # back to the first device, also so that the time of this stage covers the work on all of them
            logits = moved(self.lm_head(hidden[:, kept]), tokens.device)
        if request is not None and not decoding and not request.layer_tokens:  # the model's own forward: no layer cuts
            request.layer_tokens = [[sample.length for sample in request.samples]] * self.config.num_hidden_layers
        if labels is not None and isinstance(outputs, DecoderOutput):
            labels = outputs.labels(labels)
        if dpo_forward:
            return logits, labels
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=getattr(outputs, "hidden_states", None),
            attentions=getattr(outputs, "attentions", None),
        )
        return result if return_dict is None or return_dict else result.to_tuple()

    def _gapped(self) -> bool:
        return self.acceleration is not None and self.acceleration.pipeline.positions == "original"

    def _cuts_inside(self) -> bool:
        """Whether the sequence gets shorter between decoder layers."""
        return self.acceleration is not None and self.acceleration.pipeline.prefill is not None

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Any = None,
        image_sizes: Any = None,
        modalities: str | list[str] = ("image",),
        **kwargs: Any,
    ):
        """transformers' ``generate``; returns new tokens only, also for text-only prompts.

        ``inputs`` (or ``input_ids``) [B, n] may be padded on either side if ``attention_mask`` says so; samples of
        different length are re-padded on the left, so that a batch gives the answers of its samples one by one.
        """
        if kwargs.get("inputs_embeds") is not None:
            raise NotImplementedError("`inputs_embeds` is not supported; pass input ids and images.")
        kwargs.pop("inputs_embeds", None)
        kwargs.pop("position_ids", None)
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        if inputs is None:
            raise ValueError("generate needs input ids: pass them first, as inputs= or as input_ids=.")
        if kwargs.get("use_cache") is False:
            # transformers would feed only the newest token to the second step: the prompt exists as embeddings alone
            raise ValueError("generate needs the KV cache (use_cache=False is not possible with images as embeddings).")
        attention_mask = kwargs.pop("attention_mask", None)
        request = recording.new_request()
        has_images = _any(images)
        spliced = (
            self.prepare_multimodal(
                inputs, attention_mask, None, images, modalities, image_sizes, padding_side="left", request=request
            )
            if has_images
            else self._text_only(inputs, attention_mask, request)
        )
        if has_images and self.acceleration is not None:
            kwargs["layout"] = spliced.layout
        if request is not None:
            kwargs["request"] = request
        return super().generate(
            inputs_embeds=spliced.inputs_embeds,
            attention_mask=spliced.mask.long(),
            position_ids=spliced.position_ids,
            **kwargs,
        )

    def _text_only(self, inputs: Tensor, mask: Tensor | None, request: recording.RequestRecord | None) -> Spliced:
        embed = self.get_model().embed_tokens
        device = computes_on(embed)
        mask = None if mask is None else mask.to(device)
        spliced = splice(inputs.to(device), mask, None, [], embed, original_positions=False, padding_side="left")
        if request is not None:
            _describe(request, [], [], spliced)
        return spliced

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ):
        # transformers looks for ``inputs_embeds`` in this signature before it accepts embeddings in generate
        images, sizes = kwargs.pop("images", None), kwargs.pop("image_sizes", None)
        prepared = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        if images is not None:
            prepared["images"] = images
        if sizes is not None:
            prepared["image_sizes"] = sizes
        return prepared

    def initialize_vision_tokenizer(self, model_args: Any, tokenizer: Any) -> None:
        """Add the image tokens that the config asks for and fit the embedding matrix."""
        from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN

        if model_args.mm_use_im_patch_token:
            tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
        if model_args.mm_use_im_start_end:
            tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
        self.resize_token_embeddings(len(tokenizer))


def _any(images: Any) -> bool:
    return images is not None and len(images) > 0


@contextlib.contextmanager
def _llm_stage(request: recording.RequestRecord | None, tokens: Tensor, decoding: bool) -> Iterator[None]:
    if request is None:
        yield
        return
    request.decode_steps += decoding
    with request.span("decode" if decoding else "prefill", tokens.device):
        yield


def _beside_text(sequence: VisualSequence, device: torch.device) -> VisualSequence:
    """The sequence on the device of the text's embeddings (under a device map not always the tower's)."""
    parts = ("tokens", "positions", "is_content")
    return dataclasses.replace(sequence, **{name: moved(getattr(sequence, name), device) for name in parts})


def _describe(
    request: recording.RequestRecord, items: list[VisualItem], sequences: list[VisualSequence], spliced: Spliced
) -> None:
    """Fill the record of a request from what was spliced."""
    for numbers, spans, length, dense in zip(
        spliced.items, spliced.spans, spliced.lengths, spliced.dense_lengths, strict=True
    ):
        shrunk = sum((items[n].full_length or items[n].length) - items[n].length for n in numbers)
        sample = recording.SampleRecord(dense_length=dense + shrunk, length=length)
        for n, span in zip(numbers, spans, strict=False):  # a truncated prompt may have lost items
            sample.items.append(
                recording.ItemRecord(
                    modality=items[n].modality,
                    tokens_before=items[n].full_tokens or items[n].num_tokens,
                    tokens_after=span.num_content,
                    start=span.start,
                    grid=items[n].grid if items[n].views is None else items[n].views.grid,
                    owner=sequences[n].owner,
                    positions=sequences[n].positions,
                    kept=sequences[n].stands,
                    info=sequences[n].info,
                )
            )
        request.samples.append(sample)


register_host(LlavaHost(LlavaMetaForCausalLM))
