"""A prompt of a transformers model, whose visual tokens already stand in place, without the tokens that were dropped.

transformers' processors repeat a placeholder id once per visual token, and the model overwrites their embeddings. So
the uncompressed prompt exists as embeddings [B, L, D]; here rows are taken out and replaced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from accelerate_methods.engine.prompt import PromptLayout
from accelerate_methods.engine.sequences import VisualSequence
from accelerate_methods.stages.compress import VisualItem
from accelerate_methods.stages.prefill import VisualSpan


@dataclasses.dataclass
class PromptItem:
    """One image or video of a prompt.

    Attributes:
        sample: row of the batch.
        rows: [item.length] row of the prompt at which each row of the item's layout stands, ascending. There may be
            text in between (timestamps between frames).
        start, end: first row and the one after the last, as host integers.
        item: its tokens and signals.
    """

    sample: int
    rows: Tensor
    start: int
    end: int
    item: VisualItem


@dataclasses.dataclass
class CutPrompt:
    """What goes to the decoder: [B, K] rows, padded on the left.

    Attributes:
        embeds: [B, K, D].
        source: [B, K] row of the uncompressed prompt that each row stands for.
        valid: [B, K] False at padding.
        positions: [B, K] or [R, B, K] position ids.
        next_position: [B, 1] where generated tokens go on.
        layout: what the decoder loop needs to know.
        rows: for each item the rows at which its tokens stand.
        full: rows of the uncompressed (padded) prompt; dense: real ones of each sample.
        full_positions: [B, L] the largest position id of each of them, -1 at padding.
        given: [B, L] the real ones as the caller padded them; None without padding.
    """

    embeds: Tensor
    source: Tensor
    valid: Tensor
    positions: Tensor
    next_position: Tensor
    layout: PromptLayout
    rows: list[Tensor]
    full: int
    dense: list[int]
    full_positions: Tensor
    given: Tensor | None

    def beyond(self, limit: int) -> Tensor:
        """[B, 2] rows at positions from ``limit`` on: of what goes to the decoder, and of the uncompressed prompt."""
        left = (_largest(self.positions) >= limit) & self.valid
        return torch.stack([left.sum(1), (self.full_positions >= limit).sum(1)], dim=1)

    def taken(self, rows: Tensor) -> Tensor:
        """[B, L, D] rows of the uncompressed prompt -> [B, K, D] those that stand for what is left."""
        samples = torch.arange(len(rows), device=rows.device)[:, None]
        return rows[samples, self.source.to(rows.device)]

    @property
    def padded(self) -> bool:
        return len(set(self.layout.lengths)) > 1


def cut_prompt(
    embeds: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    items: Sequence[PromptItem],
    sequences: Sequence[VisualSequence],
    original: bool,
) -> CutPrompt:
    """Put ``sequences`` in the place of ``items``.

    Args:
        embeds: [B, L, D] the uncompressed prompt.
        mask: [B, L] of padding, or None.
        positions: [B, L] position ids or [R, B, L] of a model with several per token; None for consecutive ones.
        original: keep the position ids of the uncompressed prompt. Several per token are always kept: they are
            coordinates, not counts.
    """
    batch, length = embeds.shape[:2]
    keep = torch.ones(batch, length, dtype=torch.bool, device=embeds.device) if mask is None else mask.bool()
    text = keep.clone()
    for item in items:
        text[item.sample, item.rows] = False
    if positions is None:  # as transformers counts: padding too
        positions = torch.arange(length, device=embeds.device)[None]
    rows = [_row(b, embeds, text, items, sequences) for b in range(batch)]
    lengths = [len(row.source) for row in rows]
    longest = max(lengths)
    source = torch.stack([_left_padded(row.source, longest) for row in rows])
    starts = torch.tensor([[longest - n] for n in lengths], device=embeds.device)
    valid = torch.arange(longest, device=embeds.device)[None] >= starts
    every = positions.expand(*positions.shape[:-2], batch, length)
    if positions.ndim == 3 or original:
        new = every.gather(-1, source.expand(*positions.shape[:-2], *source.shape))
        every = every if every.ndim == 2 else every[-3:].amax(0)
        following = every.masked_fill(~keep, 0).amax(1, keepdim=True) + 1
    else:
        first = every.gather(1, keep.long().argmax(1, keepdim=True))
        new = (torch.arange(longest, device=embeds.device)[None] - starts).clamp(min=0) + first
        following = longest - starts + first
    spans = [
        [dataclasses.replace(span, start=span.start + longest - n) for span in row.spans]
        for row, n in zip(rows, lengths, strict=True)
    ]
    dense = keep.sum(1).tolist()
    return CutPrompt(
        embeds=torch.stack([_left_padded(row.embeds, longest) for row in rows]),
        source=source,
        valid=valid,
        positions=new,
        next_position=following,
        layout=PromptLayout(torch.stack([_left_padded(row.visual, longest) for row in rows]), lengths, spans),
        rows=[rows[item.sample].rows[n] + longest - lengths[item.sample] for n, item in enumerate(items)],
        full=length,
        dense=dense,
        full_positions=_largest(positions).expand(batch, length).masked_fill(~keep, -1),
        given=keep if min(dense) < length else None,
    )


def _largest(positions: Tensor) -> Tensor:
    """[B, L] of [B, L] position ids or [R, B, L]; a leading row of text positions (R = 4) is left out."""
    return positions if positions.ndim == 2 else positions[-3:].amax(0)


@dataclasses.dataclass
class _Row:
    """One sample without padding; ``rows``: number of an item -> rows at which its tokens stand."""

    embeds: Tensor
    source: Tensor
    visual: Tensor
    spans: list[VisualSpan]
    rows: dict[int, Tensor]


def _row(
    sample: int, embeds: Tensor, text: Tensor, items: Sequence[PromptItem], sequences: Sequence[VisualSequence]
) -> _Row:
    """One sample without padding. Everything is sorted by the prompt row at which it stands."""
    at = text[sample].nonzero().squeeze(1)
    tokens, source, key = [embeds[sample, at]], [at], [at]
    visual, owner = [torch.zeros_like(at, dtype=torch.bool)], [torch.full_like(at, -1)]
    for number, (item, sequence) in enumerate(zip(items, sequences, strict=True)):
        if item.sample != sample:
            continue
        stands = item.rows[sequence.positions.clamp(max=len(item.rows) - 1)]
        tokens.append(sequence.tokens.to(embeds))
        source.append(stands)
        # an order of the method's own holds inside the rows that are left of the item
        key.append(stands.sort().values)
        visual.append(sequence.is_content)
        owner.append(torch.full_like(stands, number))
    order = torch.argsort(torch.cat(key), stable=True)
    owner = torch.cat(owner)[order]
    return _Row(
        embeds=torch.cat(tokens)[order],
        source=torch.cat(source)[order],
        visual=torch.cat(visual)[order],
        spans=_spans(owner, sequences),
        rows={n: (owner == n).nonzero().squeeze(1) for n, item in enumerate(items) if item.sample == sample},
    )


def _spans(owner: Tensor, sequences: Sequence[VisualSequence]) -> list[VisualSpan]:
    """Where visual tokens follow each other; ``owner`` [K] is the item of each row, -1 at text.

    An item with text in between has several spans, of which none can carry what the method said about the whole.
    """
    numbers, counts = torch.unique_consecutive(owner, return_counts=True)
    runs = list(zip(numbers.tolist(), counts.tolist(), strict=True))
    spans, start = [], 0
    for number, count in runs:
        if number >= 0:
            sequence = sequences[number]
            whole = count == len(sequence.tokens)
            content, info = (sequence.num_content, sequence.info) if whole else (count, {})
            spans.append(VisualSpan(start, count, sequence.modality, content, info))
        start += count
    return spans


def _left_padded(tensor: Tensor, length: int) -> Tensor:
    missing = length - tensor.shape[0]
    return tensor if not missing else torch.cat([tensor.new_zeros(missing, *tensor.shape[1:]), tensor])
