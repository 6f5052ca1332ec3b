"""Evictions: entries leave the caches of the layers for good, and what is remembered of the request follows.

A method says which entries stay (:class:`.decode.EvictMethod`); keys and values of the others are freed. Lengths are
known from shapes, so that nothing waits for the device, and layers that hold the same tokens are asked about once.

Positions "in the cache". A rotary embedding knows differences of positions only. So when entries between the first and
the last ones go, the few first ones move up to the last ones, which stay where they are, and tokens go on from there:
the same attention as with all keys numbered anew, without rotating the cache in every step. Where the first ones were
before is kept, so that rounding does not add up in half precision, and every few thousand tokens the numbers start
again at zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from accelerate_methods.engine.cache_state import CacheState, MovedUp
from accelerate_methods.engine.cached_keys import (
    cached_length,
    check_in_reach,
    check_whole,
    gather_keys,
    grown,
    replace_entries,
)
from accelerate_methods.engine.devices import moved
from accelerate_methods.engine.layers import DecoderLayers, rotated
from accelerate_methods.stages.contract import check_stays
from accelerate_methods.stages.decode import EvictMethod, EvictStep, Kept
from accelerate_methods.stages.errors import MethodError

_ANSWER, _DRAFTS = "accelerate_answer", "accelerate_drafts"  # attributes of a cache, see below
#: positions "in the cache" may run so far ahead of the place in the cache: the finer float32 angles are, the better
_AHEAD = 4096
#: where no more than one of so many entries goes, its memory may wait for the next token
_SPARE = 8
#: rotary tables that depend on the largest position of a call
_MOVING_TABLES = ("dynamic", "longrope")


def expect_answer(cache: Any, most: int | None, total: int) -> None:
    """``generate`` begins on ``cache``: the next call is a prompt, whatever its length.

    Args:
        most: tokens that it may add behind the prompt, None if only ``total`` is known.
        total: how long the whole sequence may become, as the caller counts it.
    """
    if isinstance(cache, DynamicCache):
        setattr(cache, _ANSWER, (most, total - cache.get_seq_length()))
        setattr(cache, _DRAFTS, False)


def expect_drafts_on(cache: Any) -> None:
    """Until the next ``generate``, several tokens in one call on ``cache`` are drafts."""
    if isinstance(cache, DynamicCache):
        setattr(cache, _DRAFTS, True)


class Evictions:
    """What a method evicts before and after one call of the decoder, see :meth:`around`."""

    @classmethod
    def around(
        cls, method: Any, layers: DecoderLayers, cache: Any, real: Tensor | None, hidden: Tensor, layout: Any
    ) -> Evictions | None:
        """None where nothing can be evicted.

        Args:
            method: of the decode stage, or None.
            hidden: [B, q, D] tokens of the call; real: [B, q] False at padding among them, or None.
            layout: of a first prompt (:class:`.prompt.PromptLayout`), or None.
        """
        if cache is None or not isinstance(method, EvictMethod):
            return None
        visual = layout is not None and any(layout.only(method.modalities).spans)
        return cls(method, layers, cache, hidden.shape[1], real, visual)

    def __init__(
        self, method: EvictMethod, layers: DecoderLayers, cache: DynamicCache, new: int, real: Tensor | None,
        visual: bool,
    ):  # fmt: skip
        self._method, self._layers, self._cache, self._new, self._real = method, layers, cache, new, real
        self.state: CacheState | None = getattr(cache, "accelerate_state", None)
        past = cached_length(cache)
        if past and self.state is None:
            if method.acts_on_text:
                raise MethodError(
                    f"this cache was filled before {method.name} was attached, or by another model; start with a new "
                    "cache."
                )
            visual = False
        self._acts = method.acts_on_text or (self.state.has_visual if past and self.state else visual)
        #: whether tokens stand at places in the cache
        self.placed = self._acts and method.cache_positions != "original"
        answer = cache.__dict__.pop(_ANSWER, None)
        most, total = answer or (0, 0)
        self._reserved = max(0, total - new) if most is None else most
        step = answer is None and (new == 1 or getattr(cache, _DRAFTS, False))
        self._call = "prompt" if not past else "step" if step else "turn"
        if self.placed:
            self._check(visual)
        if past and self._acts and self.state.placed != self._standing:
            raise MethodError(
                f"{method.name} numbers tokens in another way than was done when this cache was filled: by their place "
                "in the cache, or in the prompt. Start with a new cache."
            )

    @property
    def _standing(self) -> str:
        """How tokens stand at places in the cache, "" if they do not."""
        return self._method.cache_positions if self.placed else ""

    def _check(self, visual: bool) -> None:
        rope = getattr(self._layers.config, "rope_parameters", None) or {}
        name = self._method.name
        if rope.get("rope_type") in _MOVING_TABLES:
            raise MethodError(
                f"{name} cannot number tokens by their place in the cache on this model: its rotary tables "
                f"({rope['rope_type']}) change with the length of a sequence. Keep original positions."
            )
        if visual and "mrope_section" in rope:
            raise MethodError(
                f"{name} cannot number the tokens of images and videos by their place in the cache on this model: "
                "they have three coordinates each (M-RoPE). Keep original positions."
            )

    def positions(self, device: torch.device) -> Tensor:
        """[B or 1, new] of the call's tokens, where they stand at places in the cache."""
        start = 0 if self._call == "prompt" else moved(self.state.next_position, device)
        if self._real is None:
            return start + torch.arange(self._new, device=device)[None]
        return start + (self._real.cumsum(1) - 1).clamp(min=0)

    # -- one moment --------------------------------------------------------------------------------------------------

    def before(self) -> None:
        """Make room for the call; not on an empty cache."""
        if self._call != "prompt":
            self._run("before", coming=self._new, reserved=self._reserved)

    def after(self) -> None:
        """The call is done."""
        self.state = getattr(self._cache, "accelerate_state", None)
        if self.state is None:
            return
        if self._call == "prompt":
            self.state.placed = self._standing
        self._run("after")

    def _run(self, when: str, coming: int = 0, reserved: int = 0) -> None:
        if not self._acts:
            return
        state, cache = self.state, self._cache
        held, position, least = cached_length(cache), state.next_position, None
        for group in self._groups():
            step = self._step(group, when, coming, reserved)
            kept = self._method.evict(step)
            if kept is None:
                continue
            check_stays(self._method.name, kept, len(step.visual), step.entries)
            real = self._cut(group, step, kept)
            least = real if least is None else least
        if least is None:
            return
        if self._method.cache_positions == "entered":
            position = position.new_zeros(position.shape) + least
        state.evicted(cache, held, position)
        if self.placed and self._method.cache_positions == "cache" and state.moved.most > _AHEAD:
            self._start_again()

    def _groups(self) -> list[list[int]]:
        """Layers that hold the same tokens on the same device; what is known of them is known once."""
        groups: list[list[int]] = []
        before = None
        for index, known in enumerate(self.state.layers):
            this = (self._cache.get_seq_length(index), id(known.rows), known.visual.device)
            if this == before:
                groups[-1].append(index)
            else:
                groups.append([index])
            before = this
        return groups

    def _step(self, group: list[int], when: str, coming: int, reserved: int) -> EvictStep:
        known, entries = self.state.layers[group[0]], self._cache.get_seq_length(group[0])
        arriving = None if self._real is None or not coming else self._real.sum(1, keepdim=True)
        return EvictStep(
            when=when,
            call=self._call,
            layers=group,
            entries=entries,
            visual=grown(known.visual, entries, 0, False),
            valid=None if known.valid is None else grown(known.valid, entries, 0, True),
            coming=coming,
            arriving=moved(arriving, known.visual.device),
            reserved=reserved,
        )

    # -- the entries -------------------------------------------------------------------------------------------------

    def _cut(self, group: list[int], step: EvictStep, kept: Kept) -> Tensor | int:
        """Leave ``kept`` of the layers' caches; returns how many real entries are left, a number or [B, 1]."""
        check_in_reach(self._cache)
        indices, valid = kept.indices, _valid(step, kept)
        count = indices.shape[-1]
        visual = step.visual[:, indices] if indices.ndim == 1 else step.visual.gather(1, indices)
        visual = visual if valid is None else visual & valid
        for index in group:
            entry, known = self._cache.layers[index], self.state.layers[index]
            check_whole(entry.keys, step.entries)
            leave = closed_up if self._may_overwrite(step, kept, entry.keys) else remaining
            replace_entries(entry, leave(entry.keys, kept), leave(entry.values, kept))
            known.visual, known.valid = visual, valid
        left = count if valid is None else valid.sum(1, keepdim=True)
        if self._method.cache_positions == "cache" and self.placed:
            self._move_up(group, step, kept, left)
        return left

    @staticmethod
    def _may_overwrite(step: EvictStep, kept: Kept, keys: Tensor) -> bool:
        """Whether the cache need not be copied once more: a few entries go, of tensors that this call has just made."""
        gone = step.entries - kept.indices.shape[-1]
        alike = kept.first is not None and kept.indices.ndim == 1
        fresh = step.when == "after" and not keys.requires_grad
        fresh = fresh and keys.is_inference() == torch.is_inference_mode_enabled()
        return alike and fresh and gone * _SPARE <= step.entries

    # -- positions in the cache --------------------------------------------------------------------------------------

    def _move_up(self, group: list[int], step: EvictStep, kept: Kept, left: Tensor | int) -> None:
        """The entries of ``group`` that stay become neighbours again: all of them end where the last one stands."""
        moves = self.state.moved
        gone = step.real - left
        if not isinstance(gone, Tensor):
            gone = torch.full((step.visual.shape[0], 1), gone, device=step.visual.device)
        before = torch.zeros_like(gone) if moves.by is None else moved(moves.by, gone.device)
        if group[0] == 0:
            moves.by, moves.most = before + gone, moves.most + step.entries - kept.indices.shape[-1]
        elif moves.by is not None:
            before = before - gone  # layer 0 has counted this already
        if kept.first is None:
            moves.first.pop(group[0], None)
            self._turn(group, slice(None), _moved_by(step, kept, gone))
            return
        ends = slice(0, kept.first)
        now = torch.cat([self._cache.layers[index].keys[:, :, ends] for index in group], dim=1)
        were = moves.first.get(group[0])
        if were is None or were.shape != now.shape:
            were = self._rotated(now, -before)
        else:  # a sample that had room until now has its first entries where they were
            were = torch.where((before > 0)[:, :, None, None], were, now)
        moves.first[group[0]] = were
        turned = self._rotated(were, before + gone)
        for index, part in zip(group, turned.chunk(len(group), dim=1), strict=True):
            self._cache.layers[index].keys[:, :, ends] = part

    def _turn(self, group: list[int], where: slice, by: Tensor) -> None:
        """Move the entries ``where`` of some layers by so many positions, [B, 1] or [B, K]."""
        for index in group:
            keys = self._cache.layers[index].keys
            keys[:, :, where] = self._rotated(keys[:, :, where], by)

    def _rotated(self, keys: Tensor, by: Tensor) -> Tensor:
        """[B, G, S, d] keys turned further by [B, 1 or S] positions, worked out in float32."""
        cos, sin = self._layers.rotary(keys.new_empty(0, dtype=torch.float32), by)
        scale = (cos.square() + sin.square()).sqrt()  # what a scaled rope multiplies with is in the keys already
        return rotated(keys.float(), cos / scale, sin / scale).to(keys.dtype)

    def _start_again(self) -> None:
        """Positions go back to the places in the cache, so that they do not grow without end."""
        state, moves = self.state, self.state.moved
        for group in self._groups():
            by = moved(moves.by, self._cache.layers[group[0]].keys.device)
            were = moves.first.get(group[0])
            count = 0 if were is None else were.shape[2]
            self._turn(group, slice(count, None), -by)
            for index, part in zip(group, () if were is None else were.chunk(len(group), dim=1), strict=False):
                keys = self._cache.layers[index].keys
                keys[:, :, :count] = torch.where((by > 0)[:, :, None, None], part, keys[:, :, :count])
        state.marks[-1].following = state.marks[-1].following - moved(moves.by, state.marks[-1].following.device)
        state.moved = MovedUp()


