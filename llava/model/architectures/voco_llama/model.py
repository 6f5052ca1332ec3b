"""The model class of VoCo-LLaMA: prompts, and what is kept of images."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from accelerate_methods.engine import recording
from accelerate_methods.engine.cached_keys import cached_length
from accelerate_methods.engine.devices import computes_on, moved
from accelerate_methods.engine.flops import pieces_macs
from accelerate_methods.engine.prompt import PromptLayout
from accelerate_methods.engine.sequences import VisualSequence
from accelerate_methods.registry.architectures import architecture
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.prefill import VisualSpan
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.model.architectures.voco_llama.cache import CompressedImages, DividedLayout, Kept, VocoCache
from llava.model.architectures.voco_llama.decoder import VocoConfig, VocoModel
from llava.model.architectures.voco_llama.division import Division, PromptRows, divide, text_alone
from llava.model.architectures.voco_llama.tokens import VOCO, voco_id
from llava.model.checkpoint import CheckpointError, load_config
from llava.model.generation import describe
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.splice import Prompts, Spliced, beside_text, splice_prompts

#: ``<voco>`` tokens of a prompt where nobody says otherwise: those of the released training code
COUNT = 2
#: where the ``<voco>`` tokens of a video's frames stand: one frame behind the other, or all at the place of the first
FRAME_POSITIONS = ("consecutive", "shared")


@dataclasses.dataclass(repr=False)
class DividedPrompts(Spliced):
    """Prompts with their images, and where they divide (None: no ``<voco>`` tokens); given: what is kept already."""

    division: Division | None = None
    given: Kept | None = None

    @property
    def layout(self) -> PromptLayout:
        plain = super().layout
        if self.division is None:
            return plain
        return DividedLayout(**vars(plain), division=self.division, positions=self.position_ids, given=self.given)


class VocoLlamaForCausalLM(LlavaLlamaForCausalLM):
    """LLaVA-1.5 whose text sees images through the ``<voco>`` tokens behind them only.

    ``images`` of ``forward`` and ``generate`` may also be what :meth:`compress_images` gave, one for each prompt. Such
    prompts are whole as they were, or only what stands behind the last ``<voco>``.
    """

    config_class = VocoConfig
    about = architecture("voco_llama")
    decoder_reads_layout = True

    def __init__(self, config: VocoConfig):
        super(LlamaForCausalLM, self).__init__(config)
        self.build(config, VocoModel)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any):
        """As in the tree; the id of ``<voco>`` is read from the checkpoint's tokenizer where the config has none.

        Raises:
            CheckpointError: its tokenizer has no such token.
        """
        if config is None:
            config = load_config(cls.config_class, pretrained_model_name_or_path)
        if getattr(config, "voco_token_id", None) is None:
            config.voco_token_id = voco_id(pretrained_model_name_or_path)
            if config.voco_token_id is None:
                raise CheckpointError(f"the tokenizer of {str(pretrained_model_name_or_path)!r} has no {VOCO} token.")
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    # -- images and prompts ------------------------------------------------------------------------------------------

    def get_2dPool(self, image_feature: Tensor, stride: int = 2) -> Tensor:
        """Frames are read one by one, each as an image: nothing is pooled."""
        return image_feature

    def prepare_multimodal(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        images: Any,
        *args: Any,
        request: recording.RequestRecord | None = None,
        **how: Any,
    ) -> Spliced:
        kept = [isinstance(image, CompressedImages) for image in images]
        if not any(kept):
            spliced = super().prepare_multimodal(
                input_ids, attention_mask, labels, images, *args, request=request, **how
            )
            self._tell_work(spliced, request)
            return spliced
        if not all(kept) or len(images) != len(input_ids):
            raise MethodError(
                f"compressed images are given one for each prompt ({len(input_ids)}) and not mixed with others, "
                f"got {len(images)}, {sum(kept)} of them compressed."
            )
        if labels is not None:
            raise MethodError("labels: nothing can be learnt from images that were compressed earlier.")
        return self._behind(Prompts(input_ids, attention_mask, padding_side=how.get("padding_side")), images, request)

    def embed(self, prompts: Prompts, sequences: Sequence[VisualSequence]) -> DividedPrompts:
        videos = any(sequence.modality == "video" for sequence in sequences)
        side = prompts.padding_side or self.padding_side
        spliced = splice_prompts(
            prompts,
            [beside_text(sequence, prompts.input_ids.device) for sequence in sequences],
            self.get_model().embed_tokens,
            original_positions=self._gapped(),
            padding_side=side,
            # frames of a video are never in the context together
            max_length=None if videos else getattr(self.config, "tokenizer_model_max_length", None),
        )
        return self._divided(spliced, prompts, [len(sequence.tokens) for sequence in sequences], side)

    def _divided(self, spliced: Spliced, prompts: Prompts, rows: Sequence[int], side: str) -> DividedPrompts:
        """Where the prompts divide; ``rows`` of each image or video, before any prompt was cut."""
        shared = getattr(self.config, "voco_frame_positions", FRAME_POSITIONS[0])
        if shared not in FRAME_POSITIONS:
            raise MethodError(f"voco_frame_positions must be {' or '.join(FRAME_POSITIONS)}, got {shared!r}.")
        width = spliced.mask.shape[1]
        ids, keep = prompts.ids_on_host
        holes, _ = prompts.on_host
        of_prompts = []
        for number, length in enumerate(spliced.lengths):
            own, hole = ids[number][keep[number]], holes[number][keep[number]]
            sizes = torch.ones_like(own)
            sizes[hole] = torch.tensor([rows[item] for item in spliced.items[number]], dtype=sizes.dtype)
            at = (sizes.cumsum(0) - sizes)[own == self.config.voco_token_id].tolist()
            offset = width - length if side == "left" else 0
            spans = spliced.spans[number]
            frames = [_frames(spliced, number, span) for span in spans if span.modality == "video"]
            of_prompts.append(PromptRows(length, offset, [row for row in at if row < length], spans, frames))
        division = divide(of_prompts, width, shared == "shared")
        positions = spliced.position_ids
        if division is not None and division.positions:
            positions = positions.clone()
            for number, (columns, own) in division.positions.items():
                positions[number, moved(columns, positions.device)] = moved(own, positions.device)
        return DividedPrompts(**{**vars(spliced), "position_ids": positions}, division=division)

    def _text_only(self, inputs: Tensor, mask: Tensor | None, request: recording.RequestRecord | None) -> Spliced:
        self._refuse_voco(inputs, mask)
        return super()._text_only(inputs, mask, request)

    def _refuse_voco(self, ids: Tensor, mask: Tensor | None) -> None:
        found = ids == self.config.voco_token_id
        if mask is not None and mask.shape == ids.shape:
            found = found & mask.bool().to(found.device)
        if bool(found.any()):
            raise MethodError(f"the prompts hold {VOCO} tokens, which stand for images, and no images were given.")

    def begin(self, spliced: Spliced, request: recording.RequestRecord | None) -> dict[str, Any]:
        given = super().begin(spliced, request)
        layout = spliced.layout
        if isinstance(layout, DividedLayout):
            given["past_key_values"] = VocoCache.of(layout)
        return given

    def generate(self, *args: Any, **kwargs: Any):
        """As in the tree.

        Raises:
            MethodError: a cache of the caller's.
        """
        if kwargs.get("past_key_values") is not None:
            raise MethodError(f"{self.about.name} makes the cache of a prompt itself; leave past_key_values out.")
        return super().generate(*args, **kwargs)

    @functools.wraps(LlavaLlamaForCausalLM.forward)  # transformers reads which arguments there are from the signature
    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any):
        begins = input_ids is not None and input_ids.shape[1] > 1 and not cached_length(kwargs.get("past_key_values"))
        if begins and kwargs.get("images") is None:
            self._refuse_voco(input_ids, attention_mask)
        return super().forward(input_ids, attention_mask, *args, **kwargs)

    def _get_candidate_generator(self, **kwargs: Any) -> Any:
        raise NotImplementedError("assisted decoding is not possible: the cache is shorter than the prompt in it.")

    # -- images that are kept ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def compress_images(
        self,
        input_ids: Tensor,
        images: Any,
        modalities: str | list[str] = ("image",),
        attention_mask: Tensor | None = None,
    ) -> list[CompressedImages]:
        """What text sees of the images of each prompt, to be asked about again and again without them.

        Args:
            input_ids: [B, n] prompts with placeholders and ``<voco>`` tokens; what stands behind these is not read.

        Raises:
            MethodError: a prompt has no ``<voco>`` tokens.
        """
        if any(isinstance(image, CompressedImages) for image in images):
            raise MethodError("these images are compressed already.")
        spliced = self.prepare_multimodal(input_ids, attention_mask, None, images, modalities)
        division = spliced.division
        if division is None or len(set(division.looks.sample.tolist())) < len(input_ids):
            raise MethodError(f"every prompt needs {VOCO} tokens behind its images (num_voco of the prompt's steps).")
        embeds, decoder = spliced.inputs_embeds, self.get_model()
        kept, _ = decoder.look(division, embeds, spliced.position_ids, torch.zeros_like(embeds))
        positions = spliced.position_ids.gather(1, moved(division.border, embeds.device)[:, None]) + 1
        ids, real = Prompts(input_ids, attention_mask).ids_on_host
        out = []
        for number, position in enumerate(positions.flatten().tolist()):
            own, count = ids[number][real[number]], int(kept.real[number].sum())
            last = int((own == self.config.voco_token_id).nonzero()[-1])
            keys, values = (
                [layer[number, :, -count:].clone() for layer in layers] for layers in (kept.keys, kept.values)
            )
            out.append(CompressedImages(keys, values, position, tuple(own[: last + 1].tolist())))
        return out

    def _behind(
        self, prompts: Prompts, images: Sequence[CompressedImages], request: recording.RequestRecord | None
    ) -> DividedPrompts:
        """Prompts of text behind compressed images."""
        ids, keep = prompts.ids_on_host
        text = keep.clone()
        for number, image in enumerate(images):
            own = ids[number][keep[number]]
            voco = (own == self.config.voco_token_id).nonzero().flatten()
            before = int(voco[-1]) + 1 if len(voco) else 0
            if before and tuple(own[:before].tolist()) != image.prefix:
                raise MethodError(
                    f"prompt {number} begins otherwise than the one whose images were compressed: what stands in front "
                    f"of the last {VOCO} is in what was kept. Compress them again, or give only the text behind it."
                )
            text[number, keep[number].nonzero().flatten()[:before]] = False
        if not text.any(1).all():
            raise MethodError(f"every prompt needs text behind its {VOCO} tokens.")
        device = computes_on(self.get_model().embed_tokens)
        only = Prompts(moved(prompts.input_ids, device), moved(text, device))
        side = prompts.padding_side or self.padding_side
        spliced = splice_prompts(only, [], self.get_model().embed_tokens, original_positions=False, padding_side=side)
        width = spliced.mask.shape[1]
        rows = [PromptRows(n, width - n if side == "left" else 0, [], [], []) for n in spliced.lengths]
        division = text_alone(rows)
        start = torch.tensor([image.position for image in images])[:, None]
        positions = spliced.position_ids + moved(start, device)
        fits = self.told_fits(spliced, only, [])
        if request is not None:
            describe(request, [], [], spliced, fits)
        divided = DividedPrompts(
            **{**vars(spliced), "position_ids": positions}, division=division, given=Kept.of(images)
        )
        self._tell_work(divided, request)
        return divided

    def _tell_work(self, spliced: DividedPrompts, request: recording.RequestRecord | None) -> None:
        """For the record: the work of the two calls, which is less than that of one prompt, and what of the images and
        videos stays in the cache (``voco_entries``, of all of a prompt together)."""
        if request is None or spliced.division is None:
            return
        for number, sample in enumerate(request.samples):
            entries = None if spliced.given is None else int(spliced.given.real[number].sum())
            pieces = spliced.division.pieces(number, entries)
            sample.prefill_macs = pieces_macs(pieces, self.config)
            for item in sample.items:
                item.info = {**item.info, "voco_entries": pieces[-1][1]}

    # -- prompts -----------------------------------------------------------------------------------------------------

    def made_up_ids(self, ids: Tensor) -> Tensor:
        """With ``<voco>`` tokens behind the placeholder."""
        ids = ids.clone()
        ids[ids == self.config.voco_token_id] = self.config.voco_token_id - 1
        at = int((ids == IMAGE_TOKEN_INDEX).nonzero()[-1]) + 1
        return torch.cat([ids[:at], ids.new_full((COUNT,), self.config.voco_token_id), ids[at:]])

    def whole_prompt(self, prompt: str, **arguments: Any) -> str:
        return voco_prompt(prompt, arguments.get("num_voco") or COUNT)


def voco_prompt(prompt: str, count: int) -> str:
    """A finished prompt with its images in front, ``count`` ``<voco>`` tokens behind them, and no line break in the
    text: so prompts are made in `llava/eval/model_vqa_loader.py` of Yxxxb/VoCo-LLaMA@3b6e14d9."""
    images = prompt.count(DEFAULT_IMAGE_TOKEN)
    if not images:
        return prompt
    text = prompt.replace(DEFAULT_IMAGE_TOKEN, "").replace("\n", "")
    return f"{DEFAULT_IMAGE_TOKEN}\n" * images + VOCO * count + "\n" + text


def _frames(spliced: Spliced, number: int, span: VisualSpan) -> Tensor:
    """[n] the frame of each row of a video. Reads the device where a method left some of its tokens only."""
    rows = span.frame_rows or span.length
    if span.length == span.frames * rows:
        return torch.arange(span.length) // rows
    return spliced.stands[number, span.start : span.end].cpu() // rows


AutoConfig.register("voco_llama", VocoConfig, exist_ok=True)
AutoModelForCausalLM.register(VocoConfig, VocoLlamaForCausalLM, exist_ok=True)
