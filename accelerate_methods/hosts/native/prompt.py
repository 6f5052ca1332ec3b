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
from accelerate_methods.ops.select import on_device, on_host
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
        dense_rows: rows of the prompt that it takes, where a method inside the vision encoder has left it fewer; those
            between ``start`` and ``end`` that are none of them are text.
        marks: rows of the prompt, on the host, that hold the tokens put around each of its frames; None without any.
    """

    sample: int
    rows: Tensor
    start: int
    end: int
    item: VisualItem
    dense_rows: Tensor | None = None
    marks: Tensor | None = None

    @property
    def all_rows(self) -> Tensor:
        return self.rows if self.dense_rows is None else self.dense_rows


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
        highest: the largest position id, of what goes to the decoder and of the uncompressed prompt, known to the host.
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
    highest: int

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


@dataclasses.dataclass
class HostSide:
    """What the host knows of a prompt before it is cut, read from the device at once.

    Attributes:
        ids: [B, L], or None for a prompt of embeddings; real: [B, L] False at padding, or None without a mask.
        highest: the largest position id of a real row; first: the largest of those of the first real rows.
        more: other small tensors that were read along.
    """

    ids: Tensor | None
    real: Tensor | None
    highest: int
    first: int
    more: list[Tensor]

    @classmethod
    def read(
        cls, ids: Tensor | None, mask: Tensor | None, positions: Tensor | None, length: int, more: Sequence[Tensor]
    ) -> HostSide:
        """One device read.

        Args:
            mask, positions: as in :func:`cut_prompt`; length: L.
        """
        known = [] if ids is None else [ids]
        if mask is not None:
            known.append(mask.bool())
        if positions is not None:
            every = _largest(positions)
            every = every if mask is None else every.expand(mask.shape)
            real = torch.ones_like(every, dtype=torch.bool) if mask is None else mask.bool()
            firsts = every.gather(1, real.long().argmax(1, keepdim=True))
            known.append(torch.stack([every.masked_fill(~real, -1).amax(), firsts.amax()]))
        count = len(known)
        read = on_host([*known, *more])
        known, more = read[:count], read[count:]
        highest, first = known.pop().tolist() if positions is not None else (length - 1, length - 1)
        real = None if mask is None else known.pop()
        if positions is None:
            first = 0 if real is None else int(real.long().argmax(1).max())
        return cls(None if ids is None else known[0], real, highest, first, more)


def cut_prompt(
    embeds: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    items: Sequence[PromptItem],
    sequences: Sequence[VisualSequence],
    original: bool,
    host: HostSide | None = None,
) -> CutPrompt:
    """Put ``sequences`` in the place of ``items``.

    Nothing is read from the device, unless there is text inside an item (timestamps between frames): then, once, which
    of its rows stand before and behind it.

    Args:
        embeds: [B, L, D] the uncompressed prompt.
        mask: [B, L] of padding, or None.
        positions: [B, L] position ids or [R, B, L] of a model with several per token; None for consecutive ones.
        items: those of one sample in the order in which they stand.
        original: keep the position ids of the uncompressed prompt. Several per token are always kept: they are
            coordinates, not counts.
        host: what is known of the prompt already; read if not given.
    """
    batch, length = embeds.shape[:2]
    device = embeds.device
    host = HostSide.read(None, mask, positions, length, []) if host is None else host
    keep = torch.ones(batch, length, dtype=torch.bool, device=device) if mask is None else mask.bool()
    if positions is None:  # as transformers counts: padding too
        positions = torch.arange(length, device=device)[None]
    rows = _rows(host.real, batch, length, items, sequences)
    source, tokens, visual, places = _pieces(rows, embeds, items, sequences)
    lengths = [row.length for row in rows]
    longest = max(lengths)
    missing = [longest - n for n in lengths]
    source = _left_padded(source, missing)
    starts = on_device([[n] for n in missing], device)
    valid = torch.arange(longest, device=device)[None] >= starts
    every = positions.expand(*positions.shape[:-2], batch, length)
    keeps = positions.ndim == 3 or original
    if keeps:
        new = every.gather(-1, source.expand(*positions.shape[:-2], *source.shape))
        every = every if every.ndim == 2 else every[-3:].amax(0)
        following = every.masked_fill(~keep, 0).amax(1, keepdim=True) + 1
    else:
        first = every.gather(1, keep.long().argmax(1, keepdim=True))
        new = (torch.arange(longest, device=device)[None] - starts).clamp(min=0) + first
        following = longest - starts + first
    spans = [
        [dataclasses.replace(span, start=span.start + by) for span in row.spans]
        for row, by in zip(rows, missing, strict=True)
    ]
    dense = [length] * batch if host.real is None else host.real.sum(1).tolist()
    return CutPrompt(
        embeds=_left_padded(tokens, missing),
        source=source,
        valid=valid,
        positions=new,
        next_position=following,
        layout=PromptLayout(_left_padded(visual, missing), lengths, spans, stands=_left_padded(places, missing)),
        rows=[_at(rows[item.sample].runs[n], missing[item.sample], device) for n, item in enumerate(items)],
        full=length,
        dense=dense,
        full_positions=_largest(positions).expand(batch, length).masked_fill(~keep, -1),
        given=keep if min(dense) < length else None,
        highest=host.highest if keeps else max(host.highest, host.first + longest - 1),
    )


def _largest(positions: Tensor) -> Tensor:
    """[B, L] of [B, L] position ids or [R, B, L]; a leading row of text positions (R = 4) is left out."""
    return positions if positions.ndim == 2 else positions[-3:].amax(0)


@dataclasses.dataclass
class _Row:
    """One sample without padding, known to the host.

    Attributes:
        text: rows of the prompt that hold text, ascending.
        order: what follows each other: (None, text rows) or (number of an item, tokens of it).
        spans: where the items stand; runs: number of an item -> (first row, rows) of its stretches.
    """

    text: Tensor
    order: list[tuple[int | None, int]]
    spans: list[VisualSpan]
    runs: dict[int, list[tuple[int, int]]]

    @property
    def length(self) -> int:
        return sum(count for _, count in self.order)


def _rows(
    real: Tensor | None, batch: int, length: int, items: Sequence[PromptItem], sequences: Sequence[VisualSequence]
) -> list[_Row]:
    """Every sample; ``real`` [B, L] on the host, None without padding."""
    text = torch.ones(batch, length, dtype=torch.bool) if real is None else real.clone()
    gapped = [n for n, item in enumerate(items) if item.end - item.start > len(item.all_rows)]
    # an order of the method's own holds inside the rows that are left of the item
    stands = [_stands(items[n], sequences[n]).sort().values for n in gapped]
    read = on_host([items[n].all_rows for n in gapped] + stands) if gapped else []
    own, left = dict(zip(gapped, read, strict=False)), dict(zip(gapped, read[len(gapped) :], strict=True))
    for number, item in enumerate(items):
        text[item.sample, own[number] if number in own else slice(item.start, item.end)] = False
        if item.marks is not None and not sequences[number].frame_marks:
            text[item.sample, item.marks] = False
    return [_row(sample, text[sample].nonzero().squeeze(1), items, sequences, left) for sample in range(batch)]


def _row(
    sample: int,
    text: Tensor,
    items: Sequence[PromptItem],
    sequences: Sequence[VisualSequence],
    left: dict[int, Tensor],
) -> _Row:
    """One sample: text and items by the prompt row at which they stand.

    Args:
        text: its rows of text, ascending; left: for an item with text inside, the rows of its tokens, ascending.
    """
    row, done, length = _Row(text, [], [], {}), 0, 0
    for number, item in enumerate(items):
        if item.sample != sample:
            continue
        sequence, used = sequences[number], 0
        total = len(sequence.tokens)
        before, behind = torch.searchsorted(text, torch.tensor([item.start, item.end])).tolist()
        row.order.append((None, before - done))
        length, done = length + before - done, behind
        inside = text[before:behind]
        # tokens before each row of text that stands inside, and behind the last one
        cuts = [*torch.searchsorted(left[number], inside).tolist(), total] if len(inside) else [total]
        row.runs[number] = []
        for place, cut in enumerate(cuts):
            if cut > used:
                span = sequence.span(length, number)
                if cut - used < total:  # no part can carry what the method said about the whole
                    span = dataclasses.replace(span, length=cut - used, num_content=cut - used, info={})
                row.spans.append(span)
                row.runs[number].append((length, cut - used))
                row.order.append((number, cut - used))
                length, used = length + cut - used, cut
            if place < len(cuts) - 1:
                row.order.append((None, 1))
                length += 1
    row.order.append((None, len(text) - done))
    return row


def _stands(item: PromptItem, sequence: VisualSequence) -> Tensor:
    """[K] row of the prompt at which each token of an item stands."""
    return item.rows[sequence.positions.clamp(max=len(item.rows) - 1)]


def _pieces(
    rows: Sequence[_Row], embeds: Tensor, items: Sequence[PromptItem], sequences: Sequence[VisualSequence]
) -> tuple[list[list[Tensor]], ...]:
    """What follows each other in each sample: rows of the prompt, embeddings, whether they are visual tokens, and the
    rows of their items' layouts at which they stand (0 at text)."""
    device, length = embeds.device, embeds.shape[1]
    flat = torch.cat([row.text + sample * length for sample, row in enumerate(rows)])
    text, flat = on_device(torch.stack([torch.cat([row.text for row in rows]), flat]), device)
    words = embeds.flatten(0, 1)[flat]
    none = torch.zeros(len(text), dtype=torch.bool, device=device)
    stands = [_stands(item, sequence) for item, sequence in zip(items, sequences, strict=True)]
    tokens = [sequence.tokens.to(embeds) for sequence in sequences]
    done, used = 0, [0] * len(items)
    out: tuple[list[list[Tensor]], ...] = ([], [], [], [])
    for row in rows:
        for part in out:
            part.append([])
        for number, count in row.order:
            if number is None:
                parts, here = (text, words, none, none.long()), slice(done, done + count)
                done += count
            else:
                parts = (stands[number], tokens[number], sequences[number].is_content, sequences[number].positions)
                here = slice(used[number], used[number] + count)
                used[number] += count
            for pieces, part in zip(out, parts, strict=True):
                pieces[-1].append(part[here])
    return out


def _at(runs: list[tuple[int, int]], by: int, device: torch.device) -> Tensor:
    """Row numbers of an item's stretches, ``by`` further down."""
    parts = [torch.arange(start + by, start + by + count, device=device) for start, count in runs or [(0, 0)]]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _left_padded(samples: list[list[Tensor]], missing: list[int]) -> Tensor:
    """[B, K, ...] of the pieces of each sample, ``missing`` rows of zeros before them; everything is copied once."""
    like = samples[0][0]
    pieces = []
    for parts, count in zip(samples, missing, strict=True):
        pieces += [like.new_zeros(count, *like.shape[1:]), *parts] if count else parts
    return torch.cat(pieces).unflatten(0, (len(samples), -1))
