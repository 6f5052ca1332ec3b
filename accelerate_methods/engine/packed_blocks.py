"""Blocks of a vision encoder on views that keep different numbers of tokens: all in one row, attending view by view."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from accelerate_methods.engine.encoder_block import EncoderBlock
from accelerate_methods.ops.select import on_device


def run_packed(
    blocks: Sequence[EncoderBlock], hidden: Tensor, kept: Tensor, first: int, *, special: int, unit: int
) -> Tensor:
    """
    Args:
        blocks: those that run, of encoders without rotary positions.
        hidden: [V, S + P * u, C] input of the first block, the u patches of a token behind each other.
        kept: [V, P] bool, on the host: tokens that go on from block ``first`` on; special ones do.

    Returns:
        [V, S + P * u, C] with every patch in its place, zeros where it is gone.
    """
    for block in blocks[:first]:
        hidden = block.whole(hidden)
    front = torch.ones(len(kept), special, dtype=torch.bool)
    rows = torch.cat([front, kept.repeat_interleave(unit, 1)], dim=1)
    lengths, index = rows.sum(1).tolist(), on_device(rows.flatten().nonzero().squeeze(1), hidden.device)
    flat = hidden.flatten(0, 1)
    packed = flat[index][None]
    for block in blocks[first:]:
        packed = block.feed_forward(block.attended(packed, _attention(block, packed, lengths)))
    return torch.zeros_like(flat).index_copy(0, index, packed[0]).view_as(hidden)


def _attention(block: EncoderBlock, packed: Tensor, lengths: Sequence[int]) -> Tensor:
    """[1, M, H * d]; views of one length attend together."""
    query, key, value, _ = block.project(packed, None)
    parts = [part[0].split(list(lengths), dim=1) for part in (query, key, value)]
    out: list[Tensor | None] = [None] * len(lengths)
    numbers = sorted(range(len(lengths)), key=lengths.__getitem__)
    for _, group in itertools.groupby(numbers, key=lengths.__getitem__):
        own = list(group)
        stacked = (torch.stack([part[number] for number in own]) for part in parts)
        found = nn.functional.scaled_dot_product_attention(*stacked, scale=block.scale)
        for number, one in zip(own, found, strict=True):
            out[number] = one
    return torch.cat(out, dim=1).transpose(0, 1).flatten(1)[None]
