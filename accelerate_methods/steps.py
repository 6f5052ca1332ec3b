"""What the decoder loop shows a method, and what the method gives back. Free of transformers, as methods are."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .errors import MethodError
from .ops.select import right_aligned_indices


@dataclasses.dataclass(frozen=True)
class VisualSpan:
    """Where one image or video stands in a prompt. Plain integers: no device read is needed.

    Attributes:
        start: first row in the padded prompt; length: rows, newlines included.
        modality: "image" or "video".
        num_content: rows that are visual tokens (the others are newlines).
        info: what the compress stage said about it (``Compressed.info``); empty where nothing was compressed.
    """

    start: int
    length: int
    modality: str
    num_content: int
    info: dict[str, object] = dataclasses.field(default_factory=dict)

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclasses.dataclass
class PromptLayout:
    """What the splice knows about a batch of prompts and the loop needs.

    Attributes:
        visual: [B, L] True at visual tokens (newlines are not).
        lengths: real tokens per sample.
        spans: the images and videos of each sample, in order.
    """

    visual: Tensor
    lengths: list[int]
    spans: list[list[VisualSpan]] = dataclasses.field(default_factory=list)

    def expanded(self, batch: int) -> PromptLayout:
        """Repeated for beams or several return sequences."""
        times = batch // self.visual.shape[0]
        if times == 1:
            return self
        return PromptLayout(
            visual=self.visual.repeat_interleave(times, dim=0),
            lengths=[n for n in self.lengths for _ in range(times)],
            spans=[s for s in self.spans for _ in range(times)],
        )

    def only(self, modalities: frozenset[str]) -> PromptLayout:
        """The same prompts, with the items of other modalities taken for text."""
        spans = [[s for s in sample if s.modality in modalities] for sample in self.spans]
        if spans == self.spans:
            return self
        layout = PromptLayout(self.visual, self.lengths, spans)
        layout.visual = self.visual & layout.blocks()
        return layout

    def blocks(self) -> Tensor:
        """[B, L] True at every row of a span, newlines included."""
        mask = torch.zeros_like(self.visual)
        for row, sample in zip(mask, self.spans, strict=True):
            for span in sample:
                row[span.start : span.end] = True
        return mask


@dataclasses.dataclass
class Selection:
    """Tokens that go on after a prefill stage.

    Attributes:
        indices: [B, K] ascending positions in the sequence that the layer got.
        valid: [B, K] False where a sample has fewer than K (padding stands on the left); None if all are real.
        hidden_states: [B, L, D] replacement states to gather from (for methods that merge), or None.
        trim_cache: also cut the KV cache of the layers already run.
        positions: "original" keeps position ids (gaps); "compact" re-numbers from 0 for the layers to come, which
            generated tokens then continue.
    """

    indices: Tensor
    valid: Tensor | None = None
    hidden_states: Tensor | None = None
    trim_cache: bool = False
    positions: str = "original"

    @classmethod
    def from_mask(cls, keep: Tensor, **kwargs: Any) -> Selection:
        """From a boolean [B, L]; reads the counts from the device once."""
        indices, valid = right_aligned_indices(keep, keep.sum(1).tolist())
        return cls(indices=indices, valid=valid, **kwargs)


class PrefillStep:
    """What a prefill method sees before decoder layer ``layer``.

    Attributes:
        layer: 0-based index of the layer about to run; num_layers: how many there are.
        hidden_states: [B, L, D] its input.
        visual: [B, L] True at visual tokens; block: [B, L] the same with the newlines of an image or video. Items of
            other modalities than the method's own count as text.
        valid: [B, L] False at padding, or None.
        position_ids: [B, L].
        spans: per sample, where the method's items stood in the prompt (``rows`` leads from here to there).
        rows: [B, L] row of the prompt that each row was, None as long as nothing has been dropped.
        lengths: real tokens of each sample's prompt; num_heads: query heads of the decoder.

    Padding stands on the left, so the last row is the last prompt token of every sample.
    """

    def __init__(self, loop: Any, layer: int):
        self._loop = loop
        self.layer = layer
        self.num_layers = len(loop.layers)
        self.hidden_states = loop.hidden
        self.visual = loop.masks["visual"]
        self.block = loop.masks["block"]
        self.valid = loop.valid
        self.position_ids = loop.position_ids
        self.spans = loop.spans
        self.rows = loop.kept
        self.lengths = loop.layout.lengths
        self.num_heads = loop.config.num_attention_heads

    def attention(self, rows: Tensor, *, rotary: bool = True, causal: bool = True) -> Tensor:
        """Attention probabilities [B, H, R, L] of layer ``layer - 1`` for the query positions ``rows`` [R] only.

        Softmax in float32, returned in the model dtype. ``rotary=False`` gives position-free scores, ``causal=False``
        lets every row see every key; padding is never seen.
        """
        if self.layer == 0:
            raise MethodError("there is no attention before layer 0; ask for a layer >= 1.")
        return self._loop.attention_rows(self.layer - 1, rows, self.valid, rotary=rotary, causal=causal)


class DecodeStep:
    """What a decode method sees in one step, before decoder layer ``layer``.

    Attributes:
        layer: 0-based index of the layer about to run.
        visual: [B, S] True at visual keys of that layer's cache that belong to the method's modalities (the token being
            decoded included, as False).
        valid: [B, S] False at padding, or None.
        memory: dict that lives as long as the request, for state between steps. Tensors [B, ...] in it follow the beams
            of a beam search.
    """

    def __init__(self, loop: Any, layer: int, visual: Tensor, valid: Tensor | None, memory: dict[str, Any]):
        self._loop, self.layer = loop, layer
        self.visual, self.valid, self.memory = visual, valid, memory

    def attention(self) -> Tensor:
        """[B, H, S] probabilities of the current token over the cached keys of layer ``layer - 1``."""
        below, here = self._loop.cache.get_seq_length(self.layer - 1), self.visual.shape[1]
        if below != here:
            raise MethodError(
                f"layer {self.layer - 1} caches {below} keys and layer {self.layer} {here}: "
                "a decode method cannot take its scores across the layer where a prefill method dropped tokens."
            )
        rows = torch.zeros(1, dtype=torch.long, device=self.visual.device)
        return self._loop.attention_rows(self.layer - 1, rows, self.valid, rotary=True, causal=False)[:, :, 0]
