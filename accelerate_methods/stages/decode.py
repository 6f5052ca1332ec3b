"""The decode stage: which keys of the cache a decode step sees, and which entries of the cache stay."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.method import Method
from accelerate_methods.stages.printing import ShapesShown


class DecodeStep:
    """What a decode method sees in one step, before decoder layer ``layer``.

    Attributes:
        layer: 0-based index of the layer about to run.
        visual: [B, S] True at visual keys of that layer's cache that belong to the method's modalities (the token being
            decoded included, as False).
        valid: [B, S] False at padding, or None.
        memory: dict that lives as long as the request, for state between steps. Tensors [B, ...] in it follow the beams
            of a beam search. Put new tensors into it, and never change one in place: copies of a cache, and caches that
            go back to an earlier step (a draft that was rejected), share what was there.
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
    """Acts on the view that decode steps have of the KV cache (the cache itself stays whole).

    Attributes:
        acts_on_text: whether it acts on prompts without visual tokens, too.
    """

    stage = "decode"
    acts_on_text: ClassVar[bool] = False

    @property
    def checks_drafts(self) -> bool:
        """Whether several tokens that follow each other can be decoded in one call as they would be one by one."""
        return False

    def decode_layer(self, num_layers: int) -> int:
        """First decoder layer (0-based) that sees the reduced view; scores come from the layer before it."""
        raise NotImplementedError

    def decode(self, step: DecodeStep) -> torch.Tensor | None:
        """Boolean [B, S] of visible keys, or None for all."""
        raise NotImplementedError


@dataclasses.dataclass(repr=False)
class Kept(ShapesShown):
    """Entries of the cache that stay.

    Attributes:
        indices: [K] rising places in the cache, the same for every sample; or [B, K].
        valid: [B, K] False at padding (on the left), or None.
        first: where they are the first and the last real entries of each sample, how many of the first; None for any
            others. Only speed and rounding depend on it.
    """

    indices: Tensor
    valid: Tensor | None = None
    first: int | None = None

    @classmethod
    def from_mask(cls, keep: Tensor, most: int, first: int | None = None) -> Kept:
        """From a bool [B, S] with at most ``most`` entries per sample, without a device read."""
        order = keep.byte().argsort(dim=1, stable=True)  # what goes, then what stays
        indices = order[:, max(0, order.shape[1] - most) :]
        return cls(indices, keep.gather(1, indices), first)


@dataclasses.dataclass(repr=False)
class EvictStep(ShapesShown):
    """The cache of some layers, before a call adds tokens to it or after it has.

    Attributes:
        when: "before" or "after" the call.
        call: "prompt" (the first on a cache, of which methods see the end only), "turn" (a later prompt) or "step" (one
            token, or drafts that are checked together).
        layers: decoder layers that these entries are of; they hold the same tokens.
        entries: S, cached entries, padding included. A plain number.
        visual: [B, S] True at visual keys of the method's modalities.
        valid: [B, S] False at padding, or None.
        coming: tokens that the call is about to add, padding included; 0 after it.
        arriving: [B, 1] how many of them are real, None: all.
        reserved: tokens that ``generate`` may add behind the call, 0 where nobody says.
    """

    when: str
    call: str
    layers: list[int]
    entries: int
    visual: Tensor
    valid: Tensor | None = None
    coming: int = 0
    arriving: Tensor | None = None
    reserved: int = 0

    @property
    def real(self) -> Tensor | int:
        """Real entries: a number, or [B, 1] if there is padding."""
        return self.entries if self.valid is None else self.valid.sum(1, keepdim=True)

    def ends(self, first: int | Tensor, last: int | Tensor, most: int | None = None) -> Kept | None:
        """The first and the last real entries of every sample; None if that is all of them.

        Args:
            first, last: how many, at least 0: numbers, or [B, 1] of each sample.
            most: where they are tensors, a bound of their sum.
        """
        numbers = not isinstance(first, Tensor) and not isinstance(last, Tensor)
        if numbers and first + last >= self.entries:
            return None
        device = self.visual.device
        if numbers and self.valid is None:
            tail = torch.arange(self.entries - last, self.entries, device=device)
            return Kept(torch.cat([torch.arange(first, device=device), tail]), first=first)
        real = torch.ones_like(self.visual) if self.valid is None else self.valid
        rank = real.cumsum(1)
        keep = real & ((rank <= first) | (rank > rank[:, -1:] - last))
        if numbers:
            return Kept.from_mask(keep, first + last, first)
        return Kept.from_mask(keep, self.entries if most is None else most)


class EvictMethod(DecodeMethod):
    """Drops entries of the KV cache for good, so that every layer's cache is really shorter.

    ``evict`` is called before a call adds its tokens (not on an empty cache) and after it, once for all layers that
    hold the same tokens: layers of different length, as prefill methods leave them, each keep entries of their own.
    """

    @property
    def cache_positions(self) -> str:
        """Where tokens stand for the rotary embedding, a rule of the whole request:

        "original": where they stood in the prompt; evicted ones leave gaps.
        "cache": at their place in the cache; those that are left move up when others are evicted.
        "entered": at the place in the cache at which they entered it; new ones go on from its present length.
        """
        return "original"

    def decode_layer(self, num_layers: int) -> int:
        """No layer has a reduced view."""
        return num_layers

    def evict(self, step: EvictStep) -> Kept | None:
        """What stays, None for everything."""
        raise NotImplementedError
