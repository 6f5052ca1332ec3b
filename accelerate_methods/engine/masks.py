"""Attention masks of the loop, in the form that the model's attention backend takes.

[B, K] padding for flash-attention, [B, 1, q, K] booleans for SDPA, the same as numbers for eager attention; None where
the backend's own causal mask says everything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from accelerate_methods.ops.select import on_device
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.prefill import Selection


def prefill_mask(config: Any, kind: str | tuple[bool, ...], hidden: Tensor, valid: Tensor | None) -> Any:
    """Mask of a layer that gets rows ``hidden`` [B, L, D] and has nothing in its cache.

    Args:
        kind: "full_attention", "sliding_attention", or for each sample whether its rows see those behind them, too.
        valid: [B, L] False at padding, or None.

    Raises:
        MethodError: an unmasked layer with flash-attention.
    """
    if isinstance(kind, tuple):
        if is_flash(config):
            raise MethodError("a layer without a causal mask does not run with flash-attention; use sdpa or eager.")
        length, device = hidden.shape[1], hidden.device
        behind = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        return key_mask(config, hidden, valid, behind | on_device(kind, device)[:, None, None, None])
    make = create_sliding_window_causal_mask if kind == "sliding_attention" else create_causal_mask
    return make(config=config, inputs_embeds=hidden, attention_mask=valid, past_key_values=None, position_ids=None)


def cached_mask(config: Any, kind: str, hidden: Tensor, valid: Tensor | None, sizes: tuple[int, int]) -> Any:
    """Mask for queries ``hidden`` [B, q, D] at the end of a cache.

    Args:
        valid: [B, S] False at padding, over all keys ever cached and the queries' own; None if all are real.
        sizes: (K, offset): the keys that the layer still has are ``offset`` to ``offset + K`` of these.
    """
    if is_flash(config):
        return valid
    new, (length, offset) = hidden.shape[1], sizes
    keys = torch.arange(offset, offset + length, device=hidden.device)
    query = torch.arange(new, device=keys.device)[:, None] + (offset + length - new)
    allowed = keys <= query
    if kind == "sliding_attention":
        allowed &= keys > query - config.sliding_window
    return key_mask(config, hidden, None if valid is None else valid[:, offset:], allowed)


def key_mask(config: Any, hidden: Tensor, valid: Tensor | None, allowed: Tensor | None = None) -> Any:
    """What the backend takes for [B, K] valid keys and allowed pairs, [q, K] or [B, 1, q, K]; None stands for all."""
    if valid is not None and is_flash(config):
        return valid
    if valid is not None:
        allowed = valid[:, None, None] if allowed is None else valid[:, None, None] & allowed
        # A query that is itself padding would see nothing and turn into NaN; let it see everything.
        allowed = allowed | ~allowed.any(-1, keepdim=True)
    elif allowed is not None:
        allowed = allowed.expand(hidden.shape[0], 1, -1, -1)
    if allowed is not None and config._attn_implementation == "eager":
        lowest = torch.finfo(hidden.dtype).min
        return torch.zeros_like(allowed, dtype=hidden.dtype).masked_fill(~allowed, lowest)
    return allowed


def is_flash(config: Any) -> bool:
    return "flash" in (config._attn_implementation or "")


def visible_keys(keep: Tensor | None, valid: Tensor | None) -> Selection | None:
    """Indices of the keys [B, S] to show, None for all; ``keep``: those that a method keeps; ``valid``: real ones."""
    if keep is None:
        return None
    shown = Selection.from_mask(keep if valid is None else keep & valid)
    everything = shown.valid is None and shown.indices.shape[1] == keep.shape[1]
    return None if everything else shown
