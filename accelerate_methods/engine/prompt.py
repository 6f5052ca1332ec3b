"""Where visual tokens stand in a batch of prompts."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from accelerate_methods.stages.prefill import VisualSpan


@dataclasses.dataclass
class PromptLayout:
    """What the splice knows about a batch of prompts and the loop needs.

    Attributes:
        visual: [B, L] True at visual tokens (newlines are not).
        lengths: real tokens per sample.
        spans: the images and videos of each sample, in order.
    """

    visual: Tensor
    lengths: list[int]
    spans: list[list[VisualSpan]] = dataclasses.field(default_factory=list)

    def expanded(self, batch: int) -> PromptLayout:
        """Repeated for beams or several return sequences."""
        times = batch // self.visual.shape[0]
        if times == 1:
            return self
        return PromptLayout(
            visual=self.visual.repeat_interleave(times, dim=0),
            lengths=[n for n in self.lengths for _ in range(times)],
            spans=[s for s in self.spans for _ in range(times)],
        )

    def only(self, modalities: frozenset[str]) -> PromptLayout:
        """The same prompts, with the items of other modalities taken for text."""
        spans = [[s for s in sample if s.modality in modalities] for sample in self.spans]
        if spans == self.spans:
            return self
        layout = PromptLayout(self.visual, self.lengths, spans)
        layout.visual = self.visual & layout.blocks()
        return layout

    def blocks(self) -> Tensor:
        """[B, L] True at every row of a span, newlines included."""
        mask = torch.zeros_like(self.visual)
        for row, sample in zip(mask, self.spans, strict=True):
            for span in sample:
                row[span.start : span.end] = True
        return mask
