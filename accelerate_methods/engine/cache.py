"""The KV cache of a request, which takes the state beside it along.

What the loop remembers (:class:`.cache_state.CacheState`) is kept on the cache object of the request. The cache is made
a :class:`RequestCache`, so that crops, copies, beams and changes of the batch take that state along.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache

from accelerate_methods.engine.cache_state import CacheState
from accelerate_methods.engine.cached_keys import cached_length
from accelerate_methods.engine.devices import moved
from accelerate_methods.stages.errors import MethodError


class RowsAlong(DynamicCache):
    """In front of the class of a cache: what it remembers of each sample goes along when samples move."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._change_rows(lambda value: value.index_select(0, beam_idx.to(value.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change_rows(lambda value: value.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Any) -> None:
        super().batch_select_indices(indices)
        self._change_rows(lambda value: value[moved(indices, value.device)])

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply ``change``, which moves the first dimension, to every tensor that has a row for each sample."""


class FollowedCache(RowsAlong):
    """In front of the class of a cache: the request's state goes along with every operation.

    Assigned to the object that the caller knows (``cache.__class__``), which stays a cache of its class.
    """

    #: None for a prompt that the loop has not seen
    accelerate_state: CacheState | None = None

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Entries of a layer; without one the length of the whole sequence as the caller counts it.

        ``generate`` and draft models compare that with their ids, which know nothing of dropped tokens.
        """
        entries = super().get_seq_length(layer_idx or 0)
        whole = layer_idx is None and entries and self.accelerate_state is not None
        return entries + self.accelerate_state.dropped if whole else entries

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        if self.accelerate_state is not None and super().get_seq_length(0):
            self.accelerate_state.check_used()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens; a positive number is the length of the whole sequence to keep.

        Raises:
            MethodError: they reach into a prompt that was cut between layers.
        """
        count = tokens_to_remove
        if count > 0:
            count = min(0, count - self.get_seq_length())
        state = self.accelerate_state
        if state is not None:
            state.follow(self)
            state.check_crop(super().get_seq_length(0) + count)
        super().crop(count)
        if state is None:
            return
        if super().get_seq_length(0):
            state.follow(self)
        else:
            self.accelerate_state = None

    def reset(self) -> None:
        super().reset()
        self.accelerate_state = None

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._change_rows(change)
        if self.accelerate_state is not None:
            self.accelerate_state.change_rows(change)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For copies and pickles. What records a request (``accelerate_request``) does not record its copies."""
        plain = next(c for c in type(self).__mro__ if not issubclass(c, FollowedCache) and c is not RowsAlong)
        return _unfilled, (plain,), {**self.__dict__, "accelerate_request": None}


class RequestCache(FollowedCache):
    """A plain ``DynamicCache`` with the state of its request."""


@functools.cache
def _request_class(plain: type) -> type:
    """``plain`` with :class:`FollowedCache` in front."""
    if issubclass(plain, FollowedCache):
        return plain
    return RequestCache if plain is DynamicCache else type(f"Request{plain.__name__}", (FollowedCache, plain), {})


def keep_on(cache: DynamicCache, state: CacheState) -> None:
    """``state`` stays with ``cache`` from now on."""
    cache.__class__ = _request_class(type(cache))
    cache.accelerate_state = state


def _unfilled(plain: type) -> FollowedCache:
    """For unpickling: an object whose attributes come from elsewhere."""
    made = _request_class(plain)
    return made.__new__(made)


def request_state(cache: Any) -> CacheState | None:
    """What the loop remembers of the request whose prompt ``cache`` holds; None if there is none, or not of the loop.

    Raises:
        MethodError: the cache holds a cut prompt and nothing that says so: somebody copied its tensors.
    """
    if not isinstance(cache, DynamicCache) or not cached_length(cache):
        return None
    state: CacheState | None = getattr(cache, "accelerate_state", None)
    if state is not None:
        state.follow(cache)
    elif len({cache.get_seq_length(index) for index in range(len(cache.layers))}) > 1:
        raise MethodError(
            "the layers of this cache differ in length, and nothing on it says what they hold. Copy caches as a whole "
            "(copy.deepcopy), not their tensors, and do not go on with one whose first call failed."
        )
    return state


def check_cache(cache: Any, name: str) -> None:
    """MethodError unless the decoder loop can work on ``cache`` (None: it makes one)."""
    if cache is not None and not isinstance(cache, DynamicCache):
        raise MethodError(
            f"{name} needs a DynamicCache (layers may differ in length), got {type(cache).__name__}; do not set "
            "cache_implementation."
        )
