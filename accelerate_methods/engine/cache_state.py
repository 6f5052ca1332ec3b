"""What the loop remembers of a request beside its KV cache, and how that follows what is done to the cache.

What has to survive from prefill to decode: padding and visual masks of every layer's cache, positions, what a decode
method keeps, what was evicted. Each layer's part is on the device of that layer.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from accelerate_methods.engine.cached_keys import (
    cached_length,
    check_in_reach,
    check_whole,
    gather_keys,
    replace_entries,
)
from accelerate_methods.engine.devices import moved
from accelerate_methods.stages.errors import MethodError

#: decode steps whose state is kept one by one: a decode method's memory can be taken back by as many
_STEPS_BACK = 64


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
class Mark:
    """Positions of one call.

    Attributes:
        before: entries that layer 0 had cached before it.
        following: [B, q] position of the token behind each of its rows.
    """

    before: int
    following: Tensor


@dataclasses.dataclass
class MovedUp:
    """Entries that follow the others where positions are places in the cache, see :mod:`.eviction`.

    Attributes:
        by: [B, 1] how far the first entries have moved, or None; most: a bound of it.
        first: first layer of a group -> [B, layers * G, A, d] keys of its first entries before they moved.
    """

    by: Tensor | None = None
    most: int = 0
    first: dict[int, Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class CacheState:
    """What the loop remembers of a request beside its cache.

    Lengths are those of layer 0. Layers may differ in length after a prefill method, but whatever is added behind the
    prompt, or taken away again, is as much in all of them.

    Attributes:
        has_visual: whether there is anything for a decode method to act on.
        length: rows of the prompt.
        name: of the pipeline that made the cache.
        layers: per decoder layer, what its cache holds.
        memory: what the decode method keeps between steps.
        base: entries right behind the prompt.
        dropped: rows of the prompt, as the caller counts them, that layer 0 does not hold.
        seen: entries when the loop last saw the cache; fewer are there now if it was cropped since.
        marks: where positions were said: the prompt and later turns. In between they are counted.
        steps: (entries, memory) after the last decode steps, for crops.
        forgets: whether ``steps`` does not reach back to the prompt.
        floor: entries right after the last eviction, in view of everything that stood there then.
        placed: how tokens stand at places in the cache (``EvictMethod.cache_positions``), "" if they do not.
        moved: what :mod:`.eviction` knows of entries that have moved up.
    """

    has_visual: bool
    length: int
    name: str = ""
    layers: list[LayerCache] = dataclasses.field(default_factory=list)
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)
    base: int = 0
    dropped: int = 0
    seen: int = 0
    marks: list[Mark] = dataclasses.field(default_factory=list)
    steps: list[tuple[int, dict[str, Any]]] = dataclasses.field(default_factory=list)
    forgets: bool = False
    floor: int = 0
    placed: str = ""
    moved: MovedUp = dataclasses.field(default_factory=MovedUp)
    _lost: bool = False
    _used: bool = False

    # -- the cache and its state -------------------------------------------------------------------------------------

    def begin(self, cache: DynamicCache, following: Tensor, full: int) -> None:
        """``cache`` holds the prompt now.

        Args:
            following: [B, length] position of the token behind each row of the prompt.
            full: rows of the prompt as the caller counts them.
        """
        self.base = self.seen = cached_length(cache)
        self.dropped = full - self.base
        if self.base != following.shape[1]:  # layer 0 was cut: which rows it holds matters to nobody
            following = following[:, -1:]
        self.marks = [Mark(self.base - following.shape[1], following)]

    @property
    def cut(self) -> bool:
        """Whether layers hold different rows of the prompt."""
        return any(known.rows is not None for known in self.layers)

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """While the loop runs on the cache, which nothing else may if the prompt is not whole."""
        self._used = True
        try:
            yield
        finally:
            self._used = False

    def check_used(self) -> None:
        if not self._used and (self.dropped or self.cut):
            raise MethodError(
                f"this cache holds a prompt that {self.name} has cut: the model can go on with it only while "
                f"{self.name} is attached. Start with a new cache."
            )

    # -- positions ---------------------------------------------------------------------------------------------------

    @property
    def next_position(self) -> Tensor:
        """[B, 1] position of the next token."""
        return self.position(self.seen)

    def position(self, entries: int) -> Tensor:
        """[B, 1] position of the token that comes behind so many entries."""
        mark = self.marks[-1]
        behind = entries - mark.before - mark.following.shape[1]
        return mark.following[:, -1:] + behind

    def ran(self, past: int, new: int, following: Tensor | None) -> None:
        """A call with ``new`` rows on top of ``past`` entries is done; ``following`` [B, new] if it said positions."""
        self.seen = past + new
        if following is None:
            return
        self.marks.append(Mark(past, following))
        if len(self.marks) > _STEPS_BACK:
            self._join_marks()

    def _join_marks(self) -> None:
        """Marks that follow each other, as those of decode steps do, become one."""
        runs: list[list[Mark]] = []
        for mark in self.marks:
            last = runs[-1][-1] if runs else None
            if last is not None and last.before + last.following.shape[1] == mark.before:
                runs[-1].append(mark)
            else:
                runs.append([mark])
        self.marks = [
            run[0] if len(run) == 1 else Mark(run[0].before, _joined([mark.following for mark in run])) for run in runs
        ]

    def evicted(self, cache: DynamicCache, before: int, following: Tensor) -> None:
        """Layer 0 held ``before`` entries until now; ``following`` [B, 1] is the position of the next token."""
        entries = cached_length(cache)
        self.dropped += before - entries
        self.marks = [Mark(entries - 1, following)]
        self.base = self.seen = self.floor = entries

    # -- crops -------------------------------------------------------------------------------------------------------

    def check_crop(self, entries: int) -> None:
        """MethodError if so many entries would be a cut prompt without its end, or reach back behind an eviction."""
        if entries < self.floor:
            raise MethodError(
                f"{self.name} has evicted entries of this cache, in view of all that it held then: of the {self.seen} "
                f"that are left, only the {self.seen - self.floor} that came since can be cropped. Start with a new "
                "cache."
            )
        if entries < self.base and self.cut:
            raise MethodError(
                f"{self.name} has dropped tokens inside the model, in view of the whole prompt: the last "
                f"{self.base - entries} tokens of the prompt itself cannot be cropped. Start with a new cache."
            )

    def follow(self, cache: DynamicCache) -> None:
        """Forget what has been cropped since the loop last saw the cache."""
        entries = cached_length(cache)
        if entries >= self.seen:
            return
        self.check_crop(entries)
        while self.marks[-1].before >= entries:
            self.marks.pop()
        mark = self.marks[-1]
        mark.following = mark.following[:, : entries - mark.before]
        for index, known in enumerate(self.layers):
            left = cache.get_seq_length(index)
            if known.visual.shape[1] > left:
                known.visual = known.visual[:, :left]
                known.valid = None if known.valid is None else known.valid[:, :left]
        self.base, self.seen = min(self.base, entries), entries
        if self.memory:
            while self.steps and self.steps[-1][0] > entries:
                self.steps.pop()
            self.forgets &= entries > self.base
            self._lost = self.forgets and not self.steps
            self.memory = dict(self.steps[-1][1]) if self.steps else {}

    # -- what a decode method keeps ----------------------------------------------------------------------------------

    def recalled(self) -> dict[str, Any]:
        """The memory for the next decode step."""
        if self._lost:
            raise MethodError(
                f"{self.name} decides in every step by the step before. The cache was cropped further back than this "
                f"is kept ({_STEPS_BACK} steps, fewer if its batch was changed). Crop to the end of the prompt instead."
            )
        return self.memory

    def stepped(self) -> None:
        """A decode step has just changed the memory."""
        self.steps.append((self.seen, dict(self.memory)))
        if len(self.steps) > _STEPS_BACK:
            del self.steps[0]
            self.forgets = True

    # -- the batch ---------------------------------------------------------------------------------------------------

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """The rows of the batch become others: ``change`` [B, ...] -> [B', ...]."""
        self._join_marks()
        batch = self.marks[0].following.shape[0]
        done: dict[int, Tensor] = {}

        def changed(value: Any) -> Any:  # what layers share, and compare by identity, they go on sharing
            if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != batch:
                return value
            if id(value) not in done:
                done[id(value)] = change(value)
            return done[id(value)]

        self.layers = [LayerCache(*map(changed, (k.visual, k.valid, k.rows, k.shift))) for k in self.layers]
        self.marks = [Mark(mark.before, changed(mark.following)) for mark in self.marks]
        self.memory = {name: changed(value) for name, value in self.memory.items()}
        first = {group: changed(keys) for group, keys in self.moved.first.items()}
        self.moved = MovedUp(changed(self.moved.by), self.moved.most, first)
        if self.memory:  # in beam search this is every step: what was before is not worth it
            self.steps, self.forgets = [(self.seen, dict(self.memory))], True

    # -- the prompt --------------------------------------------------------------------------------------------------

    def trim(self, cache: DynamicCache, layers: int, picked: Tensor, left: LayerCache) -> None:
        """Cut the first ``layers`` layers of ``cache`` to entries ``picked`` [B, K], of which ``left`` is known."""
        check_in_reach(cache)
        for index in range(layers):
            entry, known = cache.layers[index], self.layers[index]
            device = entry.keys.device
            check_whole(entry.keys, known.visual.shape[1])
            here = moved(picked, device)
            replace_entries(entry, gather_keys(entry.keys, here), gather_keys(entry.values, here))
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


def _joined(parts: list[Tensor]) -> Tensor:
    """[B, q] each -> [B, sum], on the device of the first."""
    return torch.cat([moved(part, parts[0].device) for part in parts], dim=1)
