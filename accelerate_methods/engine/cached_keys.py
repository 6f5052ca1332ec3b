"""The entries of a KV cache: views of chosen keys, rows by index, masks that grow with a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from accelerate_methods.stages.errors import MethodError


class KeyView:
    """Cache stand-in for one layer of one decode step: stores everything, shows the chosen keys [B, K]."""

    def __init__(self, cache: DynamicCache, indices: Tensor):
        self._cache, self._indices = cache, indices

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._cache.update(keys, values, layer_idx, *args, **kwargs)
        check_whole(keys, self._cache.get_seq_length(layer_idx))
        return gather_keys(keys, self._indices), gather_keys(values, self._indices)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def cached_length(cache: Cache | None) -> int:
    """Entries of layer 0."""
    return 0 if cache is None else cache.get_seq_length(0)


def whole_keys(cache: DynamicCache, index: int) -> Tensor:
    """[B, G, S, d] the keys that layer ``index`` has cached; MethodError if some are out of reach."""
    check_in_reach(cache)
    keys = cache.layers[index].keys
    check_whole(keys, cache.get_seq_length(index))
    return keys


def check_in_reach(cache: DynamicCache) -> None:
    if getattr(cache, "offloading", False):
        raise MethodError(
            "an offloaded cache moves the keys of a layer to CPU memory as soon as it has run; methods that look back "
            "into the KV cache need it where the model is. Leave out cache_implementation."
        )


def check_whole(keys: Tensor, length: int) -> None:
    if keys.shape[2] < length:
        raise MethodError(
            f"the sliding window of this model has already dropped {length - keys.shape[2]} keys of the prompt; "
            "methods that look back into the KV cache need a prompt within the window."
        )


def replace_entries(layer: Any, keys: Tensor, values: Tensor) -> None:
    """Other entries [B, G, S, d] for one layer of a cache."""
    layer.keys, layer.values = keys, values
    if hasattr(layer, "cumulative_length"):  # a sliding-window layer counts what it has seen
        layer.cumulative_length = keys.shape[2]


def grown(mask: Tensor, total: int, new: int, fill: bool) -> Tensor:
    """A mask over a layer's cache, extended to ``total`` keys: those cached since, and this call's ``new`` ones."""
    mask = mask[:, : total - new]  # generate may have cropped the cache
    return torch.cat([mask, mask.new_full((mask.shape[0], total - mask.shape[1]), fill)], dim=1)


def gather_rows(states: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices`` [B, K] of states [B, L, D]. Copies whole rows, which ``torch.gather`` does not."""
    batch, length, width = states.shape
    rows = indices + torch.arange(batch, device=indices.device)[:, None] * length
    return states.reshape(-1, width).index_select(0, rows.flatten()).view(batch, -1, width)


def gather_keys(states: Tensor, indices: Tensor) -> Tensor:
    """Keys (or values) ``indices`` [B, K] of states [B, H, S, d]."""
    batch, heads = states.shape[:2]
    per_head = indices[:, None].expand(-1, heads, -1).reshape(batch * heads, -1)
    return gather_rows(states.flatten(0, 1), per_head).unflatten(0, (batch, heads))
