"""What the decoder loop shows a method, and what the method gives back. Free of transformers, as methods are."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from accelerate_methods.ops.select import right_aligned_indices
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.method import Method
from accelerate_methods.stages.printing import ShapesShown


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




@dataclasses.dataclass(repr=False)
class Selection(ShapesShown):
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
        """From a boolean [B, L]; one device read, since how many rows there are is what the sizes to come depend on."""
        if keep.shape[0] == 1:
            return cls(indices=keep[0].nonzero().squeeze(1)[None], **kwargs)
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
        rows = loop.rows
        self.hidden_states = rows.hidden
        self.visual = rows.masks["visual"]
        self.block = rows.masks["block"]
        self.valid = rows.valid
        self.position_ids = rows.position_ids
        self.spans = loop.spans
        self.rows = rows.kept
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


class PrefillMethod(Method):
    """Acts between decoder layers during prefill.

    ``prefill`` is called with the hidden states entering each layer of :meth:`prefill_layers` and says which of them
    go on. Attention scores are available through ``step`` for chosen rows only.
    """

    stage = "prefill"

    def prefill_layers(self, num_layers: int) -> tuple[int, ...]:
        """0-based indices of the decoder layers before which the method acts; ``num_layers``: after the last one."""
        raise NotImplementedError

    def prefill(self, step: PrefillStep) -> Selection | None:
        raise NotImplementedError
