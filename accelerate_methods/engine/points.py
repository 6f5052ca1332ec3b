"""Where prefill methods act in a decoder, and what they can ask about the layer that has just attended."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accelerate_methods.engine.cached_keys import gather_keys, gather_rows
from accelerate_methods.engine.devices import moved
from accelerate_methods.engine.layers import DecoderLayers, LayerInput

if TYPE_CHECKING:
    from accelerate_methods.registry.pipeline import Pipeline
    from accelerate_methods.stages.prefill import PrefillMethod

#: a method and its number among the prefill methods of the pipeline
Numbered = tuple[int, "PrefillMethod"]


@dataclasses.dataclass
class Acting:
    """The prefill methods that act on one prompt; at most one at each point.

    Attributes:
        before: decoder layer -> who acts before it (the number of layers: after the last one).
        inside: decoder layer -> who acts between its attention and its MLP.
        unmasked: decoder layer that runs without a causal mask -> for each sample whether it does there.
    """

    before: dict[int, Numbered] = dataclasses.field(default_factory=dict)
    inside: dict[int, Numbered] = dataclasses.field(default_factory=dict)
    unmasked: dict[int, tuple[bool, ...]] = dataclasses.field(default_factory=dict)

    def asks_about(self, layer: int) -> bool:
        """Whether somebody may ask what ``layer`` attended to."""
        return layer in self.inside or layer + 1 in self.before


def acting_in(methods: Sequence[PrefillMethod], layers: DecoderLayers, here: Sequence[Sequence[bool]]) -> Acting:
    """Who acts where; ``here``: for each method and sample whether the prompt holds anything for it.

    Raises:
        MethodError: a method acts inside a layer that has no such point.
    """
    acting = Acting()
    for number, (method, samples) in enumerate(zip(methods, here, strict=True)):
        if not any(samples):
            continue
        inner = method.inner_layers(len(layers))
        if inner:
            layers.check_halves()
        acting.before |= dict.fromkeys(method.prefill_layers(len(layers)), (number, method))
        acting.inside |= dict.fromkeys(inner, (number, method))
        acting.unmasked |= dict.fromkeys(method.unmasked_layers(len(layers)), tuple(samples))
    return acting


def check_halves(decoder: object, pipeline: Pipeline) -> None:
    """MethodError if the pipeline acts inside the layers of ``decoder``, which have no such point."""
    layers = DecoderLayers(decoder)
    acting_in(pipeline.prefills, layers, [[True]] * len(pipeline.prefills))


@dataclasses.dataclass
class Attended:
    """The layer that has last attended, as far as methods ask about it.

    Attributes:
        layer: its index; given: what it got.
        valid: [B, L] False at rows that nobody saw, or None.
        left: [B, K] which of its rows are still there, None if all are.
    """

    layer: int
    given: LayerInput
    valid: Tensor | None = None
    left: Tensor | None = None

    def cut(self, picked: Tensor) -> None:
        """Only ``picked`` [B, K] of the rows that were there go on."""
        self.left = picked if self.left is None else self.left.gather(1, picked)

    def entered(self) -> Tensor:
        """[B, K, D] the rows that are still there, as they entered the layer."""
        return self.given.hidden if self.left is None else gather_rows(self.given.hidden, self.left)

    def attention(
        self, layers: DecoderLayers, rows: Tensor, valid: Tensor | None, *, rotary: bool, causal: bool
    ) -> Tensor:
        """[B, H, R, K] probabilities of the rows that are still there, as the layer had them among all of its rows.

        Args:
            rows: [R] or [B, R], counted among those that are left.
            valid: [B, K] of these, or None.
        """
        if self.left is None:
            return layers.attention(self.layer, self.given, rows, valid, rotary=rotary, causal=causal)
        left = moved(self.left, rows.device)
        rows = left[:, rows] if rows.ndim == 1 else left.gather(1, rows)
        scores = layers.attention(self.layer, self.given, rows, self.valid, rotary=rotary, causal=causal)
        columns = moved(left, scores.device)[:, None, None].expand(*scores.shape[:3], -1)
        return scores.gather(-1, columns)

    def keys(self, layers: DecoderLayers, *, rotary: bool) -> Tensor:
        """[B, G, K, d] key states of the rows that are left."""
        keys = layers.keys(self.layer, self.given, rotary=rotary)
        return keys if self.left is None else gather_keys(keys, moved(self.left, keys.device))


def held_by(indices: Tensor, valid: Tensor | None, owner: Tensor | None, length: int) -> Tensor:
    """[B, length] which of the rows that go on holds each row of a sequence, -1 if none does.

    Args:
        indices: [B, K] rows that go on; valid: [B, K] False at padding, or None.
        owner: [B, length] where a method merged rows, see ``Selection.owner``.
    """
    if owner is not None:
        return owner
    batch, count = indices.shape
    held = indices.new_full((batch, length + 1), -1)  # a spare slot takes the padding
    slots = torch.arange(count, device=indices.device).expand(batch, -1)
    held.scatter_(1, indices if valid is None else indices.masked_fill(~valid, length), slots)
    return held[:, :length]
