"""The decode stage: which keys of the cache a decode step sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.method import Method


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


class DecodeMethod(Method):
    """Acts on the view that decode steps have of the KV cache (the cache itself stays whole)."""

    stage = "decode"

    def decode_layer(self, num_layers: int) -> int:
        """First decoder layer (0-based) that sees the reduced view; scores come from the layer before it."""
        raise NotImplementedError

    def decode(self, step: DecodeStep) -> torch.Tensor | None:
        """Boolean [B, S] of visible keys, or None for all."""
        raise NotImplementedError
