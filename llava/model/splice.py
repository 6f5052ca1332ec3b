"""Put visual tokens in the place of their placeholders and pad the batch (docs/llava_tree.md, "The prompt")."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from accelerate_methods.engine.devices import moved
from accelerate_methods.engine.prompt import PromptLayout
from accelerate_methods.engine.sequences import VisualSequence
from accelerate_methods.stages.prefill import VisualSpan
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX


@dataclasses.dataclass
class Prompts:
    """The text side of a batch, as the model's callers give it.

    Attributes:
        input_ids: [B, n] with one IMAGE_TOKEN_INDEX per visual item, in the order of the items.
        attention_mask: [B, n] of padding, or None; labels: [B, n], or None.
        padding_side: "left" or "right"; None for that of the config.
        dummies: whether a sample without placeholder may bring an image that is skipped (training data do).
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    labels: Tensor | None = None
    padding_side: str | None = None
    dummies: bool = False


@dataclasses.dataclass
class Spliced:
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
        cut: tokens that each sample lost at its end; max_length: the length beyond which they are cut, or None.
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
    max_length: int | None = None

    @property
    def shortened(self) -> bool:
        """Whether a sample has fewer tokens than without compression."""
        return any(a + c < b for a, b, c in zip(self.lengths, self.dense_lengths, self.cut, strict=True))

    @property
    def layout(self) -> PromptLayout:
        """What the decoder loop needs to know."""
        return PromptLayout(self.visual, self.lengths, self.spans)


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
    keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    per_sample = ((input_ids == IMAGE_TOKEN_INDEX) & keep).sum(1).tolist()
    placeholders, text_only = sum(per_sample), per_sample.count(0)
    dummies = dummies and text_only > 0 and len(sequences) == placeholders + text_only
    if placeholders != len(sequences) and not dummies:
        raise ValueError(
            f"the prompts hold {placeholders} <image> placeholders but {len(sequences)} images or videos were given."
        )
    built: list[_Sample] = []
    used = 0
    for number in range(input_ids.shape[0]):
        sample = _Sample(original_positions)
        ids = input_ids[number][keep[number]]
        targets = None if labels is None else labels[number][keep[number]]
        holes = (ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
        bounds = [-1, *holes, ids.shape[0]]
        texts = [ids[a + 1 : b] for a, b in pairwise(bounds)]
        embedded = embed(torch.cat(texts)).split([len(t) for t in texts])
        for piece, (start, end) in enumerate(pairwise(bounds)):
            sample.add_text(embedded[piece], None if targets is None else targets[start + 1 : end])
            if piece < len(holes):
                sample.add_visual(sequences[used], used)
                used += 1
        if not holes and dummies:
            used += 1
        built.append(sample.finished(max_length))
    return dataclasses.replace(_pad(built, padding_side), max_length=max_length)


def beside_text(sequence: VisualSequence, device: torch.device) -> VisualSequence:
    """The sequence on the device of the text's embeddings (under a device map not always the tower's)."""
    parts = ("tokens", "positions", "is_content")
    return dataclasses.replace(sequence, **{name: moved(getattr(sequence, name), device) for name in parts})


class _Sample:
    """One sample under construction."""

    def __init__(self, original_positions: bool):
        self.original = original_positions
        self.embeds: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.visual: list[Tensor] = []
        self.items: list[int] = []
        self.spans: list[VisualSpan] = []
        self.length = self.dense_length = self.cut = 0

    def add_text(self, embeds: Tensor, labels: Tensor | None) -> None:
        count = embeds.shape[0]
        labels = torch.full((count,), IGNORE_INDEX, device=embeds.device) if labels is None else labels
        self._add(embeds, labels, torch.arange(count, device=embeds.device), count, torch.zeros_like(labels).bool())

    def add_visual(self, sequence: VisualSequence, number: int) -> None:
        tokens = sequence.tokens
        labels = torch.full((tokens.shape[0],), IGNORE_INDEX, device=tokens.device)
        self.items.append(number)
        self.spans.append(
            VisualSpan(self.length, tokens.shape[0], sequence.modality, sequence.num_content, sequence.info)
        )
        self._add(tokens, labels, sequence.positions, sequence.length, sequence.is_content)

    def _add(self, embeds: Tensor, labels: Tensor, positions: Tensor, dense: int, visual: Tensor) -> None:
        count = embeds.shape[0]
        if not self.original:
            positions = torch.arange(count, device=embeds.device)
        self.embeds.append(embeds)
        self.labels.append(labels)
        self.positions.append(positions + (self.dense_length if self.original else self.length))
        self.visual.append(visual)
        self.length += count
        self.dense_length += dense

    def finished(self, max_length: int | None) -> _Sample:
        dtype = self.embeds[0].dtype
        for name in ("embeds", "labels", "positions", "visual"):
            joined = torch.cat([part.to(dtype) if name == "embeds" else part for part in getattr(self, name)])
            setattr(self, name, joined if max_length is None else joined[:max_length])
        self.cut = self.length - self.embeds.shape[0]
        self.length = self.embeds.shape[0]
        if self.cut:
            self.spans = [self._left_of(span) for span in self.spans if span.start < self.length]
        return self

    def _left_of(self, span: VisualSpan) -> VisualSpan:
        """What the cut left of a span. The stages of a method can then no longer rely on ``info``."""
        if span.end <= self.length:
            return span
        content = int(self.visual[span.start :].sum())
        return dataclasses.replace(span, length=self.length - span.start, num_content=content, info={})


def _shifted(spans: list[VisualSpan], by: int) -> list[VisualSpan]:
    return [dataclasses.replace(span, start=span.start + by) for span in spans]


def _pad(samples: list[_Sample], side: str) -> Spliced:
    longest = max(sample.length for sample in samples)

    def padded(name: str, value: float) -> Tensor:
        out = []
        for sample in samples:
            tensor = getattr(sample, name)
            fill = tensor.new_full((longest - sample.length, *tensor.shape[1:]), value)
            out.append(torch.cat([fill, tensor] if side == "left" else [tensor, fill]))
        return torch.stack(out)

    device = samples[0].embeds.device
    lengths = torch.tensor([sample.length for sample in samples], device=device)[:, None]
    slots = torch.arange(longest, device=device)[None]
    return Spliced(
        inputs_embeds=padded("embeds", 0.0),
        labels=padded("labels", IGNORE_INDEX),
        mask=slots >= longest - lengths if side == "left" else slots < lengths,
        position_ids=padded("positions", 0),
        visual=padded("visual", False),
        lengths=[sample.length for sample in samples],
        dense_lengths=[sample.dense_length for sample in samples],
        items=[sample.items for sample in samples],
        spans=[_shifted(sample.spans, longest - sample.length if side == "left" else 0) for sample in samples],
        cut=[sample.cut for sample in samples],
    )
