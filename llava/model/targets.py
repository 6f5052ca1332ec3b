"""What the loss of a ``forward`` is computed from: labels, from the caller's ids to the rows of the logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from accelerate_methods.engine.loop import DecoderOutput
from accelerate_methods.engine.output_rows import IGNORED, OutputRows, real_rows, shifted, unshifted
from accelerate_methods.ops.select import on_device
from llava.model.splice import Spliced


@dataclasses.dataclass(frozen=True)
class Targets:
    """Labels of one call.

    Attributes:
        labels: [B, n] of the rows, or None: no loss.
        shift_labels: [B, n] the label behind each row, which the loss then takes instead (transformers' name for it).
        num_items_in_batch: what the sum over the rows is divided by, as in gradient accumulation; None: their mean.
        last: [B] label behind the last row of each sample, while images are spliced in.
    """

    labels: Tensor | None
    shift_labels: Tensor | None = None
    num_items_in_batch: int | Tensor | None = None
    last: Tensor | None = None

    @property
    def of_ids(self) -> Tensor | None:
        """[B, n] label of each id, for splicing."""
        shifts = self.labels is not None and self.shift_labels is not None
        return unshifted(self.shift_labels) if shifts else self.labels

    def spliced(self, spliced: Spliced, mask: Tensor | None) -> Targets:
        """Of the rows of a prompt with its images; ``mask`` [B, n] of padding in the ids, or None."""
        if self.labels is None:
            return self
        last = None
        if self.shift_labels is not None:
            ends = self.shift_labels.new_full((len(self.shift_labels),), self.shift_labels.shape[1] - 1)
            if mask is not None:  # the last real id
                ends = ends - mask.bool().to(ends.device).flip(1).long().argmax(1)
            cut = on_device(spliced.cut, ends.device) > 0
            last = self.shift_labels.gather(1, ends[:, None]).squeeze(1).masked_fill(cut, IGNORED)
        return dataclasses.replace(self, labels=spliced.labels, shift_labels=None, last=last)

    def of_output(self, outputs: Any, mask: Tensor, rows: OutputRows | None) -> Targets:
        """Of the rows that the decoder has left, where the caller gets them.

        Args:
            outputs: of the decoder; mask: [B, L] real rows of what it was given; rows: see :class:`OutputRows`.
        """
        if self.labels is None:
            return self
        labels, valid = self.labels, real_rows(outputs, mask)
        if isinstance(outputs, DecoderOutput):
            labels = outputs.labels(labels)
        if rows is not None:
            labels, valid = rows.of_labels(labels), rows.valid
        if self.last is None:
            return dataclasses.replace(self, labels=labels)
        shift_labels = shifted(labels, valid.to(labels.device), self.last.to(labels.device))
        return dataclasses.replace(self, labels=labels, shift_labels=shift_labels)

    def loss(self, function: Callable[..., Tensor], logits: Tensor) -> Tensor | None:
        if self.labels is None:
            return None
        more = {"num_items_in_batch": self.num_items_in_batch, "shift_labels": self.shift_labels}
        given = {name: value for name, value in more.items() if value is not None}
        return function(logits, self.labels, vocab_size=logits.shape[-1], **given)
