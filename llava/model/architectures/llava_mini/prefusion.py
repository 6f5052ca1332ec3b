"""Modality pre-fusion of LLaVA-Mini: decoder layers of its own, in which the text reads the whole image.

The sequence is [image tokens ; compressed tokens ; text] under a causal mask, so nothing of an image depends on the
text. The two halves are therefore run one after the other: what an image leaves (:class:`FusedImages`) serves any
number of questions, and text of T rows needs a mask of T rows only. The results are those of one pass over all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from accelerate_methods.engine.devices import moved
from accelerate_methods.engine.masks import cached_mask, prefill_mask
from accelerate_methods.stages.printing import ShapesShown

#: rows that the layers get at once; frames beyond that follow in a further call
ROWS_AT_ONCE = 16384
FULL = "full_attention"


@dataclasses.dataclass(repr=False)
class FusedImages(ShapesShown):
    """What pre-fusion leaves of one image, or of the F frames of one video.

    Attributes:
        tokens: [F, C*C, D] visual tokens of the language model.
        keys, values: for each layer [F, G, M + C*C, d], keys after the rotary embedding.
        kind: "image" or "video".
    """

    tokens: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    kind: str

    @property
    def length(self) -> int:
        """Rows of an image or frame in pre-fusion."""
        return self.keys[0].shape[2] if self.keys else 0  # without layers nothing is read

    def cache(self) -> DynamicCache:
        """A new cache that begins with the images; growing it leaves this object as it is."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(keys, values, layer)
        return cache

    @classmethod
    def of(cls, tokens: Tensor, cache: DynamicCache, kind: str) -> FusedImages:
        return cls(tokens, [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers], kind)

    def frames(self, chosen: slice | Tensor) -> FusedImages:
        """Some of the frames, by number."""
        return FusedImages(
            self.tokens[chosen], [k[chosen] for k in self.keys], [v[chosen] for v in self.values], self.kind
        )

    @staticmethod
    def joined(parts: list[FusedImages], kind: str) -> FusedImages:
        """The frames of all parts, one after the other."""
        if len(parts) == 1:
            return dataclasses.replace(parts[0], kind=kind)
        layers = range(len(parts[0].keys))
        return FusedImages(
            torch.cat([part.tokens for part in parts]),
            [torch.cat([part.keys[layer] for part in parts]) for layer in layers],
            [torch.cat([part.values[layer] for part in parts]) for layer in layers],
            kind,
        )


def chunks(frames: int, rows: int) -> Iterator[slice]:
    """Slices of ``frames`` of ``rows`` rows each that the layers can take at once."""
    step = max(1, ROWS_AT_ONCE // rows)
    yield from (slice(start, start + step) for start in range(0, frames, step))


def see(decoder: Any, image: Tensor, compressed: Tensor) -> tuple[Tensor, DynamicCache]:
    """The image half.

    Args:
        image: [F, M, D] projected patches; compressed: [F, C*C, D].

    Returns:
        [F, C*C, D] the visual tokens, and the keys and values that text reads.
    """
    hidden, cache = torch.cat([image, compressed], dim=1), DynamicCache()
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
    mask = prefill_mask(decoder.config, FULL, hidden, None)
    out = _layers(decoder, hidden, positions, mask, cache)
    return out[:, image.shape[1] :], cache


def read(decoder: Any, cache: DynamicCache, embeds: Tensor, ignored: Tensor) -> Tensor:
    """The text half, behind images in ``cache``, which grows by the text.

    Args:
        embeds: [F, T, D] the same or another text for each image; ignored: [F, T] rows that take no part.

    Returns:
        [F, T, D] fused text; ignored rows are as they were.
    """
    before = cache.get_seq_length()
    positions = (before + (~ignored).cumsum(1) - 1).masked_fill(ignored, 1)
    valid = torch.cat([ignored.new_ones(len(embeds), before), ~ignored], dim=1)
    mask = cached_mask(decoder.config, FULL, embeds, valid, (valid.shape[1], 0))
    fused = _layers(decoder, embeds, positions, mask, cache)
    return torch.where(ignored[..., None], embeds, fused)


def see_and_read(
    decoder: Any, image: Tensor, compressed: Tensor, embeds: Tensor, ignored: Tensor
) -> tuple[Tensor, Tensor]:
    """Both halves in one pass without a cache, as gradient checkpointing needs it: visual tokens and fused text."""
    hidden = torch.cat([image, compressed, embeds], dim=1)
    before = hidden.shape[1] - embeds.shape[1]
    valid = torch.cat([ignored.new_ones(len(embeds), before), ~ignored], dim=1)
    positions = (valid.cumsum(1) - 1).masked_fill(~valid, 1)
    out = _layers(decoder, hidden, positions, prefill_mask(decoder.config, FULL, hidden, valid), None)
    fused = torch.where(ignored[..., None], embeds, out[:, before:])
    return out[:, image.shape[1] : before], fused


def _layers(decoder: Any, hidden: Tensor, positions: Tensor, mask: Any, cache: DynamicCache | None) -> Tensor:
    rope = decoder.rotary_emb(hidden, position_ids=positions)
    for layer in decoder.prefusion_layers:
        hidden = layer(
            hidden,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            position_embeddings=rope,
        )
    return moved(hidden, positions.device)
