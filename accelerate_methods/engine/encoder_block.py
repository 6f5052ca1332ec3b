"""One block of a vision encoder: how it is built, and what it attends to.

Where the model makes one token of several neighbouring patches (2 x 2), they go on together, as a group: blocks see
patches, methods see groups, and the S special tokens stay in front of both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from accelerate_methods.engine.encoder_attention import received_per_map
from accelerate_methods.stages.encode import TokenMap


class EncoderBlock(ABC):
    """One block of an encoder; made for a request where a block depends on it (rotary tables).

    Attributes:
        scale: of the attention's logits.
        windows: [P] number of the window that each group attends in, None for attention to everything;
            window_sizes: groups of each window before anything was merged.
        taken_apart: whether ``whole`` cannot be used.
    """

    scale: float
    windows: Tensor | None = None
    window_sizes: Sequence[int] = ()
    taken_apart = False

    @abstractmethod
    def project(self, hidden: Tensor, tokens: TokenMap) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[V, T, C] input -> queries, keys, values, and keys before rotation: [V, H, T, d] each, not scaled."""

    @abstractmethod
    def attended(self, hidden: Tensor, output: Tensor) -> Tensor:
        """[V, T, C] input and [V, T, H * d] attention over values -> [V, T, C] after the residual."""

    @abstractmethod
    def feed_forward(self, hidden: Tensor) -> Tensor:
        """[V, T, C] -> [V, T, C]: second norm, MLP, residual."""

    @abstractmethod
    def whole(self, hidden: Tensor) -> Tensor:
        """The block as the model runs it."""