def _valid(step: EvictStep, kept: Kept) -> Tensor | None:
    """[B, K] False at padding among what stays, None without any."""
    if step.valid is None:
        return kept.valid
    left = step.valid[:, kept.indices] if kept.indices.ndim == 1 else step.valid.gather(1, kept.indices)
    return left if kept.valid is None else left & kept.valid


def remaining(states: Tensor, kept: Kept) -> Tensor:
    """What stays of states [B, G, S, d], in memory of its own."""
    indices = moved(kept.indices, states.device)
    if indices.ndim == 2:
        return gather_keys(states, indices)
    if kept.first is None:
        return states.index_select(2, indices)
    last = states.shape[2] - (indices.shape[0] - kept.first)
    return torch.cat([states[:, :, : kept.first], states[:, :, last:]], dim=2)


def closed_up(states: Tensor, kept: Kept) -> Tensor:
    """The same as a view of ``states``, in which the first entries are moved up to the last ones.

    What lies in front of them is freed when the next token is added.
    """
    gone = states.shape[2] - kept.indices.shape[0]
    states[:, :, gone : gone + kept.first] = states[:, :, : kept.first].clone()
    return states[:, :, gone:]


def _moved_by(step: EvictStep, kept: Kept, gone: Tensor) -> Tensor:
    """[B, K] how far each entry that stays moves up, the last one not at all."""
    indices = kept.indices.expand(step.visual.shape[0], -1)
    valid = _valid(step, kept)
    was = indices if step.valid is None else (step.valid.cumsum(1) - 1).gather(1, indices)
    now = torch.arange(indices.shape[1], device=indices.device) if valid is None else valid.cumsum(1) - 1
    return now - was + gone
