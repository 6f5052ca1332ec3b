"""Put visual tokens in the place of their placeholders and pad the batch (docs/llava_tree.md, "The prompt")."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from accelerate_methods.engine.devices import moved
from accelerate_methods.engine.prompt import PromptLayout, RowUpdate
from accelerate_methods.engine.sequences import VisualSequence
from accelerate_methods.ops.select import on_device
from accelerate_methods.stages.prefill import VisualSpan
from accelerate_methods.stages.printing import ShapesShown
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX


@dataclasses.dataclass
class Prompts:
    """The text side of a batch, as the model's callers give it.

    Attributes:
        input_ids: [B, n] with one IMAGE_TOKEN_INDEX per visual item, in the order of the items.
        attention_mask: [B, n] of padding, or None; labels: [B, n], or None.
        padding_side: "left" or "right"; None for that of the config.
        dummies: whether a sample without placeholder may bring an image that is skipped (training data do).
        questions: one text per prompt, for methods that look at it, or None.
        own: what a call gave beside them for the vision side of its architecture (``visual_arguments`` of the model).
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    labels: Tensor | None = None
    padding_side: str | None = None
    dummies: bool = False
    questions: Any = None
    own: dict[str, Any] = dataclasses.field(default_factory=dict)
    #: [B, n, D] of the ids, where an architecture makes them itself: its ``compress`` sets them
    embeds: Tensor | None = None
    #: what the steps of an architecture leave for each other (its ``encode_for`` for its ``embed``)
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @cached_property
    def ids_on_host(self) -> tuple[Tensor, Tensor]:
        """[B, n] ids and [B, n] which are real, on the host: all sizes follow from them.

        One device read, which waits for nothing if it comes before the images are encoded.
        """
        if self.attention_mask is None:
            ids = self.input_ids.cpu()
            return ids, torch.ones(ids.shape, dtype=torch.bool)
        ids, keep = torch.stack([self.input_ids, self.attention_mask.to(self.input_ids)]).cpu()
        return ids, keep.bool()

    @cached_property
    def on_host(self) -> tuple[Tensor, Tensor]:
        """[B, n] placeholders and [B, n] real ids, on the host."""
        ids, keep = self.ids_on_host
        return (ids == IMAGE_TOKEN_INDEX) & keep, keep


@dataclasses.dataclass(repr=False)
class Spliced(ShapesShown):
    """A batch ready for the decoder.

    Attributes:
        inputs_embeds: [B, L, D], zeros in padding.
        labels: [B, L], -100 at visual tokens and padding.
        mask: [B, L] True at real tokens.
        position_ids: [B, L]; 0 in padding.
        visual: [B, L] True at content tokens of images and videos (newlines count as text).
        lengths: real tokens per sample; dense_lengths: what they would be without compression and without a limit.
        items: indices of the visual items of each sample; spans: where they stand, of a prompt that was cut only the
            first ones.
        stands: [B, L] as in :class:`.prompt.PromptLayout`.
        cut: tokens that each sample lost at its end; max_length: the length beyond which they are cut, or None.
        update: as in :class:`.prompt.PromptLayout`.
    """

    inputs_embeds: Tensor
    labels: Tensor
    mask: Tensor
    position_ids: Tensor
    visual: Tensor
    lengths: list[int]
    dense_lengths: list[int]
    items: list[list[int]]
    spans: list[list[VisualSpan]]
    cut: list[int]
    stands: Tensor
    max_length: int | None = None
    update: RowUpdate | None = None

    @property
    def shortened(self) -> bool:
        """Whether a sample has fewer tokens than without compression."""
        return any(a + c < b for a, b, c in zip(self.lengths, self.dense_lengths, self.cut, strict=True))

    @property
    def layout(self) -> PromptLayout:
        """What the decoder loop needs to know."""
        return PromptLayout(self.visual, self.lengths, self.spans, stands=self.stands, update=self.update)


def splice(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    sequences: Sequence[VisualSequence],
    embed,
    *,
    original_positions: bool,
    padding_side: str,
    max_length: int | None = None,
    dummies: bool = False,
) -> Spliced:
    """Interleave text embeddings and visual sequences.

    Args:
        input_ids: [B, n] with one -200 per visual item; items are consumed in order over the whole batch.
        attention_mask: [B, n] of padding in ``input_ids`` or None.
        sequences: one per visual item.
        embed: maps ids [n] to embeddings [n, D].
        original_positions: position ids of the uncompressed sequence instead of consecutive ones.
        max_length: longer sequences lose their tail, as in the official code (``Spliced.cut``).
        dummies: each sample without a placeholder may bring one item, which is skipped: the official training code
            gives text-only samples a dummy image. Without it a picture that no prompt asks for is an error.

    Raises:
        ValueError: placeholders and visual items do not match in number.
    """
    return splice_prompts(
        Prompts(input_ids, attention_mask, labels, dummies=dummies),
        sequences,
        embed,
        original_positions=original_positions,
        padding_side=padding_side,
        max_length=max_length,
    )