class BlockAttention:
    """What one block attends to, as far as somebody asks.

    Args:
        projected: of :meth:`EncoderBlock.project`; bias: [V, T] added to the logits of each key, or None.
        special: special tokens in front; unit: patches per group.
        padding: of a block with windows.
    """

    def __init__(
        self, block: EncoderBlock, projected: tuple[Tensor, ...], bias: Tensor | None, special: int, unit: int,
        padding: Padding | None,
    ):  # fmt: skip
        self.query, self.key, self._value, self._plain = projected
        self._scale, self._bias, self._padding = block.scale, bias, padding
        self.special, self._unit = special, unit

    def output(self, dropout: float = 0.0) -> Tensor:
        """[V, T, H * d] values, weighted."""
        views, heads, length, width = self.query.shape
        if self._padding is None:
            mask = None
            if self._bias is not None:
                mask = self._bias.to(self.query.dtype)[:, None, None].expand(views, 1, length, length)
            parts = self.query, self.key, self._value
        else:
            parts, mask = self._windowed()
            mask = mask[:, None, None].expand(-1, 1, mask.shape[-1], mask.shape[-1])
        out = nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask, dropout_p=dropout, scale=self._scale)
        if self._padding is not None:
            out = self._padding.undone(out, views)
        return out.transpose(1, 2).reshape(views, length, heads * width)

    def keys(self) -> Tensor:
        """[V, T, d]."""
        return per_group(self._plain.mean(1), self.special, self._unit)

    def cls_attention(self) -> Tensor:
        """[V, N]."""
        logits = (self.query[:, :, :1] * self._scale) @ self.key.transpose(-1, -2)
        if self._bias is not None:
            logits = logits + self._bias[:, None, None]
        rows = logits[:, :, 0].softmax(-1, dtype=torch.float32).mean(1)
        return per_group(rows, self.special, self._unit)[:, self.special :]

    def received_attention(self) -> Tensor:
        """[V, N]."""
        if self._padding is None:
            query, key, bias, share = self.query, self.key, self._bias, 1.0
        else:
            (query, key, _), bias = self._windowed()
            share = self._padding.capacity / self.query.shape[2]  # a mean over the queries of all windows
        maps = query.shape[:2]
        bias = None if bias is None else bias.float().repeat_interleave(maps[1], 0)
        real = None if self._padding is None else self._padding.real.flatten(0, 1).repeat_interleave(maps[1], 0)
        queries = (query * self._scale).flatten(0, 1)
        received = received_per_map(queries, key.flatten(0, 1).transpose(-1, -2), bias, real).view(*maps, -1).mean(1)
        if self._padding is not None:
            received = self._padding.undone(received[:, None, :, None], len(self.query))[:, 0, :, 0] * share
        return per_group(received, self.special, self._unit)[:, self.special :]

    def _windowed(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """Queries, keys, values [V * W, H, c, d] window by window, and what is added to the logits [V * W, c]."""
        padding = self._padding
        parts = tuple(padding.done(part) for part in (self.query, self.key, self._value))
        mask = torch.zeros(padding.real.shape, dtype=self.query.dtype, device=self.query.device)
        if self._bias is not None:
            mask = mask + padding.done(self._bias[:, None, :, None])[:, 0, :, 0].view_as(mask).to(mask.dtype)
        mask = mask.masked_fill(~padding.real, torch.finfo(mask.dtype).min)
        return parts, mask.flatten(0, 1)


class Padding:
    """Tokens sorted into windows of one capacity, so that how many are left in each need not be known to the host.

    Args:
        windows: [V, N] window of each group, ``count`` of them; capacity: groups of the fullest; unit: patches of a
            group.

    Attributes:
        capacity: patches that a window has room for.
        real: [V, W, c] False in the room that is empty.
    """

    def __init__(self, windows: Tensor, count: int, capacity: int, unit: int):
        views, groups = windows.shape
        order = torch.argsort(windows, dim=1, stable=True)
        sorted_windows = windows.gather(1, order)
        held = torch.zeros(views, count, dtype=torch.long, device=windows.device)
        held.scatter_add_(1, windows, torch.ones_like(windows))
        first = held.cumsum(1) - held
        rank = torch.arange(groups, device=windows.device) - first.gather(1, sorted_windows)
        room = sorted_windows * capacity + rank
        slot = torch.empty_like(order).scatter_(1, order, room)  # of each group
        occupant = torch.zeros(views, count * capacity, dtype=torch.long, device=windows.device)
        occupant.scatter_(1, room, order)
        inside = torch.arange(unit, device=windows.device)
        self._slot = (slot[..., None] * unit + inside).flatten(1)
        self._occupant = (occupant[..., None] * unit + inside).flatten(1)
        real = torch.arange(capacity * unit, device=windows.device) < held[..., None] * unit
        self.real, self.capacity, self._count = real, capacity * unit, count

    def done(self, part: Tensor) -> Tensor:
        """[V, H, T, d] -> [V * W, H, c, d]."""
        index = self._occupant[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[3])
        rows = part.gather(2, index).unflatten(2, (self._count, self.capacity))
        return rows.transpose(1, 2).flatten(0, 1)

    def undone(self, part: Tensor, views: int) -> Tensor:
        """[V * W, H, c, d] -> [V, H, T, d]."""
        rows = part.unflatten(0, (views, self._count)).transpose(1, 2).flatten(2, 3)
        return rows.gather(2, self._slot[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[3]))


class ClipBlock(EncoderBlock):
    """A layer of transformers' CLIP or SigLIP vision encoder.

    Args:
        forward: its own, where something else has been put in its place.
    """

    def __init__(self, layer: nn.Module, forward: Callable[..., Any] | None = None):
        self._layer, self._forward = layer, layer if forward is None else forward
        self._attention = layer.self_attn
        self.scale = layer.self_attn.scale

    def project(self, hidden: Tensor, tokens: TokenMap) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        attention, states = self._attention, self._layer.layer_norm1(hidden)
        query, key, value = (
            part(states).unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        return query, key, value, key

    def attended(self, hidden: Tensor, output: Tensor) -> Tensor:
        return hidden + self._attention.out_proj(output)

    def feed_forward(self, hidden: Tensor) -> Tensor:
        return hidden + self._layer.mlp(self._layer.layer_norm2(hidden))

    def whole(self, hidden: Tensor) -> Tensor:
        out = self._forward(hidden, attention_mask=None)
        return out[0] if isinstance(out, tuple) else out


def to_groups(hidden: Tensor, special: int, unit: int) -> Tensor:
    """[V, S + N * u, C] -> [V, S + N, u * C]; special tokens are repeated."""
    if unit == 1:
        return hidden
    groups = hidden[:, special:].unflatten(1, (-1, unit)).flatten(2)
    return torch.cat([hidden[:, :special].repeat(1, 1, unit), groups], dim=1) if special else groups


def from_groups(hidden: Tensor, special: int, unit: int) -> Tensor:
    """What :func:`to_groups` undoes."""
    if unit == 1:
        return hidden
    patches = hidden[:, special:].unflatten(2, (unit, -1)).flatten(1, 2)
    return torch.cat([hidden[:, :special].chunk(unit, dim=-1)[0], patches], dim=1) if special else patches


def per_patch(values: Tensor, special: int, unit: int) -> Tensor:
    """[V, S + N] -> [V, S + N * u]."""
    if unit == 1:
        return values
    return torch.cat([values[:, :special], values[:, special:].repeat_interleave(unit, 1)], dim=1)


def per_group(values: Tensor, special: int, unit: int) -> Tensor:
    """[V, S + N * u, ...] -> [V, S + N, ...], means over groups."""
    if unit == 1:
        return values
    return torch.cat([values[:, :special], values[:, special:].unflatten(1, (-1, unit)).mean(2)], dim=1)
