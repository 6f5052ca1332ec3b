"""The KV cache as the loop counts it: nothing else takes entries away while the model runs, or it does no harm.

kvpress and hooks of its kind leave the best entries of a layer in its cache, other ones in each head, as soon as the
layer has run. A prompt that was compressed in front of the decoder may be pruned like that while it is computed: the
loop remembers nothing of its entries one by one. All else would be wrong without a word.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate_methods.stages.errors import MethodError


@contextlib.contextmanager
def undisturbed(loop: Any, index: int) -> Iterator[None]:
    """Block in which layer ``index`` of ``loop`` runs on all of its rows.

    Raises:
        MethodError: it has not as many entries more than before, where that cannot be right.
    """
    if loop.cache is None:
        yield
        return
    before = loop.cache.get_seq_length(index)
    yield
    entries, expected = loop.cache.get_seq_length(index), before + loop.rows.count
    why = "" if entries == expected else _why_not(loop)
    if why:
        raise MethodError(
            f"layer {index} has {entries} entries in its cache where {expected} belong: something else compresses the "
            f"cache while the model runs (kvpress, a forward hook). {loop.pipeline.name} {why}"
        )


def _why_not(loop: Any) -> str:
    """Why entries must not be missing now; empty if they may."""
    if loop.past:
        return "can be combined with that while the prompt is computed, not in later steps."
    if loop.decodes or loop.evictions is not None or any(map(any, loop.spans)):
        return "acts inside the language model and needs the whole cache; a method in front of it can be combined."
    if loop.rows.valid is not None:
        return "can be combined with that for prompts without padding only."
    return ""
