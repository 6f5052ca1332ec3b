"""What the loop is told about a batch of prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from accelerate_methods.engine.devices import moved
from accelerate_methods.ops.select import on_device
from accelerate_methods.stages.prefill import VisualSpan


class RowUpdate(Protocol):
    """What a model itself does to some rows of its prompts in front of one decoder layer, with a method or without.

    Attributes:
        layer: in front of which.
    """

    layer: int

    def __call__(self, hidden: Tensor, kept: Tensor | None) -> Tensor:
        """The rows [B, q, D] that go on; ``kept`` [B, q]: which row of the prompt each is, None where all are there."""

    def expanded(self, times: int) -> RowUpdate:
        """For every prompt repeated ``times`` times."""


@dataclasses.dataclass
class PromptLayout:
    """Where visual tokens stand in a batch of prompts, and what else the loop needs to know of it.

    Attributes:
        visual: [B, L] True at visual tokens (newlines are not).
        lengths: real tokens per sample.
        spans: the images and videos of each sample, in order.
        added: [B, L, D] each, what the model adds to the outputs of layers 0, 1, ... (deepstack features of Qwen3-VL).
        next_position: [B, 1] where generated tokens go on; None: after the last of the position ids.
        full: rows of the prompts as the caller counts them, if more than there are here.
        stands: [B, L] row of its item's uncompressed layout at which each row stands, any at text; None where all of
            every item is there, in its order.
        update: what the model itself does between its layers.
    """

    visual: Tensor
    lengths: list[int]
    spans: list[list[VisualSpan]] = dataclasses.field(default_factory=list)
    added: Sequence[Tensor] = ()
    next_position: Tensor | None = None
    full: int | None = None
    stands: Tensor | None = None
    update: RowUpdate | None = None

    def expanded(self, batch: int) -> PromptLayout:
        """Repeated for beams or several return sequences."""
        times = batch // self.visual.shape[0]
        if times == 1:
            return self
        following = self.next_position
        return PromptLayout(
            visual=self.visual.repeat_interleave(times, dim=0),
            lengths=[n for n in self.lengths for _ in range(times)],
            spans=[s for s in self.spans for _ in range(times)],
            added=[part.repeat_interleave(times, dim=0) for part in self.added],
            next_position=None if following is None else following.repeat_interleave(times, dim=0),
            full=self.full,
            stands=None if self.stands is None else self.stands.repeat_interleave(times, dim=0),
            update=None if self.update is None else self.update.expanded(times),
        )

    def moved(self, device: torch.device) -> PromptLayout:
        """With the mask of visual rows on ``device``; the rest follows where it is used."""
        return dataclasses.replace(self, visual=moved(self.visual, device))

    def only(self, modalities: frozenset[str]) -> PromptLayout:
        """The same prompts, with the items of other modalities taken for text."""
        spans = [[s for s in sample if s.modality in modalities] for sample in self.spans]
        if spans == self.spans:
            return self
        layout = dataclasses.replace(self, spans=spans)
        layout.visual = self.visual & layout.blocks()
        return layout

    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L] each: item, frame and place within the frame of every row, see :class:`.prefill.RowPlaces`."""
        item = torch.full(self.visual.shape, -1)
        start, per_frame, frames = torch.zeros_like(item), torch.ones_like(item), torch.ones_like(item)
        for sample, spans in enumerate(self.spans):
            for span in spans:
                rows = (sample, slice(span.start, span.end))
                item[rows], start[rows], frames[rows] = span.item, span.start, span.frames
                per_frame[rows] = span.frame_rows or 0
        device = self.visual.device
        item, start, per_frame, frames = on_device(torch.stack([item, start, per_frame, frames]), device)
        stands = torch.arange(item.shape[1], device=device) - start if self.stands is None else self.stands
        regular = per_frame > 0
        frame = torch.where(regular, stands // per_frame.clamp(min=1), torch.zeros_like(stands))
        place = torch.where(regular, stands % per_frame.clamp(min=1), stands)
        outside = (item < 0) | (frame >= frames)
        return item, frame.masked_fill(outside, -1), place.masked_fill(outside, -1)

    def blocks(self) -> Tensor:
        """[B, L] True at every row of a span, newlines included."""
        mask = torch.zeros_like(self.visual)
        for row, sample in zip(mask, self.spans, strict=True):
            for span in sample:
                row[span.start : span.end] = True
        return mask


def goes_on(positions: Tensor | None, mask: Tensor | None) -> bool:
    """Whether position ids count on from token to token. They do not where several prompts are packed into a row.

    Reads the device once.

    Args:
        positions: [B or 1, L]; [R, B, L] of a model with several per token: of these only a leading row of text
            positions (R = 4) counts, the others are coordinates; None for consecutive ones.
        mask: [B, L] of padding, whose positions may be anything; None without any.
    """
    if positions is not None and positions.ndim == 3:
        positions = positions[0] if len(positions) == 4 else None
    if positions is None:
        return True
    if mask is None:
        return bool((positions.diff(dim=-1) == 1).all())
    real = mask.bool().to(positions.device)
    behind = positions - (real.long().cumsum(1) - 1)
    start = behind.gather(1, real.long().argmax(1, keepdim=True))  # of the first real token
    return bool(((behind == start) | ~real).all())
