"""The KV cache of a request: what the loop remembers beside it, views of chosen keys, cuts.

What has to survive from prefill to decode (padding and visual masks of every layer's cache) is kept on the cache object
of the request (attribute ``accelerate_state``), each layer's part on the device of that layer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from accelerate_methods.engine.devices import moved
from accelerate_methods.stages.errors import MethodError


@dataclasses.dataclass
class LayerCache:
    """Facts about the entries that prefill (and later turns) left in one layer's cache.

    Attributes:
        visual: [B, S] True at keys of items that the decode method acts on.
        valid: [B, S] False at padding, or None.
        rows: [B, S] which row of the prompt each entry was, None where all are there.
        shift: [B, 1] how far its positions lie behind those of the prompt ("compact" selections), or None.
    """

    visual: Tensor
    valid: Tensor | None = None
    rows: Tensor | None = None
    shift: Tensor | None = None


@dataclasses.dataclass
class CacheState:
    """What the loop remembers of a request beside its cache.

    Attributes:
        has_visual: whether there is anything for a decode method to act on.
        length: rows of the prompt.
        layers: per decoder layer, what its cache holds.
        next_position: [B, 1] position of the next token.
        memory: what the decode method keeps between steps.
    """

    has_visual: bool
    length: int
    layers: list[LayerCache] = dataclasses.field(default_factory=list)
    next_position: Tensor | None = None
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)

    def keep_on(self, cache: DynamicCache) -> None:
        """Stay with ``cache``. Beam search re-orders caches; the memory of a decode method follows."""
        cache.accelerate_state = self
        if not self.has_visual:
            return
        reorder = cache.reorder_cache

        def reorder_both(beams: Tensor) -> None:
            reorder(beams)
            for name, value in self.memory.items():
                if isinstance(value, Tensor) and value.ndim and value.shape[0] == beams.shape[0]:
                    self.memory[name] = value.index_select(0, beams.to(value.device))

        cache.reorder_cache = reorder_both

    def trim(self, cache: DynamicCache, layers: int, picked: Tensor, left: LayerCache) -> None:
        """Cut the first ``layers`` layers of ``cache`` to entries ``picked`` [B, K], of which ``left`` is known."""
        for index in range(layers):
            entry, known = cache.layers[index], self.layers[index]
            device = entry.keys.device
            check_whole(entry.keys, known.visual.shape[1])
            here = moved(picked, device)
            entry.keys, entry.values = gather_keys(entry.keys, here), gather_keys(entry.values, here)
            if hasattr(entry, "cumulative_length"):  # a sliding-window layer counts what it has seen
                entry.cumulative_length = here.shape[1]
            known.valid, known.visual, known.rows = moved((left.valid, left.visual, left.rows), device)

    def carried(self, keep: Tensor, below: int, index: int) -> Tensor:
        """A mask over the keys of layer ``below``, over those keys that layer ``index`` has."""
        everything = torch.arange(self.length, device=keep.device).expand(keep.shape[0], -1)
        rows, fewer = (
            everything if self.layers[i].rows is None else moved(self.layers[i].rows, keep.device)
            for i in (below, index)
        )
        prompt = torch.zeros_like(everything, dtype=torch.bool).scatter_(1, rows, keep[:, : rows.shape[1]])
        return torch.cat([prompt.gather(1, fewer), keep[:, rows.shape[1] :]], dim=1)


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


def cached_length(cache: DynamicCache | None) -> int:
    return 0 if cache is None else cache.get_seq_length()


def whole_keys(cache: DynamicCache, index: int) -> Tensor:
    """[B, G, S, d] the keys that layer ``index`` has cached; MethodError if a sliding window has dropped some."""
    keys = cache.layers[index].keys
    check_whole(keys, cache.get_seq_length(index))
    return keys


def check_whole(keys: Tensor, length: int) -> None:
    if keys.shape[2] < length:
        raise MethodError(
            f"the sliding window of this model has already dropped {length - keys.shape[2]} keys of the prompt; "
            "methods that look back into the KV cache need a prompt within the window."
        )


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
