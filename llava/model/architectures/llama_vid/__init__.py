"""LLaMA-VID: of an image or frame one token for the question and few for its content (ECCV 2024, arXiv 2311.17043).

A Q-Former reads the question and the features of an EVA tower; what its queries look for becomes the context token, and
the pooled patches the content tokens: two tokens in all for a frame of the video models. Follows
`dvlab-research/LLaMA-VID@b3d3ae2b`. The frames of all images and videos of a call are encoded together, some at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from accelerate_methods.engine import recording
from accelerate_methods.engine.devices import moved, own_weights
from accelerate_methods.engine.recording import SampleRecord
from accelerate_methods.hosts.layouts import flat_item, shortened_item
from accelerate_methods.hosts.questions import without_placeholders
from accelerate_methods.ops.select import on_device
from accelerate_methods.registry.architectures import architecture
from accelerate_methods.stages.compress import VisualItem
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import conv_templates
from llava.frame_choice import sample_frames
from llava.model.architectures.asked import Place, places_of
from llava.model.architectures.llama_vid.eva import EvaVisionTower
from llava.model.architectures.llama_vid.long_video import (
    is_features,
    movie_prompt,
    run_lengths,
    spread,
    without_repeats,
)
from llava.model.architectures.llama_vid.tokens import (
    MORE_WORDS,
    MOST_IDS,
    QuestionTokenizer,
    TextGuide,
    bert_config,
    bert_folder,
    content_cells,
    context_token,
    made_up_words,
    patches_of,
    pooled,
)
from llava.model.architectures.qformer import QFormer
from llava.model.checkpoint import CheckpointError
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM, LlavaLlamaModel
from llava.model.splice import Prompts, Spliced

#: frames whose features are held at a time
CHUNK = 64
_Words = tuple[dict[str, int], Tensor, Tensor | None]


def recognises(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of a LLaMA-VID checkpoint."""
    return "LlavaLlamaAttForCausalLM" in (config.get("architectures") or ()) or "bert_type" in config


class LlamaVidConfig(LlavaConfig):
    model_type = "llama_vid"