def splice_prompts(
    prompts: Prompts,
    sequences: Sequence[VisualSequence],
    embed: Callable[[Tensor], Tensor],
    *,
    original_positions: bool,
    padding_side: str,
    max_length: int | None = None,
) -> Spliced:
    """:func:`splice` of prompts of which the host may know already what it has to."""
    input_ids, labels, dummies = prompts.input_ids, prompts.labels, prompts.dummies
    holes, keep = prompts.on_host
    per_sample = holes.sum(1).tolist()
    placeholders, text_only = sum(per_sample), per_sample.count(0)
    dummies = dummies and text_only > 0 and len(sequences) == placeholders + text_only
    if placeholders != len(sequences) and not dummies:
        raise ValueError(
            f"the prompts hold {placeholders} <image> placeholders but {len(sequences)} images or videos were given."
        )
    text = on_device((keep & ~holes).flatten().nonzero().squeeze(1), input_ids.device)
    lengths = [_text_lengths(*rows) for rows in zip(holes, keep, strict=True)]
    every = [length for sample in lengths for length in sample]
    rows = embed(input_ids.flatten()[text]) if prompts.embeds is None else prompts.embeds.flatten(0, 1)[text]
    embedded = iter(rows.split(every))
    targets = None if labels is None else iter(labels.flatten()[text.to(labels.device)].split(every))
    samples: list[_Sample] = []
    used = 0
    for texts in lengths:
        sample = _Sample()
        for number in range(len(texts)):
            if number:
                sample.add_visual(sequences[used], used)
                used += 1
            sample.add_text(next(embedded), None if targets is None else next(targets))
        used += len(texts) == 1 and dummies
        samples.append(sample.shortened(max_length))
    return dataclasses.replace(_joined(samples, padding_side, original_positions), max_length=max_length)


def _text_lengths(holes: Tensor, keep: Tensor) -> list[int]:
    """Real ids before, between and behind the placeholders of one sample; both [n], on the host."""
    holes = holes[keep]
    bounds = [-1, *holes.nonzero().squeeze(1).tolist(), holes.shape[0]]
    return [end - start - 1 for start, end in pairwise(bounds)]


def samples_of_items(prompts: Prompts, count: int) -> list[int]:
    """The sample that each of ``count`` images and videos belongs to."""
    if prompts.input_ids.shape[0] == 1:
        return [0] * count
    per_sample = prompts.on_host[0].sum(1).tolist()
    if sum(per_sample) != count and prompts.dummies:
        per_sample = [max(1, here) for here in per_sample]
    owners = [sample for sample, here in enumerate(per_sample) for _ in range(here)]
    return owners if len(owners) == count else [0] * count  # `splice` says what is wrong


def beside_text(sequence: VisualSequence, device: torch.device) -> VisualSequence:
    """The sequence on the device of the text's embeddings (under a device map not always the tower's)."""
    parts = ("tokens", "positions", "is_content")
    return dataclasses.replace(sequence, **{name: moved(getattr(sequence, name), device) for name in parts})


@dataclasses.dataclass(frozen=True)
class _Part:
    """Text, or one image or video, in a sample.

    Attributes:
        embeds: [K, D]; labels: [K], None where nothing is to be learnt.
        sequence: whose rows these are the first ones of; None for text.
        dense: row of the uncompressed sample at which it begins.
    """

    embeds: Tensor
    labels: Tensor | None
    sequence: VisualSequence | None
    dense: int

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def first(self, rows: int) -> _Part:
        labels = None if self.labels is None else self.labels[:rows]
        return dataclasses.replace(self, embeds=self.embeds[:rows], labels=labels)

    def positions(self) -> Tensor:
        """[K] rows of the uncompressed sample at which the rows stand."""
        if self.sequence is None:
            return torch.arange(self.dense, self.dense + len(self), device=self.embeds.device)
        return self.sequence.positions[: len(self)] + self.dense

    def stands(self) -> Tensor:
        """[K] rows of the item's own layout at which the rows stand, 0 in text."""
        if self.sequence is None:
            return torch.zeros(len(self), dtype=torch.long, device=self.embeds.device)
        return self.sequence.positions[: len(self)]

    def visual(self) -> Tensor:
        """[K] True at content tokens."""
        if self.sequence is None:
            return torch.zeros(len(self), dtype=torch.bool, device=self.embeds.device)
        return self.sequence.is_content[: len(self)]


