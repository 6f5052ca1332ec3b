"""The one loop through the blocks of a vision encoder under an encode method, for every tower.

A tower says how its blocks are built (:class:`.encoder_block.EncoderBlock`): projections, what follows the attention,
the MLP, all of them the model's own modules. Attention is PyTorch's ``scaled_dot_product_attention``; the sizes of
merged tokens go in as a mask with one number per key. No attention map is formed but the rows that a method asks for.
Without an encode method nothing of this runs.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from accelerate_methods.engine.encoder_attention import Encoded, signals_of_layers
from accelerate_methods.engine.encoder_block import (
    BlockAttention,
    ClipBlock,
    EncoderBlock,
    Padding,
    from_groups,
    per_group,
    per_patch,
    to_groups,
)
from accelerate_methods.ops.select import pick_rows
from accelerate_methods.stages.contract import check_merge
from accelerate_methods.stages.encode import EncodeMethod, EncodeStep, Merge, TokenMap
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.frames import (
    FrameMap,
    FrameMergeMethod,
    FrameStep,
    check_frame_merge,
    mixed_in_turn,
    standing_rows,
)


@dataclasses.dataclass
class BlockInput:
    """What came into one block.

    Attributes:
        states: [V, S + M * u, C]; sizes: [V, S + M] patches of each token, None where attention does not count them.
        became: [V, M] token behind the last block that each has become, -1 if it left.
        mixings: of each video [T', T] what its frames have become since, None if none was merged.
    """

    states: Tensor
    sizes: Tensor | None
    became: Tensor
    mixings: list[Tensor] | None = None


@dataclasses.dataclass
class EncodedTokens:
    """What the last block gave.

    Attributes:
        hidden: [V, S + N * u, C], the S special tokens in front, u patches per token.
        special: S; unit: u.
        tokens: where the patches went.
        grid: whether every patch is in its place: nothing was merged, or the method wants them back.
        inputs: of the blocks whose inputs were asked for.
        frames: where the frames of each video went, None if no method merges frames; V then counts those that are left.
    """

    hidden: Tensor
    special: int
    unit: int
    tokens: TokenMap
    grid: bool = True
    inputs: dict[int, BlockInput] = dataclasses.field(default_factory=dict)
    frames: list[FrameMap] | None = None

    def __getitem__(self, views: slice) -> EncodedTokens:
        """Some of the views; where frames were merged all frames of one video, counted before that."""
        tokens = self.tokens
        if self.frames is not None:
            return self._video(views)
        sizes = None if tokens.sizes is None else tokens.sizes[views]
        inputs = {
            number: BlockInput(one.states[views], None if one.sizes is None else one.sizes[views], one.became[views])
            for number, one in self.inputs.items()
        }
        own = TokenMap(tokens.owner[views], tokens.stands[views], sizes)
        return dataclasses.replace(self, hidden=self.hidden[views], tokens=own, inputs=inputs)

    def rows_of(self, views: slice) -> tuple[int, slice]:
        """Where frames were merged: the video whose frames ``views`` were, and those that are left of it."""
        number = [0, *itertools.accumulate(video.before for video in self.frames)].index(views.start)
        first = sum(video.left for video in self.frames[:number])
        return number, slice(first, first + self.frames[number].left)

    def _video(self, views: slice) -> EncodedTokens:
        number, here = self.rows_of(views)
        inputs = {}
        for block, one in self.inputs.items():
            # frames behind the block, whose inputs they were
            counts = [m.left if one.mixings is None else one.mixings[i].shape[1] for i, m in enumerate(self.frames)]
            states = one.states.split(counts)[number]
            became, mixings = one.became[: len(states)], None if one.mixings is None else [one.mixings[number]]
            inputs[block] = BlockInput(states, None, became, mixings)
        own = TokenMap(self.tokens.owner[here], self.tokens.stands[here])
        return dataclasses.replace(
            self, hidden=self.hidden[here], tokens=own, inputs=inputs, frames=[self.frames[number]]
        )

    @property
    def carried(self) -> dict[str, Tensor]:
        """[V, N] what a method that merges frames has said of their tokens."""
        maps = self.frames or []
        names = dict.fromkeys(name for one in maps for name in one.values)
        return {name: torch.cat([one.values[name] for one in maps]) for name in names}

    def every_frame(self, values: Tensor) -> Tensor:
        """[V', ...] -> [V, ...] every frame that there was, a copy of the one that holds it."""
        return values if self.frames is None else standing_rows(self.frames, values)

    @property
    def output(self) -> Tensor:
        """[V, S + ..., C] what the model gets: the tokens, or every patch."""
        return self.full() if self.grid and self.frames is None else self.hidden

    def full(self) -> Tensor:
        """[V, S + P * u, C] with every patch in its place, a copy of the token that holds it; zeros where none does."""
        return restored(self.hidden, self.special, self.unit, self.tokens.owner)

    @torch.no_grad()
    def signals(self, layers: Sequence[Any], asked: Mapping[str, int]) -> dict[str, Tensor]:
        """:func:`.encoder_attention.signals_of_layers`, [V, N, ...] over the tokens that are left.

        Of tokens that were merged since, attention is that of all together, keys are their mean. Where every patch has
        returned, each has the signals of the token that holds it.
        """
        states = {number: one.states for number, one in self.inputs.items()}
        sizes = {
            number: per_patch(one.sizes, self.special, self.unit)
            for number, one in self.inputs.items()
            if one.sizes is not None
        }
        found = signals_of_layers(layers, states, asked, self.special, sizes)
        out = {}
        for name, value in found.items():
            value, since = per_group(value, 0, self.unit), self.inputs[asked[name]].mixings
            if since is not None:
                value = mixed_in_turn(value, since)
            value = self._carried(value, self.inputs[asked[name]].became, mean=value.ndim == 3)
            out[name] = self._on_patches(value) if self.grid else value
        return out

    def _on_patches(self, signal: Tensor) -> Tensor:
        owner = self.tokens.owner
        values = pick_rows(signal if signal.ndim == 3 else signal[..., None], owner.clamp(min=0))
        values = values.masked_fill((owner < 0)[..., None], 0)
        return values if signal.ndim == 3 else values[..., 0]

    def _carried(self, signal: Tensor, became: Tensor, mean: bool) -> Tensor:
        views, count = self.tokens.stands.shape
        values = (signal if signal.ndim == 3 else signal[..., None]).float()
        slot = torch.where(became < 0, count, became)[..., None]  # a spare slot takes those that left
        out = values.new_zeros(views, count + 1, values.shape[-1]).scatter_add_(1, slot.expand_as(values), values)
        if mean:
            members = values.new_zeros(views, count + 1, 1)
            out = out / members.scatter_add_(1, slot, torch.ones_like(values[..., :1])).clamp(min=1)
        out = out[:, :-1].to(signal.dtype)
        return out if signal.ndim == 3 else out[..., 0]


class BlockRun:
    """One request through the blocks of one tower.

    Args:
        blocks: those that run; depth: those that the encoder has.
        method: None for one that does not act on these views.
        special: special tokens in front of the patches; unit: patches that go on together.
        dense: tokens of a view that the language model gets without a method; None: one for each patch or group.
        dropout: of attention, in training.
        videos: frames of each video, where the views are those; None: of images.
    """

    def __init__(
        self, blocks: Sequence[EncoderBlock], method: EncodeMethod | None, *, depth: int, special: int = 0,
        unit: int = 1, dense: int | None = None, dropout: float = 0.0, videos: Sequence[int] | None = None,
    ):  # fmt: skip
        self.blocks, self.method, self.depth = blocks, method, depth
        self.special, self.unit, self.dense, self.dropout = special, unit, dense, dropout
        self.videos = videos if isinstance(method, FrameMergeMethod) else None
        self.chosen = frozenset() if method is None else acting_blocks(method, len(blocks))

    def __call__(
        self, hidden: Tensor, *, inputs: Collection[int] = (), outputs: Collection[int] = ()
    ) -> EncodedTokens:
        """
        Args:
            hidden: [V, S + P * u, C] input of the first block, the patches of a group behind each other.
            inputs: blocks whose inputs are wanted, for signals; their number: what the last one gives.
            outputs: blocks whose output is wanted too, with every patch in its place (``self.outputs``).
        """
        groups = (hidden.shape[1] - self.special) // self.unit
        index = torch.arange(groups, device=hidden.device).expand(len(hidden), -1)
        tokens, kept = TokenMap(index, index), {}
        frames = None if self.videos is None else [FrameMap.of(count) for count in self.videos]
        self.outputs: dict[int, Tensor] = {}
        for number, block in enumerate(self.blocks):
            weighted = tokens.sizes is not None and self.method.proportional
            if number in inputs:
                kept[number] = self._input(hidden, tokens)
            if number in self.chosen or weighted or block.taken_apart:
                attention = self._attention(block, hidden, tokens, weighted)
                hidden = block.attended(hidden, attention.output(self.dropout))
                merge = self._merge(number, hidden, attention, tokens, groups) if number in self.chosen else None
                if merge is not None:
                    hidden = from_groups(merge.hidden, self.special, self.unit)
                    tokens = followed(tokens, merge, self.special)
                    for one in kept.values():
                        one.became = _moved(one.became, _content(merge.owner, self.special))
                hidden = block.feed_forward(hidden)
                if frames is not None and number in self.chosen:
                    hidden, frames = self._merge_frames(number, hidden, attention, frames, kept)
                    index = index[: len(hidden)]
                    tokens = TokenMap(index, index)
            else:
                hidden = block.whole(hidden)
            if number in outputs:
                full = restored(hidden, self.special, self.unit, tokens.owner)
                self.outputs[number] = full if frames is None else standing_rows(frames, full)
        if len(self.blocks) in inputs:
            kept[len(self.blocks)] = self._input(hidden, tokens)
        if tokens.owner is index:
            return EncodedTokens(hidden, self.special, self.unit, tokens, inputs=kept, frames=frames)
        return self._arranged(EncodedTokens(hidden, self.special, self.unit, tokens, self.method.keeps_grid, kept))

    def _input(self, hidden: Tensor, tokens: TokenMap) -> BlockInput:
        weighted = tokens.sizes is not None and self.method.proportional
        became = torch.arange(tokens.stands.shape[1], device=hidden.device).expand(len(hidden), -1)
        return BlockInput(hidden.detach(), tokens.sizes if weighted else None, became)

    def _attention(self, block: EncoderBlock, hidden: Tensor, tokens: TokenMap, weighted: bool) -> BlockAttention:
        bias = per_patch(tokens.sizes.log(), self.special, self.unit) if weighted else None
        padding = None
        if block.windows is not None:
            here = block.windows.expand(len(hidden), -1).gather(1, tokens.places())
            counts = block.window_sizes
            padding = Padding(here, len(counts), max(counts), self.unit)
        return BlockAttention(block, block.project(hidden, tokens), bias, self.special, self.unit, padding)

    def _merge(
        self, number: int, hidden: Tensor, attention: BlockAttention, tokens: TokenMap, groups: int
    ) -> Merge | None:
        hidden = to_groups(hidden, self.special, self.unit)
        counts = number, len(self.blocks), self.depth, groups, self.dense or groups
        step = EncodeStep(attention, hidden, tokens.sizes, counts)
        merge = self.method.encode(step)
        if merge is not None:
            check_merge(self.method.name, merge, hidden, self.special)
        return merge

    def _merge_frames(
        self, number: int, hidden: Tensor, attention: BlockAttention, frames: list[FrameMap],
        kept: Mapping[int, BlockInput],
    ) -> tuple[Tensor, list[FrameMap]]:  # fmt: skip
        """[V, S + N * u, C] behind a block -> [V', ...], and where the frames of each video are now.

        Args:
            kept: inputs of the blocks so far, which remember what has become of their frames.
        """
        received = functools.cache(attention.received_attention)
        merges, counts = [], [video.left for video in frames]
        for count, end in zip(counts, itertools.accumulate(counts), strict=True):
            here = slice(end - count, end)
            step = FrameStep(number, len(self.blocks), hidden[here], self.special, lambda here=here: received()[here])
            merge = self.method.encode_frames(step)
            if merge is not None:
                check_frame_merge(self.method.name, merge, count)
            merges.append(merge)
        if not any(merges):
            return hidden, frames
        mixings = [torch.eye(n) if merge is None else merge.mixing for merge, n in zip(merges, counts, strict=True)]
        for one in kept.values():
            before = one.mixings or [torch.eye(count) for count in counts]
            one.mixings = [mixing.float() @ since for mixing, since in zip(mixings, before, strict=True)]
        after = [m if merge is None else m.after(merge) for m, merge in zip(frames, merges, strict=True)]
        return mixed_in_turn(hidden, mixings), after

    def _arranged(self, out: EncodedTokens) -> EncodedTokens:
        order = self.method.arrange(out.tokens)
        if order is None:
            return out
        tokens, special = out.tokens, self.special
        numbers = torch.arange(order.shape[1], device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, numbers)
        front = torch.arange(special, device=order.device).expand(len(order), -1)
        rows = torch.cat([front, order + special], dim=1)
        hidden = from_groups(pick_rows(to_groups(out.hidden, special, self.unit), rows), special, self.unit)
        arranged = TokenMap(
            owner=_moved(tokens.owner, rank),
            stands=tokens.stands.gather(1, order),
            sizes=None if tokens.sizes is None else tokens.sizes.gather(1, rows),
        )
        for one in out.inputs.values():
            one.became = _moved(one.became, rank)
        return dataclasses.replace(out, hidden=hidden, tokens=arranged)


def acting_blocks(method: EncodeMethod, num_blocks: int) -> frozenset[int]:
    """The blocks in which ``method`` acts.

    Raises:
        MethodError: it names one that does not run.
    """
    chosen = tuple(method.encode_blocks(num_blocks))
    wrong = [number for number in chosen if not 0 <= number < num_blocks]
    if wrong:
        raise MethodError(
            f"{method.name}: block {wrong[0]} of the vision encoder does not run; blocks are 0..{num_blocks - 1}."
        )
    return frozenset(chosen)


def followed(tokens: TokenMap, merge: Merge, special: int) -> TokenMap:
    """Where the patches are after one more merge."""
    source = merge.source[:, special:] - special
    stands = tokens.stands.gather(1, source.clamp(min=0))
    return TokenMap(
        owner=_moved(tokens.owner, _content(merge.owner, special)),
        stands=torch.where(source >= 0, stands, -1),
        sizes=merge.sizes,
    )


def _content(owner: Tensor, special: int) -> Tensor:
    """[V, T] owners -> [V, T - S] those of content tokens, counted without special ones."""
    return (owner[:, special:] - special).clamp(min=-1)


def _moved(owner: Tensor, to: Tensor) -> Tensor:
    """[V, P] owners, of which owner i has become ``to`` [V, N] (-1: it is gone)."""
    return torch.where(owner >= 0, to.gather(1, owner.clamp(min=0)), -1)


def restored(hidden: Tensor, special: int, unit: int, owner: Tensor) -> Tensor:
    """[V, S + N * u, C] tokens -> [V, S + P * u, C] every patch a copy of the token of ``owner`` [V, P], or zero."""
    content = hidden[:, special:].unflatten(1, (-1, unit)).flatten(2)
    full = pick_rows(content, owner.clamp(min=0)).masked_fill((owner < 0)[..., None], 0)
    return torch.cat([hidden[:, :special], full.unflatten(2, (unit, -1)).flatten(1, 2)], dim=1)


def run_clip(
    layers: Sequence[nn.Module], hidden: Tensor, method: EncodeMethod | None, *, depth: int, special: int,
    inputs: Collection[int] = (), forwards: Sequence[Any] | None = None, dense: int | None = None,
    videos: Sequence[int] | None = None,
) -> Encoded:  # fmt: skip
    """Layers of transformers' CLIP or SigLIP encoder under ``method``; the rest as in :class:`BlockRun`.

    Args:
        layers: those that run; hidden: [V, S + P, C] input of the first.
        forwards: their own, where something else has been put in their place.
    """
    blocks = [ClipBlock(layer, None if forwards is None else forwards[i]) for i, layer in enumerate(layers)]
    merged = BlockRun(blocks, method, depth=depth, special=special, dense=dense, videos=videos)(
        hidden, inputs=inputs
    )
    return Encoded(merged.output, special, None, {}, merged)
