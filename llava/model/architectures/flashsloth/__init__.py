"""FlashSloth: 81 visual tokens out of 729, and nine queries that read question and image inside the language model.

SigLIP, pooling by attention in 3 x 3 regions, Phi-2 (CVPR 2025, arXiv 2412.04317). Nine query rows stand behind every
question; in front of decoder layer 7 they are refreshed once from the question and from all patches, those that pooling
left out among them. Follows `codefanw/FlashSloth@881445a`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PhiConfig, PhiForCausalLM, PhiModel

from accelerate_methods.engine import recording
from accelerate_methods.engine.cache import check_cache
from accelerate_methods.engine.cached_keys import cached_length
from accelerate_methods.engine.devices import moved
from accelerate_methods.engine.loop import needs_loop, run_decoder
from accelerate_methods.engine.prompt import PromptLayout
from accelerate_methods.engine.recording import SampleRecord
from accelerate_methods.engine.sequences import VisualSequence
from accelerate_methods.ops.select import on_device
from accelerate_methods.registry.architectures import architecture
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.stages.compress import VisualItem
from accelerate_methods.stages.errors import MethodError
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import conv_templates
from llava.mm_utils import KeywordsStoppingCriteria, divide_to_patches, expand2square
from llava.model.architectures.flashsloth.modules import REGION, EmbeddedQuery, LearnableTokens, RegionPooling
from llava.model.architectures.flashsloth.queries import query_groups, update_of, with_query_ids
from llava.model.checkpoint import CheckpointError
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel
from llava.model.multimodal_encoder.tower import SigLipVisionTower
from llava.model.splice import Prompts, Spliced, samples_of_items
from llava.model.vision import gather_visuals

#: queries of a turn, and the decoder layer in front of which they are refreshed
QUERIES, LAYER = 9, 7
#: id that stands for the queries in a prompt, and how it is written
LEARNABLE, LEARNABLE_TEXT = 50295, "<learnable>"
#: id whose embedding is added to every query (" ." of Phi-2's vocabulary)
BASE_WORD = 764
#: tiles along an edge of a picture in high resolution
TILES = 2


def recognises(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of a FlashSloth checkpoint."""
    return config.get("model_type") == "flashsloth" or "FlashSlothForCausalLM" in (config.get("architectures") or ())


class FlashSlothConfig(PhiConfig):
    model_type = "flashsloth"


class FlashSlothTower(SigLipVisionTower):
    """SigLIP without its last layer; checkpoints have no norm behind it, and nobody reads it."""

    def build(self) -> None:
        super().build()
        self.vision_tower.post_layernorm = nn.Identity()


class FlashSlothModel(LlavaMetaModel, PhiModel):
    """Phi with tower, pooling, projector and queries, under their official names."""

    config_class = FlashSlothConfig

    def __init__(self, config: FlashSlothConfig):
        super().__init__(config)
        width, hidden = config.mm_hidden_size, config.hidden_size
        self.learnable_tokens = LearnableTokens(QUERIES, hidden)
        self.pooling = RegionPooling(width)
        self.lqformer = EmbeddedQuery(hidden, width, config.num_attention_heads)

    @staticmethod
    def build_tower(config: Any, **how: Any) -> nn.Module:
        return FlashSlothTower(config.mm_vision_tower, args=config, **how)

    def forward(
        self, *args: Any, pipeline: Pipeline | None = None, layout: PromptLayout | None = None, request: Any = None,
        **kwargs: Any,
    ):  # fmt: skip
        """A prompt with queries runs in the decoder loop, with a method or without; everything else as it would."""
        begins = layout is not None and layout.update is not None and not cached_length(kwargs.get("past_key_values"))
        if needs_loop(pipeline) or not begins:
            return super().forward(*args, pipeline=pipeline, layout=layout, request=request, **kwargs)
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.get(name, getattr(self.config, name, False)):
                raise MethodError(f"{name} is not available for prompts with images: queries change between layers.")
        check_cache(kwargs.get("past_key_values"), "FlashSloth")
        passed = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache")
        given = {name: kwargs.get(name) for name in passed}
        return run_decoder(self, pipeline or Pipeline(), layout=layout, request=request, **given)


