"""Put visual tokens in the place of their placeholders and pad the batch (specs/base.md section 7.5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from accelerate_methods.engine.prompt import PromptLayout
from accelerate_methods.engine.sequences import VisualSequence
from accelerate_methods.stages.prefill import VisualSpan
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX


@dataclasses.dataclass
class Spliced:
    """A batch ready for the decoder.

    Attributes:
        inputs_embeds: [B, L, D], zeros in padding.
        labels: [B, L], -100 at visual tokens and padding.
        mask: [B, L] True at real tokens.
        position_ids: [B, L]; 0 in padding.
        visual: [B, L] True at content tokens of images and videos (newlines count as text).
        lengths: real tokens per sample; dense_lengths: what they would be without compression.
        items: indices of the visual items each sample holds; spans: where they stand.
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
) -> Spliced:
    """Interleave text embeddings and visual sequences.

    Args:
        input_ids: [B, n] with one -200 per visual item; items are consumed in order over the whole batch.
        attention_mask: [B, n] of padding in ``input_ids`` or None.
        sequences: one per visual item.
        embed: maps ids [n] to embeddings [n, D].
        original_positions: position ids of the uncompressed sequence instead of consecutive ones.
        max_length: longer sequences lose their tail.

    A sample without a placeholder takes no item, unless there is exactly one item more for each such sample: that is
    the official training convention of giving text-only samples a dummy image, which is then skipped.

    Raises:
        ValueError: placeholders and visual items do not match in number.
    """
    keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    per_sample = ((input_ids == IMAGE_TOKEN_INDEX) & keep).sum(1).tolist()
    placeholders, text_only = sum(per_sample), per_sample.count(0)
    dummies = text_only > 0 and len(sequences) == placeholders + text_only
    if placeholders != len(sequences) and not dummies:
        raise ValueError(
            f"the prompts hold {placeholders} <image> placeholders but {len(sequences)} images or videos were given."
        )
    rows: list[_Row] = []
    used = 0
    for sample in range(input_ids.shape[0]):
        row = _Row(original_positions)
        ids = input_ids[sample][keep[sample]]
        targets = None if labels is None else labels[sample][keep[sample]]
        holes = (ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
        bounds = [-1, *holes, ids.shape[0]]
        texts = [ids[a + 1 : b] for a, b in pairwise(bounds)]
        embedded = embed(torch.cat(texts)).split([len(t) for t in texts])
        for piece, (start, end) in enumerate(pairwise(bounds)):
            row.add_text(embedded[piece], None if targets is None else targets[start + 1 : end])
            if piece < len(holes):
                row.add_visual(sequences[used], used)
                used += 1
        if not holes and dummies:
            used += 1
        rows.append(row.finished(max_length))
    return _pad(rows, padding_side)


class _Row:
    """One sample under construction."""

    def __init__(self, original_positions: bool):
        self.original = original_positions
        self.embeds: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.visual: list[Tensor] = []
        self.items: list[int] = []
        self.spans: list[VisualSpan] = []
        self.length = self.dense_length = 0

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

    def finished(self, max_length: int | None) -> _Row:
        dtype = self.embeds[0].dtype
        for name in ("embeds", "labels", "positions", "visual"):
            joined = torch.cat([part.to(dtype) if name == "embeds" else part for part in getattr(self, name)])
            setattr(self, name, joined if max_length is None else joined[:max_length])
        self.length = self.embeds.shape[0]
        if max_length is not None:
            self.dense_length = min(self.dense_length, max_length)
            self.spans = [_cut(span, max_length) for span in self.spans if span.start < max_length]
        return self


def _cut(span: VisualSpan, end: int) -> VisualSpan:
    """What is left of a span before row ``end``. The stages of a method can then no longer rely on ``info``."""
    if span.end <= end:
        return span
    length = end - span.start
    return dataclasses.replace(span, length=length, num_content=min(span.num_content, length), info={})


def _shifted(spans: list[VisualSpan], by: int) -> list[VisualSpan]:
    return [dataclasses.replace(span, start=span.start + by) for span in spans]


def _pad(rows: list[_Row], side: str) -> Spliced:
    longest = max(row.length for row in rows)

    def padded(name: str, value: float) -> Tensor:
        out = []
        for row in rows:
            tensor = getattr(row, name)
            fill = tensor.new_full((longest - row.length, *tensor.shape[1:]), value)
            out.append(torch.cat([fill, tensor] if side == "left" else [tensor, fill]))
        return torch.stack(out)

    device = rows[0].embeds.device
    lengths = torch.tensor([row.length for row in rows], device=device)[:, None]
    slots = torch.arange(longest, device=device)[None]
    return Spliced(
        inputs_embeds=padded("embeds", 0.0),
        labels=padded("labels", IGNORE_INDEX),
        mask=slots >= longest - lengths if side == "left" else slots < lengths,
        position_ids=padded("positions", 0),
        visual=padded("visual", False),
        lengths=[row.length for row in rows],
        dense_lengths=[row.dense_length for row in rows],
        items=[row.items for row in rows],
        spans=[_shifted(row.spans, longest - row.length if side == "left" else 0) for row in rows],
    )