class _Sample:
    """One sample under construction: what stands in it is put together for the whole batch at once."""

    def __init__(self) -> None:
        self.parts: list[_Part] = []
        self.items: list[int] = []
        self.spans: list[VisualSpan] = []
        self.length = self.dense_length = self.cut = 0

    def add_text(self, embeds: Tensor, labels: Tensor | None) -> None:
        self._add(_Part(embeds, labels, None, self.dense_length), embeds.shape[0])

    def add_visual(self, sequence: VisualSequence, number: int) -> None:
        self.spans.append(sequence.span(self.length, len(self.items)))
        self.items.append(number)
        self._add(_Part(sequence.tokens, None, sequence, self.dense_length), sequence.length)

    def _add(self, part: _Part, dense: int) -> None:
        self.parts.append(part)
        self.length += len(part)
        self.dense_length += dense

    def shortened(self, max_length: int | None) -> _Sample:
        """Without what is behind ``max_length`` rows."""
        if max_length is None or self.length <= max_length:
            return self
        self.cut, self.length = self.length - max_length, max_length
        left, parts = max_length, []
        for part in self.parts:
            parts.append(part.first(left))
            left -= len(parts[-1])
        self.spans = [
            self._left_of(span, part)
            for span, part in zip(self.spans, (part for part in parts if part.sequence is not None), strict=True)
            if span.start < self.length
        ]
        self.parts = parts
        return self

    def _left_of(self, span: VisualSpan, part: _Part) -> VisualSpan:
        """What the cut left of a span. The stages of a method can then no longer rely on ``info``.

        Reads the device, of a prompt that ends inside an image or video.
        """
        if span.end <= self.length:
            return span
        return dataclasses.replace(span, length=len(part), num_content=int(part.visual().sum()), info={})


def _shifted(spans: list[VisualSpan], by: int) -> list[VisualSpan]:
    return [dataclasses.replace(span, start=span.start + by) for span in spans]


def _joined(samples: list[_Sample], side: str, original_positions: bool) -> Spliced:
    """The batch, padded on ``side``; everything in it is copied once."""
    longest = max(sample.length for sample in samples)
    like = samples[0].parts[0].embeds  # of text: its dtype is the decoder's
    device = like.device

    def batch(of_part: Callable[[_Part], Tensor], padding: Tensor) -> Tensor:
        rows = []
        for sample in samples:
            fill = padding.expand(longest - sample.length, *padding.shape[1:])
            own = [of_part(part) for part in sample.parts if len(part)]
            rows += [fill, *own] if side == "left" else [*own, fill]
        return torch.cat([row for row in rows if row.shape[0]] or rows).view(len(samples), longest, *padding.shape[1:])

    def number(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((1,), value, dtype=dtype, device=device)

    lengths = on_device([[sample.length] for sample in samples], device)
    slots = torch.arange(longest, device=device)[None]
    mask = slots >= longest - lengths if side == "left" else slots < lengths
    if original_positions:
        positions = batch(_Part.positions, number(0, torch.long))
    else:
        positions = (slots - (longest - lengths)).clamp(min=0) if side == "left" else slots * mask
    labels = torch.full((len(samples), longest), IGNORE_INDEX, device=device)
    if any(part.labels is not None for sample in samples for part in sample.parts):
        ignored = number(IGNORE_INDEX, torch.long)
        labels = batch(lambda part: ignored.expand(len(part)) if part.labels is None else part.labels, ignored)
    return Spliced(
        inputs_embeds=batch(lambda part: part.embeds.to(like.dtype), like.new_zeros(1, like.shape[1])),
        labels=labels,
        mask=mask,
        position_ids=positions,
        visual=batch(_Part.visual, number(False, torch.bool)),
        stands=batch(_Part.stands, number(0, torch.long)),
        lengths=[sample.length for sample in samples],
        dense_lengths=[sample.dense_length for sample in samples],
        items=[sample.items for sample in samples],
        spans=[_shifted(sample.spans, longest - sample.length if side == "left" else 0) for sample in samples],
        cut=[sample.cut for sample in samples],
    )
