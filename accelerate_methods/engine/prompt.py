"""What the loop is told about a batch of prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from accelerate_methods.engine.devices import moved
from accelerate_methods.stages.prefill import VisualSpan


@dataclasses.dataclass
class PromptLayout:
    """Where visual tokens stand in a batch of prompts, and what else the loop needs to know of it.

    Attributes:
        visual: [B, L] True at visual tokens (newlines are not).
        lengths: real tokens per sample.
        spans: the images and videos of each sample, in order.
        added: [B, L, D] each, what the model adds to the outputs of layers 0, 1, ... (deepstack features of Qwen3-VL).
        next_position: [B, 1] where generated tokens go on; None: after the last of the position ids.
    """

    visual: Tensor
    lengths: list[int]
    spans: list[list[VisualSpan]] = dataclasses.field(default_factory=list)
    added: Sequence[Tensor] = ()
    next_position: Tensor | None = None

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

    def blocks(self) -> Tensor:
        """[B, L] True at every row of a span, newlines included."""
        mask = torch.zeros_like(self.visual)
        for row, sample in zip(mask, self.spans, strict=True):
            for span in sample:
                row[span.start : span.end] = True
        return mask