class LlamaVidModel(LlavaLlamaModel):
    """The decoder, and the modules between tower and language model under their official names."""

    config_class = LlamaVidConfig

    def __init__(self, config: LlamaVidConfig):
        super().__init__(config)
        bert, width = bert_config(config), config.mm_hidden_size
        self.vlm_att_query = nn.Parameter(torch.zeros(1, getattr(config, "num_query", 32), bert.hidden_size))
        self.vlm_att_ln = nn.LayerNorm(width) if "pretrain" in config.bert_type else nn.Identity()
        self.vlm_att_encoder = TextGuide(QFormer(bert, width, bert.vocab_size + MORE_WORDS))
        self.vlm_att_projector = nn.Linear(bert.hidden_size, width)
        self.vlm_att_key_projector = nn.Linear(width, width)
        self.vlm_att_val_projector = nn.Linear(width, config.hidden_size)

    @staticmethod
    def build_tower(config: Any, **how: Any) -> nn.Module:
        return EvaVisionTower(config.mm_vision_tower, config, **how)

    def text_queries(self, features: Tensor, ids: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the Q-Former looks for in images.

        Args:
            features: [B, S, C] of the tower; ids: [B or 1, T] the question in BERT's words; real: [B or 1, T] False at
                its padding, or None.

        Returns:
            queries [B, Q, H], and the same in the width of the features, [B, Q, C].
        """
        with own_weights(self):
            queries = self.vlm_att_query[0]
        read = moved((queries, self.vlm_att_ln(features), ids, real), features.device)
        rows = self.vlm_att_encoder.bert(*read)
        return rows, self.vlm_att_projector(rows)

    def image_tokens(self, text_q: Tensor, patches: Tensor) -> Tensor:
        """[B, Q, C] queries and [B, N, C] patches -> [B, 1 + n, D]: the context token, then content tokens."""
        text_q, keys = moved((text_q, self.vlm_att_key_projector(patches)), patches.device)
        context = self.vlm_att_val_projector(context_token(text_q, keys, patches))
        content = self.mm_projector(pooled(patches, getattr(self.config, "compress_type", None)))
        return torch.cat(moved([context, content], patches.device), dim=1)

    def look_for(self, features: Tensor, rows: Sequence[int], ids: Tensor, real: Tensor | None) -> Tensor:
        """[B, S, C] features, each seen with the question ``rows`` [B] of ``ids`` [U, T] -> [B, 1 + n, D]."""
        if len(ids) > 1:
            index = on_device(list(rows), ids.device)
            ids, real = ids[index], None if real is None else real[index]
        _, text_q = self.text_queries(features, ids, real)
        return self.image_tokens(text_q, patches_of(features))


class LlamaVidForCausalLM(LlavaLlamaForCausalLM):
    """``images``: pictures and videos as everywhere, or features [F, N, C] of the tower without CLS (long videos).

    ``questions`` of ``forward`` and ``generate``: a text for each prompt, or a list of texts, one per placeholder; read
    out of the prompt where they are not given. A prompt with one image may have several placeholders: each shows it,
    seen with its own text. Features stand at one placeholder, or at one for each of their tokens, with text in between
    (subtitles).

    Raises:
        CheckpointError: a model without Q-Former, or an unknown way of pooling.
    """

    config_class = LlamaVidConfig
    about = architecture("llama_vid")
    tokens_have_places: ClassVar[bool] = False
    unquantised: ClassVar[tuple[str, ...]] = tuple(
        f"vlm_att_{part}" for part in ("encoder", "projector", "key_projector", "val_projector")
    )

    def __init__(self, config: LlamaVidConfig):
        super(LlamaForCausalLM, self).__init__(config)
        kind = getattr(config, "bert_type", None)
        if "qformer" not in str(kind):
            raise CheckpointError(
                f"bert_type {kind!r}: only LLaMA-VID models with a Q-Former are supported ('qformer_pretrain' and its "
                "variants); no weights of others were released."
            )
        feature = getattr(config, "mm_vision_select_feature", "patch")
        if feature != "patch":
            raise CheckpointError(
                f"mm_vision_select_feature {feature!r}: LLaMA-VID's tokens are those of patches alone."
            )
        self.build(config, LlamaVidModel)
        tower = self.get_vision_tower()
        if tower is not None:
            content_cells(getattr(config, "compress_type", None), tower.num_patches)
        self._question_tokenizer: Callable[[Sequence[str]], tuple[Tensor, Tensor]] | None = None

    @property
    def question_tokenizer(self) -> Callable[[Sequence[str]], tuple[Tensor, Tensor]]:
        """BERT's; its files are looked for when the first question is read."""
        if self._question_tokenizer is None:
            self._question_tokenizer = QuestionTokenizer(bert_folder(self.config))
        return self._question_tokenizer

    def made_up(self) -> None:
        self.get_vision_tower().build()
        self._question_tokenizer = made_up_words

    # -- media -------------------------------------------------------------------------------------------------------

    def frame_indices(self, total: int, rate: float, **arguments: Any) -> list[int]:
        """Every round(rate / fps)-th frame from the first on; of more than ``max_frames_num``, so many evenly."""
        limit = arguments.get("max_frames_num") or 0
        return sample_frames(total, rate, arguments.get("fps") or 1, frames_upbound=limit).indices

    def own_macs(self, sample: SampleRecord, **call: Any) -> int:
        """Of the Q-Former, the context token and the projectors.

        The question counts as many rows as the prompt has of text (and no more than the Q-Former reads): a record does
        not say how many it had.
        """
        decoder, patches = self.get_model(), self.get_vision_tower().num_patches
        content = content_cells(getattr(self.config, "compress_type", None), patches)
        views = sum(item.tokens_before for item in sample.items) // (1 + content)
        count, width = decoder.vlm_att_query.shape[1], self.config.mm_hidden_size
        text = min(MOST_IDS, sample.dense_length - views * (1 + content))
        bert, out = decoder.vlm_att_encoder.bert, self.config.hidden_size
        context = width * (count * decoder.vlm_att_projector.in_features + patches * (width + 2 * count) + out)
        return views * (bert.macs(count, text, patches + 1) + context + content * out * (width + out))

    def whole_prompt(self, prompt: str, **arguments: Any) -> str:
        """The images in the latest turn of a chat, whose question they are seen with, as in the official one."""
        before, turn, latest = prompt.rpartition(f"{conv_templates[self.about.template].roles[0]}: ")
        images = f"{DEFAULT_IMAGE_TOKEN}\n"
        if not turn or images not in before or DEFAULT_IMAGE_TOKEN in latest:
            return prompt
        return before.replace(images, "") + turn + images * before.count(images) + latest

    def asked_text(self, question: Any) -> str:
        """As it is written, instructions to answer briefly included: the Q-Former was trained so."""
        return without_placeholders(question) if isinstance(question, str) else super().asked_text(question)

    movie_prompt = staticmethod(movie_prompt)

    @torch.no_grad()
    def video_features(self, pixels: Tensor) -> Tensor:
        """[F, 3, S, S] frames -> [F, N, C] features as long videos are given, on the tower's device."""
        return torch.cat([self._features(chunk)[:, 1:] for chunk in pixels.split(CHUNK)])

    def _features(self, views: Tensor) -> Tensor:
        """[V, S, C] of views [V, 3, S, S], or of features."""
        tower = self.get_vision_tower()
        if views.ndim == 3:
            return views.to(tower.device, tower.dtype)
        return tower.look(views).hidden

    def _is_features(self, visual: Tensor) -> bool:
        return is_features(visual, self.config.mm_hidden_size)

    # -- encode ------------------------------------------------------------------------------------------------------

    def prepare_multimodal(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, images: Any, *more: Any,
        **how: Any,
    ) -> Spliced:  # fmt: skip
        given = [self._is_features(visual) for visual in images]
        if any(given):
            if len(given) != input_ids.shape[0]:
                raise ValueError(
                    f"features of long videos: one video for each of {input_ids.shape[0]} prompts, got {len(given)}."
                )
            attention_mask = without_repeats(input_ids, attention_mask, given)
        return super().prepare_multimodal(input_ids, attention_mask, labels, images, *more, **how)

    def encode_for(
        self, prompts: Prompts, images: Any, modalities: list[str], image_sizes: Any, request: Any
    ) -> list[VisualItem]:
        """The tokens of every image and video at each of its placeholders, seen with the question there."""
        tower = self.get_vision_tower()
        tower.check_loaded()
        views = [visual[None] if visual.ndim == 3 and not self._is_features(visual) else visual for visual in images]
        tokenizer = self.prompt_tokenizer or getattr(self.acceleration, "tokenizer", None)
        places = places_of(prompts, len(views), tokenizer, self.about.name)
        with recording.stage(request, "vision", tower.device):
            seen = self._seen(views, places)
        parts = [seen[place.item, place.question] for place in places]
        if any(self._is_features(view) for view in views):
            parts = self._spread(parts, places, views, run_lengths(prompts))
        plain = isinstance(images, Tensor) and images.ndim == 4
        kinds = ["image"] * len(views) if plain else [*modalities, *["image"] * len(views)]
        return [
            # several frames are a video whatever they are called, as in the official code
            shortened_item(part, "video", None)
            if kinds[place.item] == "video" or len(views[place.item]) > 1
            else flat_item(part, None)
            for part, place in zip(parts, places, strict=True)
        ]

    def _spread(
        self, parts: Sequence[Tensor], places: Sequence[Place], views: Sequence[Tensor], runs: Sequence[int]
    ) -> list[Tensor]:
        """The tokens at each placeholder, where those of a long video stand at several."""
        out: list[Tensor] = []
        for item, view in enumerate(views):
            own = [number for number, place in enumerate(places) if place.item == item]
            long = self._is_features(view) and own
            out += spread(parts[own[0]], [runs[n] for n in own]) if long else [parts[n] for n in own]
        return out

    def _seen(self, views: Sequence[Tensor], places: Sequence[Place]) -> dict[tuple[int, str], Tensor]:
        """[F, 1 + n, D] tokens of every item with every question that it is shown with."""
        device = self.get_vision_tower().device
        questions: list[list[str]] = [[] for _ in views]
        for item, text in dict.fromkeys((place.item, place.question) for place in places):
            questions[item].append(text)
        texts = list(dict.fromkeys(text for own in questions for text in own))
        ids, real = self.question_tokenizer(texts)
        real = on_device(real.bool(), device) if not bool(real.all()) else None
        words = ({text: row for row, text in enumerate(texts)}, on_device(ids, device), real)
        pieces: dict[tuple[int, str], list[Tensor]] = {}
        for numbers in _alike(views):
            together = [views[number] if len(numbers) == 1 else views[number].to(device) for number in numbers]
            frames = together[0] if len(together) == 1 else torch.cat(together)
            owners = [number for number in numbers for _ in range(len(views[number]))]
            for start in range(0, len(frames), CHUNK):
                part = slice(start, start + CHUNK)
                for key, piece in self._asked(self._features(frames[part]), owners[part], questions, words):
                    pieces.setdefault(key, []).append(piece)
        return {key: own[0] if len(own) == 1 else torch.cat(own) for key, own in pieces.items()}

    def _asked(
        self, features: Tensor, owners: Sequence[int], questions: Sequence[Sequence[str]], words: _Words
    ) -> Iterator[tuple[tuple[int, str], Tensor]]:
        """Tokens of frames, in stretches of one item and question.

        Args:
            features: [B, S, C]; owners: [B] the item of each frame; questions: of each item.
            words: row of each question in ids [U, T], these, and what is real of them, or None.
        """
        row, ids, real = words
        for turn in range(max(len(questions[item]) for item in owners)):
            frames = [at for at, item in enumerate(owners) if turn < len(questions[item])]
            keys = [(owners[at], questions[owners[at]][turn]) for at in frames]
            part = features if len(frames) == len(owners) else features[on_device(frames, features.device)]
            seen = self.get_model().look_for(part, [row[text] for _, text in keys], ids, real)
            lengths = [(key, len(list(group))) for key, group in itertools.groupby(keys)]
            yield from zip([key for key, _ in lengths], seen.split([count for _, count in lengths]), strict=True)


def _alike(views: Sequence[Tensor]) -> list[list[int]]:
    """Numbers of the items whose frames can be encoded together."""
    kinds: dict[tuple[int, ...], list[int]] = {}
    for number, view in enumerate(views):
        kinds.setdefault(tuple(view.shape[1:]), []).append(number)
    return list(kinds.values())


MODEL = LlamaVidForCausalLM
AutoConfig.register("llama_vid", LlamaVidConfig, exist_ok=True)
AutoModelForCausalLM.register(LlamaVidConfig, LlamaVidForCausalLM, exist_ok=True)
