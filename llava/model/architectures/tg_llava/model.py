"""The model classes of TG-LLaVA: what happens between pixels and embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, Qwen2ForCausalLM

from accelerate_methods.engine import recording
from accelerate_methods.engine.devices import computes_on, moved
from accelerate_methods.engine.flops import MacCounter, projector_macs
from accelerate_methods.engine.recording import SampleRecord
from accelerate_methods.hosts.checkpoint_files import weight_names
from accelerate_methods.hosts.layouts import flat_item
from accelerate_methods.hosts.questions import without_placeholders
from accelerate_methods.ops.select import on_device
from accelerate_methods.registry.architectures import architecture
from accelerate_methods.stages.compress import VisualItem
from accelerate_methods.stages.errors import MethodError
from llava.model.architectures.asked import Place, places_of
from llava.model.architectures.text_towers import text_macs
from llava.model.architectures.tg_llava.details import LATENTS, PatchEncoder, quadrants
from llava.model.architectures.tg_llava.guide import TextGuide
from llava.model.architectures.tg_llava.text import TextTower, given_ids
from llava.model.checkpoint import CheckpointError, load_config
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM, LlavaLlamaModel
from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM, LlavaQwenModel
from llava.model.splice import Prompts
from llava.model.vision import gather_visuals

_ABOUT = architecture("tg_llava")
_TEXT_TOWER, _QFORMER = "model.text_tower.", "model.mm_cross_attn.Qformer."


class _Decoder:
    """In front of a decoder: text tower, guidance and patch encoder, with their official names."""

    def __init__(self, config: Any):
        super().__init__(config)
        absent = [key for key in ("mm_vision_tower", "mm_text_hidden_size") if not getattr(config, key, None)]
        if absent:
            raise CheckpointError(f"{_ABOUT.name}: its config.json has no {absent[0]}.")
        if getattr(config, "mm_patch_merge_type", "flat") != "flat":
            raise CheckpointError(
                f"{_ABOUT.name}'s latents have no grid; mm_patch_merge_type {config.mm_patch_merge_type!r} is not "
                "'flat'."
            )
        checkpoint = getattr(config, "tower_checkpoint", None) or config.name_or_path or None
        self.text_tower = TextTower(config, getattr(config, "delay_text", False), checkpoint, _ABOUT.name)
        self.mm_cross_attn, self.mm_patch_encoder = self.build_guides(config, self.vision_tower.num_patches)
        parts = (TextTower, TextGuide, PatchEncoder)
        self._no_split_modules = {*(self._no_split_modules or ()), *(part.__name__ for part in parts)}

    @staticmethod
    def build_guides(config: Any, patches: int) -> tuple[TextGuide, PatchEncoder]:
        """For a tower of so many patches."""
        own = getattr(config, "tiny_overrides", None) or {}
        width, text = config.mm_hidden_size, config.mm_text_hidden_size
        guide = TextGuide(width, text, patches, own.get("qformer"))
        return guide, PatchEncoder(width, text, config.hidden_size, 4 * patches, own.get("perceiver"))

    def guidance(self, pooled: Tensor) -> Tensor:
        """[B, T] -> [B, P, C] what the question adds to the features of the patches."""
        return self.mm_cross_attn(pooled.to(self.mm_cross_attn.zero_layer.weight.dtype))

    def details(self, patches: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        """[B, 4, P, C] quadrants and [B, L, T] rows of the question -> [B, 64, D]."""
        dtype = self.mm_patch_encoder.resize_linear.weight.dtype
        return self.mm_patch_encoder(patches.to(dtype), text.to(dtype), mask)


class TextGuidedVision:
    """In front of a causal LM. ``questions``: what the user says, read out of each prompt where nobody says.

    The official arguments are understood, too: ``text_guide_ids``, CLIP's ids [L] or [B, L] of the question (all of
    them are read, padding too, save the id 0), and ``image_patches``, the four quadrants [4, 3, S, S] of each image.
    """

    about = _ABOUT
    visual_arguments = ("text_guide_ids", "image_patches")
    tokens_have_places: ClassVar[bool] = False
    weight_names: ClassVar[dict[str, str]] = {
        r"^model\.text_tower\.text_tower\.text_model\.": "model.text_tower.text_tower."
    }
    adapter_parts = ("mm_projector", "mm_cross_attn", "mm_patch_encoder")
    unquantised = ("text_tower", "mm_cross_attn", "mm_patch_encoder")
    #: stored with the Q-Former and read by nothing: its words, its head, and the feed-forward of its text
    unread_weights = (
        f"{_QFORMER}cls.",
        f"{_QFORMER}bert.embeddings.word_embeddings.",
        f"{_QFORMER}bert.embeddings.position_embeddings.",
        *(f"{_QFORMER}bert.encoder.layer.{n}.{part}." for n in range(2) for part in ("intermediate", "output")),
    )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any):
        """As for every model of the tree; a text tower that is not inside the checkpoint comes from its own files."""
        path, config, state = pretrained_model_name_or_path, kwargs.get("config"), kwargs.get("state_dict")
        config = load_config(cls.config_class, path) if config is None else config
        names = weight_names(path) if state is None else state
        config.delay_text = not any(name.startswith(_TEXT_TOWER) for name in names)
        loaded = super().from_pretrained(path, *args, **{**kwargs, "config": config})
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        del model.config.delay_text
        tower = model.get_text_tower()
        if not tower.is_loaded:
            tower.load_model()
            tower.to(device=computes_on(model.get_model().mm_projector), dtype=model.dtype)
        return loaded

    def get_text_tower(self) -> TextTower:
        return self.get_model().text_tower

    def made_up(self) -> None:
        self.get_text_tower().tokens.make_up()

    def asked_text(self, question: Any) -> str:
        """As it is written, instructions to answer briefly included: so the guidance was trained."""
        return without_placeholders(question) if isinstance(question, str) else super().asked_text(question)

    def own_macs(self, sample: SampleRecord, **call: Any) -> int:
        """Of text model, guidance, patch encoder and projector, and the tower's four passes over the quadrants.

        The question counts as many rows as the prompt has of text (and no more than CLIP reads): a record does not say
        how many it had.
        """
        decoder, tower, text = self.get_model(), self.get_vision_tower(), self.get_text_tower()
        patches, width = tower.num_patches, self.config.mm_hidden_size
        views = sample.visual_tokens_before // (patches + LATENTS)
        rows = min(text.tokens.limit, sample.dense_length - sample.visual_tokens_before)
        if not views or rows < 1:
            return 0
        if rows not in self._work:
            counter = MacCounter()
            with torch.device("meta"):
                parts = decoder.build_guides(self.config, patches)
                guide, encoder = (part.requires_grad_(False) for part in parts)
                quarters = torch.empty(1, 4, patches, width)
                question = torch.empty(1, rows, self.config.mm_text_hidden_size)
            with torch.no_grad(), counter.counting():
                guide(question[:, 0])
                encoder(quarters, question)
            self._work[rows] = counter.macs + text_macs(text.text_tower.config, rows)
        return views * (self._work[rows] + projector_macs(patches, decoder.mm_projector) + tower.macs(4))

    def encode_for(
        self, prompts: Prompts, images: Any, modalities: list[str], image_sizes: Any,
        request: recording.RequestRecord | None = None,
    ) -> list[VisualItem]:  # fmt: skip
        """Of every view the guided patches and the detail latents, with the question at each of its placeholders."""
        tower, decoder = self.get_vision_tower(), self.get_model()
        tower.check_loaded()
        pixels, visuals = gather_visuals(images, modalities, image_sizes, tower.device)
        if tuple(pixels.shape[-2:]) != (tower.image_size,) * 2:
            raise ValueError(
                f"{_ABOUT.name} has a query for each patch of {tower.image_size} pixels, got {pixels.shape}."
            )
        with recording.stage(request, "vision", tower.device):
            places, (ids, mask), order = self._asked(prompts, len(visuals))
            pooled, rows = self.get_text_tower()(ids)
            guidance, rows, mask = moved((decoder.guidance(pooled), rows, mask), tower.device)
            patches = self._patches(prompts.own.get("image_patches"), pixels)
            seen = tower(torch.cat([pixels[:, None], patches], dim=1).flatten(0, 1)).to(guidance.dtype)
            counts = [visuals[place.item].num_views for place in places]
            views = [view for place in places for view in range(len(pixels))[visuals[place.item].views]]
            asked = [number for number, count in zip(order, counts, strict=True) for _ in range(count)]
            seen = _rows(seen.unflatten(0, (len(pixels), -1)), views)
            features, details = seen[:, 0], seen[:, 1:]
            tokens = self.project(features + _rows(guidance, asked))
            latents = decoder.details(details, _rows(rows, asked), None if mask is None else _rows(mask, asked))
            parts = torch.cat([tokens, moved(latents, tokens.device)], dim=1)
        return [flat_item(part.flatten(0, 1)[None], None) for part in parts.split(counts)]

    def _asked(self, prompts: Prompts, count: int) -> tuple[list[Place], tuple[Tensor, Tensor | None], list[int]]:
        """What is shown at each placeholder; ids [U, L] of questions and their padding; which is asked there."""
        tower, given = self.get_text_tower(), prompts.own.get("text_guide_ids")
        if given is None:
            tokenizer = self.prompt_tokenizer or getattr(self.acceleration, "tokenizer", None)
            places = places_of(prompts, count, tokenizer, self.about.name)
            texts = list(dict.fromkeys(place.question for place in places))
            return places, tower.ids_of(texts), [texts.index(place.question) for place in places]
        places = places_of(prompts, count, None, self.about.name, asked=False)
        ids, samples = given_ids(given, tower.tokens.limit), [place.sample for place in places]
        orders = {1: [0] * len(places), len(prompts.input_ids): samples, len(places): list(range(len(places)))}
        if len(ids) not in orders:
            raise MethodError(
                f"text_guide_ids: give one question, one for each prompt ({len(prompts.input_ids)}) or one for each "
                f"image ({len(places)}), got {len(ids)}."
            )
        return places, (ids, None), orders[len(ids)]

    def _patches(self, given: Any, pixels: Tensor) -> Tensor:
        """[V, 4, 3, S, S] the quadrants of every view.

        Raises:
            ValueError: those that were given are of another form.
        """
        if given is None:
            return quadrants(pixels)
        patches = torch.stack(list(given)) if isinstance(given, (list, tuple)) else given
        patches = patches[None] if patches.ndim == 4 else patches
        if patches.shape != (len(pixels), 4, *pixels.shape[1:]):
            raise ValueError(
                f"image_patches must be the four quadrants of each view, [{len(pixels)}, 4, 3, S, S] or a list of "
                f"[4, 3, S, S], got {list(patches.shape)}."
            )
        return patches.to(pixels)


def _rows(states: Tensor, numbers: Sequence[int]) -> Tensor:
    """``states`` at ``numbers``; the same, uncopied, where that is all of them in order."""
    if list(numbers) == list(range(len(states))):
        return states
    return states[on_device(list(numbers), states.device)]


class TgLlavaQwenConfig(LlavaQwenConfig):
    model_type = "llava_qwen_text_learnable_query"


class TgLlavaQwenModel(_Decoder, LlavaQwenModel):
    config_class = TgLlavaQwenConfig


class LlavaQwenTextLearnableQueryForCausalLM(TextGuidedVision, LlavaQwenForCausalLM):
    config_class = TgLlavaQwenConfig

    def __init__(self, config: TgLlavaQwenConfig):
        super(Qwen2ForCausalLM, self).__init__(config)
        self.build(config, TgLlavaQwenModel)
        self._work: dict[int, int] = {}


#: ids of Llama-3's vocabulary, which Vicuna's is far from
_LLAMA_3_WORDS = 128_000


class TgLlavaLlamaConfig(LlavaConfig):
    model_type = "llava_llama_text_learnable_query"


class TgLlavaLlamaModel(_Decoder, LlavaLlamaModel):
    config_class = TgLlavaLlamaConfig


class LlavaLlamaTextLearnableQueryForCausalLM(TextGuidedVision, LlavaLlamaForCausalLM):
    config_class = TgLlavaLlamaConfig

    def __init__(self, config: TgLlavaLlamaConfig):
        super(LlamaForCausalLM, self).__init__(config)
        self.build(config, TgLlavaLlamaModel)
        self._work: dict[int, int] = {}

    @property
    def prompt_template(self) -> str:
        """As the official script writes prompts for Llama-3, and for Vicuna."""
        return "llava_llama_3" if self.config.vocab_size >= _LLAMA_3_WORDS else "llava_v0"


for _config, _model in (
    (TgLlavaQwenConfig, LlavaQwenTextLearnableQueryForCausalLM),
    (TgLlavaLlamaConfig, LlavaLlamaTextLearnableQueryForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
