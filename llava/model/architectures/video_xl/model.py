"""Video-XL's causal LM: visual tokens without newlines, prompts read in pieces, answers over the shorter cache."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

from accelerate_methods.engine import recording
from accelerate_methods.engine.flops import pieces_macs
from accelerate_methods.engine.long_prompts import PromptFit, context_length, tell
from accelerate_methods.engine.output_rows import OutputRows, on_the_right, real_rows
from accelerate_methods.engine.prompt import PromptLayout
from accelerate_methods.engine.sequences import VisualSequence
from accelerate_methods.hosts.layouts import flat_item, pool_2d, video_item
from accelerate_methods.registry.architectures import architecture
from accelerate_methods.stages.compress import VisualItem
from accelerate_methods.stages.errors import MethodError
from llava.model.architectures.video_xl.decoder import (
    PiecedLayout,
    SummaryCache,
    VideoXLConfig,
    VideoXLModel,
    places_in,
)
from llava.model.architectures.video_xl.windows import (
    Piece,
    Settings,
    checked_ratios,
    entries_of,
    pieces_of,
    summaries_of,
)
from llava.model.checkpoint import CheckpointError
from llava.model.language_model.llava_qwen import LlavaQwenForCausalLM
from llava.model.splice import Prompts, Spliced, beside_text, splice_prompts
from llava.model.vision import has_images

_asked: ContextVar[tuple[int, ...] | None] = ContextVar("llava_video_xl_ratios", default=None)


@contextlib.contextmanager
def _using(ratios: Any) -> Iterator[None]:
    """These ratios within the block; None leaves what an outer call said."""
    if ratios is None:
        yield
        return
    token = _asked.set(checked_ratios(ratios))
    try:
        yield
    finally:
        _asked.reset(token)


def _with_ratio(function: Callable[..., Any]) -> Callable[..., Any]:
    """The method of a model with the argument ``beacon_ratio``."""

    @functools.wraps(function)  # transformers reads which arguments there are from the signature
    def with_ratio(self: Any, *args: Any, beacon_ratio: Any = None, **kwargs: Any) -> Any:
        with _using(beacon_ratio):
            return function(self, *args, **kwargs)

    return with_ratio


@dataclasses.dataclass(repr=False)
class PiecedPrompts(Spliced):
    """A batch that is read in ``pieces``, those of each sample."""

    pieces: list[list[Piece]] = dataclasses.field(default_factory=list)

    @property
    def layout(self) -> PromptLayout:
        return PiecedLayout(self.visual, self.lengths, self.spans, stands=self.stands, pieces=self.pieces)


class VideoXLForCausalLM(LlavaQwenForCausalLM):
    """``forward`` and ``generate`` take ``beacon_ratio``: visual tokens for each summary token, one number or several
    of which one is drawn for each window; those of the config if not given.

    ``forward`` returns the logits of the text rows of a prompt, and of the last row of each image or video.

    Raises:
        MethodError: none of several ratios divides a window.
        ValueError: a prompt that ends with an image or video, or a cache for such a prompt.
    """

    config_class = VideoXLConfig
    about = architecture("video_xl")
    decoder_reads_layout = True

    def __init__(self, config: VideoXLConfig):
        super(Qwen2ForCausalLM, self).__init__(config)
        Settings.of(config)  # refuses what is not supported
        if "sliding_attention" in config.layer_types:
            raise CheckpointError("config.use_sliding_window: summary tokens must stay in reach; it is not supported.")
        self.build(config, VideoXLModel)

    # -- visual tokens -----------------------------------------------------------------------------------------------

    def lay_out(self, tokens: Tensor, kind: str, size: tuple[int, int] | None) -> VisualItem:
        """Pooled frames, or pooled tiles without the overview, in reading order; a single view stays whole."""
        if getattr(self.config, "mm_patch_merge_type", "flat") != "unires":
            return super().lay_out(tokens, kind, size)
        if kind == "video":
            return video_item(self.get_2dPool(tokens), None, "no_token", "flat")
        if len(tokens) == 1:
            return flat_item(tokens, tokens.shape[1])
        return flat_item(self.get_2dPool(tokens[1:]).flatten(0, 1)[None], None)

    def get_2dPool(self, image_feature: Tensor, stride: int | None = None) -> Tensor:
        """[T, P, D] -> [T, q, D]; the stride of the config if none is given."""
        stride = stride or getattr(self.config, "mm_spatial_pool_stride", None) or 2
        return pool_2d(image_feature, getattr(self.config, "mm_spatial_pool_mode", "average"), stride)

    def encode(self, images: Any, modalities: list[str], *more: Any, **how: Any) -> list[VisualItem]:
        """As for every model of the tree.

        Raises:
            MethodError: a method that acts on the patches of an image, which are pooled here.
        """
        kinds = [*modalities, *["image"] * len(images)][: len(images)]
        acting = self.acceleration is not None and {kind for kind in kinds if self.acceleration.acts_on_views(kind)}
        if acting:
            raise MethodError(
                f"{self.acceleration.pipeline.compress.name} acts on the patches of an image before the projector; "
                "Video-XL pools them. Give videos, or detach it."
            )
        return super().encode(images, modalities, *more, **how)

    # -- prompts in pieces -------------------------------------------------------------------------------------------

    def embed(self, prompts: Prompts, sequences: Sequence[VisualSequence]) -> Spliced:
        """The whole prompts, never cut: what counts is what of them stays in the cache."""
        side = prompts.padding_side or self.padding_side
        spliced = splice_prompts(
            prompts,
            [beside_text(sequence, prompts.input_ids.device) for sequence in sequences],
            self.get_model().embed_tokens,
            original_positions=False,
            padding_side=side,
        )
        settings = Settings.of(self.config)
        settings = dataclasses.replace(settings, ratios=_asked.get() or settings.ratios)
        read, longest = [], spliced.mask.shape[1]
        for length, spans, items in zip(spliced.lengths, spliced.spans, spliced.items, strict=True):
            padding = longest - length if side == "left" else 0
            pieces = pieces_of(length, [(span.start - padding, span.length) for span in spans], settings)
            read.append(pieces)
            for number, count in zip(items, summaries_of(pieces), strict=True):
                sequences[number].info = {**sequences[number].info, "summary_tokens": count}
        return PiecedPrompts(**{f.name: getattr(spliced, f.name) for f in dataclasses.fields(spliced)}, pieces=read)

    def told_fits(self, spliced: Spliced, prompts: Prompts, items: Sequence[VisualItem]) -> list[PromptFit]:
        """By what is in the cache when the prompt has been read: the window that is being read is never far ahead."""
        if not isinstance(spliced, PiecedPrompts):
            return super().told_fits(spliced, prompts, items)
        limit, lengths = context_length(self.config), [entries_of(pieces) for pieces in spliced.pieces]
        fits = [
            PromptFit(tokens=length, limit=limit, untrained=0 if limit is None else max(length - limit, 0))
            for length in lengths
        ]
        tell(fits, self.config)
        return fits

    # -- forward and generate ----------------------------------------------------------------------------------------

    forward = _with_ratio(LlavaQwenForCausalLM.forward)

    def prepare_multimodal(
        self, *args: Any, beacon_ratio: Any = None, request: recording.RequestRecord | None = None, **kwargs: Any
    ) -> Spliced:
        with _using(beacon_ratio):
            spliced = super().prepare_multimodal(*args, request=request, **kwargs)
        for sample, pieces in zip([] if request is None else request.samples, spliced.pieces, strict=False):
            sample.prefill_macs = pieces_macs([(p.rows + p.summaries, p.cached) for p in pieces], self.config)
        return spliced

    def prepare_inputs_labels_for_multimodal(self, *args: Any, **kwargs: Any):
        """Not offered: embeddings do not say where a video stands, and would be read without windows."""
        raise NotImplementedError("Video-XL reads prompts in windows: give ids and images to forward or generate.")

    def generate(self, *args: Any, beacon_ratio: Any = None, **kwargs: Any):
        """As for every model of the tree; ``beacon_skip_first`` and ``beacon_skip_last`` of the official scripts say
        where the video stands, which is known here."""
        for name in ("beacon_skip_first", "beacon_skip_last"):
            kwargs.pop(name, None)
        if kwargs.get("past_key_values") is not None and has_images(kwargs.get("images")):
            raise ValueError("Video-XL makes the cache of a prompt with images or videos itself; leave it out.")
        with _using(beacon_ratio):
            return super().generate(*args, **kwargs)

    def begin(self, spliced: Spliced, request: recording.RequestRecord | None) -> dict[str, Any]:
        """The last row of each prompt, on top of the cache that the others have left.

        Raises:
            ValueError: a prompt ends with an image or video.
        """
        if not isinstance(spliced, PiecedPrompts):
            return super().begin(spliced, request)
        if any(pieces[-1].ratio is not None for pieces in spliced.pieces):
            raise ValueError("a prompt ends with an image or video: Video-XL answers behind text.")
        embeds = spliced.inputs_embeds
        with contextlib.nullcontext() if request is None else request.span("prefill", embeds.device):
            cache = self.get_model().read(embeds, spliced.layout, without_last=True).cache
        if request is not None:
            layers = self.config.num_hidden_layers
            request.started(layers)
            request.layer_tokens = [list(spliced.lengths)] * layers
            request.decode_steps -= 1  # the call with the last rows is none
        mask = cache.mask(None, 1)
        if mask is None:
            mask = torch.ones(embeds.shape[0], cache.get_seq_length() + 1, dtype=torch.long, device=embeds.device)
        return {
            "inputs_embeds": embeds[:, -1:],
            "attention_mask": mask,
            "position_ids": places_in(mask),
            "past_key_values": cache,
        }

    def _expand_inputs_for_generation(self, expand_size: int = 1, *args: Any, **kwargs: Any):
        cache = kwargs.get("past_key_values")
        if expand_size > 1 and isinstance(cache, SummaryCache) and cache.get_seq_length():
            cache.batch_repeat_interleave(expand_size)
        return super()._expand_inputs_for_generation(expand_size, *args, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int | None = None, inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False, layout: PromptLayout | None = None,
        request: recording.RequestRecord | None = None, **kwargs: Any,
    ):  # fmt: skip
        # transformers looks for what generate is given in this signature, and expects the rows of the cache among the
        # embeddings
        if is_first_iteration and inputs_embeds is not None and isinstance(kwargs.get("past_key_values"), SummaryCache):
            next_sequence_length = None
        kwargs |= {"layout": layout, "request": request, "is_first_iteration": is_first_iteration}
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
        )

    def _cuts_inside(self) -> bool:
        return True

    def _output_rows(self, spliced: Spliced, outputs: Any, logits_to_keep: int | Tensor) -> OutputRows | None:
        if isinstance(logits_to_keep, Tensor):
            raise ValueError(
                "logits_to_keep cannot name rows of a prompt that Video-XL reads in pieces; give how many to keep."
            )
        return None if self.padding_side == "left" else on_the_right(real_rows(outputs, spliced.mask))
