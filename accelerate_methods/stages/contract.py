"""What a stage may give back: authors of methods are told at once, in terms of the contract.

Types, dtypes and shapes are looked at always. Values (indices in range, each once, in order) are looked at where that
costs nothing: on the CPU. On a GPU it would mean waiting for the device in every request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accelerate_methods.stages.errors import MethodError

if TYPE_CHECKING:
    from accelerate_methods.stages.compress import VisualItem
    from accelerate_methods.stages.views import Views


ORDERS = ("layout", "given")
NEWLINES = ("closing", "all", "behind", "last", "each")


def check_compressed(method: str, compressed: Any, item: VisualItem) -> None:
    """
    Raises:
        MethodError: ``compressed`` is no ``Compressed``, or does not fit the item.
    """
    where = f"{method}.compress"
    _kind(where, compressed, "Compressed", "for a plain selection: selection(item, indices)")
    source, width = compressed.source, item.features.shape[-1]
    if source is None:
        count = _tokens(where, compressed.tokens, width)
    else:  # chosen rows that are not copied yet
        _tokens(where, source[0], width)
        count = source[1].shape[0]
    if not count:
        raise MethodError(f"{where}: nothing is left of the {item.modality}; at least one token has to stay.")
    for name, allowed in (("order", ORDERS), ("newlines", NEWLINES)):
        value = getattr(compressed, name)
        if value not in allowed:
            raise MethodError(f"{where}: {name} {value!r} is none of {', '.join(map(repr, allowed))}.")
    _indices(where, "positions", compressed.positions, (count,), item.length, "rows of the item's layout")
    _owner(where, compressed.owner, (item.num_frames, item.tokens_per_frame), count)


def check_kept(kept: Any, total: int) -> None:
    """
    Raises:
        MethodError: ``kept`` is no list of different token indices of an item with ``total`` tokens.
    """
    where = "selection()"
    count = kept.shape[0] if isinstance(kept, Tensor) and kept.ndim == 1 else 1
    hint = "; of a mask: mask.flatten().nonzero().squeeze(1)"
    _indices(where, "kept", kept, (count,), total, "indices frame*N + token", hint=hint)
    if kept.device.type == "cpu" and torch.unique(kept).shape[0] != count:
        raise MethodError(f"{where}: kept names a token twice.")


def check_views(method: str, compressed: Any, views: Views) -> None:
    """
    Raises:
        MethodError: ``compressed`` is no ``CompressedViews``, or does not fit the views.
    """
    where = f"{method}.compress_views"
    _kind(where, compressed, "CompressedViews", "or None, which leaves the image as it is")
    count = _tokens(where, compressed.tokens, views.features.shape[-1])
    _indices(where, "view", compressed.view, (count,), views.num_views, "views")
    _indices(where, "patch", compressed.patch, (count,), views.tokens_per_view, "patches of a view", low=-1)
    _owner(where, compressed.owner, (views.num_views, views.tokens_per_view), count)


def check_selection(method: str, selection: Any, batch: int, length: int) -> None:
    """
    Raises:
        MethodError: ``selection`` is no ``Selection``, or does not fit the [batch, length] rows of the layer.
    """
    where = f"{method}.prefill"
    _kind(where, selection, "Selection", "or None, which drops nothing; of a mask [B, L]: Selection.from_mask(mask)")
    indices = selection.indices
    count = indices.shape[1] if isinstance(indices, Tensor) and indices.ndim == 2 else 1
    _indices(where, "indices", indices, (batch, max(count, 1)), length, "rows of the layer")
    valid = selection.valid
    if valid is not None and not _is_mask(valid, indices.shape):
        shape = list(indices.shape)
        raise MethodError(f"{where}: valid must be a bool tensor {shape} like indices, got {_what(valid)}.")
    if selection.order not in ORDERS:
        raise MethodError(f"{where}: order {selection.order!r} is neither 'layout' nor 'given'.")
    if selection.owner is not None:
        what = "rows that go on, -1 where none holds one of the layer"
        _indices(where, "owner", selection.owner, (batch, length), indices.shape[1], what, low=-1)
    if indices.device.type == "cpu" and selection.order == "given":
        taken = indices if valid is None else indices.masked_fill(~valid, length)
        sorted_rows = taken.sort(dim=1).values
        if bool(((sorted_rows[:, 1:] == sorted_rows[:, :-1]) & (sorted_rows[:, 1:] < length)).any()):
            raise MethodError(f"{where}: indices name a row twice.")
    elif indices.device.type == "cpu":
        rising = indices[:, 1:] > indices[:, :-1]
        if not bool((rising if valid is None else rising | ~valid[:, :-1]).all()):
            raise MethodError(f"{where}: indices must rise from row to row, each only once.")


def check_visible(method: str, keep: Any, shape: tuple[int, int]) -> None:
    """
    Raises:
        MethodError: ``keep`` is neither None nor a bool mask [B, S] over the keys.
    """
    if keep is not None and not _is_mask(keep, shape):
        raise MethodError(
            f"{method}.decode must return a bool mask {list(shape)}, True at the keys that the step sees, or None for "
            f"all of them; got {_what(keep)}."
        )


def check_merge(method: str, merge: Any, hidden: Tensor, special: int) -> None:
    """
    Raises:
        MethodError: ``merge`` is no ``Merge``, or does not fit the [V, T, C] tokens of the block.
    """
    where = f"{method}.encode"
    _kind(where, merge, "Merge", "or None, which leaves the tokens of the block")
    (views, length, width), tokens = hidden.shape, merge.hidden
    fits = isinstance(tokens, Tensor) and tokens.ndim == 3 and tokens.dtype == hidden.dtype
    if not fits or (tokens.shape[0], tokens.shape[2]) != (views, width) or not special < tokens.shape[1] <= length:
        raise MethodError(
            f"{where}: hidden must be {str(hidden.dtype).removeprefix('torch.')} [{views}, T', {width}] with "
            f"{special} < T' <= {length}, got {_what(tokens)}."
        )
    count = tokens.shape[1]
    _indices(where, "owner", merge.owner, (views, length), count, "tokens that go on, -1 where none holds one", low=-1)
    _indices(where, "source", merge.source, (views, count), length, "tokens of the block, -1 for a new one", low=-1)
    if merge.sizes is not None and tuple(merge.sizes.shape) != (views, count):
        raise MethodError(f"{where}: sizes must be [{views}, {count}], got {_what(merge.sizes)}.")
    kept = torch.arange(special, device=merge.source.device)
    if merge.source.device.type == "cpu" and not bool((merge.source[:, :special] == kept).all()):
        raise MethodError(f"{where}: the {special} special tokens must stay in front.")


def check_stays(method: str, kept: Any, batch: int, entries: int) -> None:
    """
    Raises:
        MethodError: ``kept`` is no ``Kept``, or does not fit the [batch, entries] of a cache.
    """
    where = f"{method}.evict"
    _kind(where, kept, "Kept", "or None, which evicts nothing")
    indices, valid = kept.indices, kept.valid
    alike = isinstance(indices, Tensor) and indices.ndim == 1
    count = indices.shape[-1] if isinstance(indices, Tensor) and indices.ndim in (1, 2) else 1
    _indices(where, "indices", indices, (count,) if alike else (batch, count), entries, "entries of the cache")
    if valid is not None and not _is_mask(valid, (batch, count)):
        raise MethodError(f"{where}: valid must be a bool tensor [{batch}, {count}], got {_what(valid)}.")
    if indices.device.type == "cpu":
        rising = indices[..., 1:] > indices[..., :-1]
        if not bool((rising if valid is None else rising | ~valid[:, :-1]).all()):
            raise MethodError(f"{where}: indices must rise from entry to entry, each only once.")


def _is_mask(value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bool and value.shape == shape


def _kind(where: str, value: Any, name: str, hint: str) -> None:
    if type(value).__name__ != name:
        raise MethodError(f"{where} must return {name} ({hint}), got {_what(value)}.")


def _tokens(where: str, tokens: Any, width: int) -> int:
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.shape[1] != width or not tokens.is_floating_point():
        raise MethodError(f"{where}: tokens must be floating point [K, {width}], got {_what(tokens)}.")
    return tokens.shape[0]


def _indices(
    where: str, name: str, value: Any, shape: tuple[int, ...], end: int, what: str, low: int = 0, hint: str = ""
) -> None:
    whole = isinstance(value, Tensor) and not (value.is_floating_point() or value.dtype == torch.bool)
    if not whole or tuple(value.shape) != shape:
        raise MethodError(f"{where}: {name} must be integers {list(shape)} ({what}{hint}), got {_what(value)}.")
    if value.device.type == "cpu" and value.numel() and not bool(((value >= low) & (value < end)).all()):
        first = value[(value < low) | (value >= end)][0].item()
        raise MethodError(f"{where}: {name} holds {first}; {what} are counted from {low} to {end - 1}.")


def _owner(where: str, owner: Any, shape: tuple[int, int], count: int) -> None:
    _indices(where, "owner", owner, shape, count, "output tokens, -1 where none holds an original one", low=-1)


def _what(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return "None" if value is None else type(value).__name__