class FlashSlothForCausalLM(LlavaMetaForCausalLM, PhiForCausalLM):
    """``images``: pictures [N, 3, S, S], or views [N, 5, 3, S, S] of high resolution (:meth:`image_inputs` makes them).

    The id of "<learnable>" in a prompt with an image stands for nine query rows.

    Raises:
        CheckpointError: a decoder without the layer in front of which the queries are refreshed.
    """

    config_class = FlashSlothConfig
    about = architecture("flashsloth")
    decoder_reads_layout: ClassVar[bool] = True
    spare_vocabulary: ClassVar[bool] = True  # Phi-2 has more rows than tokens
    unquantised: ClassVar[tuple[str, ...]] = ("pooling", "lqformer")

    def __init__(self, config: FlashSlothConfig):
        super(PhiForCausalLM, self).__init__(config)
        if config.num_hidden_layers <= LAYER:
            raise CheckpointError(f"FlashSloth needs more than {LAYER} decoder layers, got {config.num_hidden_layers}.")
        self.build(config, FlashSlothModel)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)  # Phi's has a bias

    @property
    def learnable_id(self) -> int:
        return getattr(self.config, "learnable_token_index", LEARNABLE)

    # -- prompts and media -------------------------------------------------------------------------------------------

    def image_inputs(self, images: Sequence[Image.Image], image_processor: Any, **arguments: Any) -> Tensor:
        """Pictures padded to squares [N, 3, S, S]; with ``image_hd`` in the config [N, 5, 3, S, S]: the picture
        squeezed to a square, then the quarters of it padded to a square, row by row."""
        if not getattr(self.config, "image_hd", False):
            return super().image_inputs(images, image_processor, **arguments)
        height, width = image_processor.size
        background = tuple(int(mean * 255) for mean in image_processor.image_mean)
        views = []
        for image in (picture.convert("RGB") for picture in images):
            square = expand2square(image, background).resize((TILES * width, TILES * height))
            views += [image.resize((width, height)), *divide_to_patches(square, width)]
        pixels = image_processor.preprocess(views, return_tensors="pt")["pixel_values"]
        return pixels.unflatten(0, (len(images), -1))

    def question_text(self, question: str, kind: str, count: int, **arguments: Any) -> str:
        """The question with its placeholders in front and its queries behind."""
        text = super().question_text(question, kind, count, **arguments)
        return text if LEARNABLE_TEXT in text else text + LEARNABLE_TEXT

    def whole_prompt(self, prompt: str, **arguments: Any) -> str:
        """With queries behind the question of every turn, where there is an image."""
        user, answerer = conv_templates[self.about.template].roles
        start, *turns = prompt.split(f"{user}: ")
        if DEFAULT_IMAGE_TOKEN not in prompt or not turns:
            return prompt
        parts = [turn.partition(f" {answerer}:") for turn in turns]
        asked = [text if LEARNABLE_TEXT in text else text + LEARNABLE_TEXT for text, *_ in parts]
        turns = [text + mark + answer for text, (_, mark, answer) in zip(asked, parts, strict=True)]
        return f"{user}: ".join([start, *turns])

    def prompt_ids(self, prompt: str, tokenizer: Any, **arguments: Any) -> Tensor:
        """Ids of a prompt; "<learnable>" has its own, whether the tokenizer knows it or not."""
        pieces = [super(FlashSlothForCausalLM, self).prompt_ids(p, tokenizer) for p in prompt.split(LEARNABLE_TEXT)]
        ids = [part for piece in pieces for part in (piece.new_tensor([self.learnable_id]), piece)][1:]
        return torch.cat(ids)

    def made_up_ids(self, ids: Tensor) -> Tensor:
        """With queries in front of the last words."""
        return torch.cat([ids[:-3], ids.new_tensor([self.learnable_id]), ids[-3:]])

    def own_macs(self, sample: SampleRecord, **call: Any) -> int:
        """Of pooling, projector and, once, the refreshed queries; their question counts as long as all the text."""
        tower, decoder, hidden = self.get_vision_tower(), self.get_model(), self.config.hidden_size
        width, patches = self.config.mm_hidden_size, tower.num_patches
        tokens = math.ceil(tower.num_patches_per_side / REGION) ** 2
        views = sum(item.tokens_before for item in sample.items) // tokens
        if not views:
            return 0
        text = sample.dense_length - views * tokens - QUERIES
        each = patches * width * (width + 1) + patches * width + tokens * hidden * (width + hidden)
        return views * each + decoder.lqformer.macs(QUERIES, text, views * patches)

    @functools.wraps(LlavaMetaForCausalLM.generate)
    def generate(self, inputs: Tensor | None = None, *visual: Any, **kwargs: Any):
        """As everywhere; answers also end at the template's "</s>", which is no end token of Phi-2's tokenizer."""
        if self.prompt_tokenizer is not None:
            ids = kwargs.get("input_ids") if inputs is None else inputs
            stop = KeywordsStoppingCriteria([conv_templates[self.about.template].sep2], self.prompt_tokenizer, ids)
            kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or ()), stop]
        return super().generate(inputs, *visual, **kwargs)

    # -- encode and embed --------------------------------------------------------------------------------------------

    def prepare_multimodal(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, images: Any, *more: Any,
        **how: Any,
    ) -> Spliced:  # fmt: skip
        asked = with_query_ids(input_ids, attention_mask, labels, self.learnable_id, QUERIES)
        how["notes"] = {"queries": asked.groups}
        return super().prepare_multimodal(asked.input_ids, asked.attention_mask, asked.labels, images, *more, **how)

    def encode_for(
        self, prompts: Prompts, images: Any, modalities: list[str], image_sizes: Any, request: Any
    ) -> list[VisualItem]:
        """Pooled and projected views; the features before pooling are left for the queries."""
        tower = self.get_vision_tower()
        tower.check_loaded()
        if "video" in modalities:
            raise ValueError(f"{self.about.name} reads images, not videos. {self.about.limits}".strip())
        pixels, visuals = gather_visuals(images, modalities, image_sizes, tower.device)
        with recording.stage(request, "vision", tower.device):
            features = tower(pixels)
            tokens = self.project(features)
        prompts.notes["features"] = [features[visual.views].flatten(0, 1) for visual in visuals]
        return [self.lay_out(tokens[visual.views], visual.kind, visual.size) for visual in visuals]

    def project(self, features: Tensor) -> Tensor:
        pooling = self.get_model().pooling
        weight = next(pooling.parameters())
        return super().project(moved(pooling(features.to(weight.dtype)), features.device))

    def lay_out(self, tokens: Tensor, kind: str, size: tuple[int, int] | None) -> VisualItem:
        """Tokens of regions; in place of them the coordinates of patches, for pictures, become those of regions."""
        if tokens.shape[1] == self.get_vision_tower().num_patches:
            tokens = self.get_model().pooling.middles(tokens)
        return super().lay_out(tokens, kind, size)

    def embed(self, prompts: Prompts, sequences: Sequence[VisualSequence]) -> Spliced:
        decoder, starts = self.get_model(), prompts.notes["queries"]
        if starts:
            prompts.embeds = self._embedded(prompts, starts)
        spliced = super().embed(prompts, sequences)
        groups = query_groups(spliced, prompts, starts, QUERIES)
        owners = samples_of_items(prompts, len(sequences))
        how = {"module": decoder.lqformer, "layer": LAYER, "count": QUERIES}
        return dataclasses.replace(spliced, update=update_of(spliced, groups, prompts.notes["features"], owners, **how))

    def _embedded(self, prompts: Prompts, starts: Sequence[Sequence[int]]) -> Tensor:
        """[B, m, H] of the ids; a query is its learnt row and the embedding of one word."""
        ids, decoder = prompts.input_ids, self.get_model()
        number = torch.zeros(ids.shape, dtype=torch.long)
        for sample, start in starts:
            number[sample, start : start + QUERIES] = torch.arange(1, QUERIES + 1)
        number = on_device(number, ids.device)
        base = getattr(self.config, "query_base_token_id", BASE_WORD)
        embeds = decoder.embed_tokens(ids.clamp(min=0).masked_fill(number > 0, base))
        learnt = moved(decoder.learnable_tokens(), embeds.device).to(embeds.dtype)
        return embeds + nn.functional.pad(learnt, (0, 0, 1, 0))[number]


MODEL = FlashSlothForCausalLM
AutoConfig.register("flashsloth", FlashSlothConfig, exist_ok=True)
AutoModelForCausalLM.register(FlashSlothConfig, FlashSlothForCausalLM, exist_ok=True)
