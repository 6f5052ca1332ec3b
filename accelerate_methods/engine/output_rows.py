"""Rows of an output, back where the caller of ``forward`` had them.

The decoder loop works on prompts that are padded on the left. Callers pad where they like, above all on the right when
they train, and read logits at the rows of their own prompt.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from accelerate_methods.engine.cached_keys import gather_rows

IGNORED = -100  # label of a row that does not count


@dataclasses.dataclass
class DecoderOutput(BaseModelOutputWithPast):
    """transformers' output plus which rows of the input the last layer still had (None: all of them).

    Attributes:
        kept: [B, K] rows of the input; kept_valid: [B, K] False at padding, or None.
    """

    kept: Tensor | None = None
    kept_valid: Tensor | None = None

    def labels(self, labels: Tensor) -> Tensor:
        """[B, L] labels of the input -> labels of the rows that are left."""
        if self.kept is None:
            return labels
        labels = labels.gather(1, self.kept.to(labels.device))
        return labels if self.kept_valid is None else labels.masked_fill(~self.kept_valid.to(labels.device), -100)


@dataclasses.dataclass
class OutputRows:
    """Which row of the loop's output goes where.

    Attributes:
        taken: [B, R] row of the loop's output that stands at each row; any at padding.
        valid: [B, R] False at padding.
    """

    taken: Tensor
    valid: Tensor

    @classmethod
    def between(cls, left: Tensor, target: Tensor) -> OutputRows:
        """From ``left`` [B, K] (real rows, padding on the left) to ``target`` [B, R] (as many real rows, anywhere)."""
        padding = left.shape[1] - left.sum(1, keepdim=True)
        return cls((target.cumsum(1) - 1 + padding).clamp(min=0), target)

    def of_states(self, states: Tensor) -> Tensor:
        """[B, K, D] -> [B, R, D], zeros in padding."""
        taken, valid = self.taken.to(states.device), self.valid.to(states.device)
        return gather_rows(states, taken).masked_fill(~valid[..., None], 0)

    def of_labels(self, labels: Tensor) -> Tensor:
        """[B, K] -> [B, R], ignored in padding."""
        return labels.gather(1, self.taken.to(labels.device)).masked_fill(~self.valid.to(labels.device), IGNORED)


def real_rows(output: DecoderOutput, mask: Tensor) -> Tensor:
    """[B, K] which rows of the loop's output are real; ``mask`` [B, L]: of what it was given."""
    kept = getattr(output, "kept", None)
    if kept is None:
        return mask
    return torch.ones_like(kept, dtype=torch.bool) if output.kept_valid is None else output.kept_valid


def on_the_right(left: Tensor) -> OutputRows:
    """Padding of ``left`` [B, K] on the other side."""
    lengths = left.sum(1, keepdim=True)
    return OutputRows.between(left, torch.arange(left.shape[1], device=left.device)[None] < lengths)


def as_the_caller_had_them(left: Tensor, mask: Tensor) -> OutputRows | None:
    """Rows of a prompt whose padding the caller describes; None if they stand there already.

    Where no sample has lost a row, every row stands where it stood in the prompt. Otherwise the rows that are left
    follow each other, padded to the longest sample: on the right if the caller padded on the right only, else on the
    left. Reads the device once.

    Args:
        left: [B, K] real rows of the loop's output, padding on the left.
        mask: [B, L] real rows of the prompt.
    """
    mask = mask.bool().to(left.device)
    whole = (left.sum(1) == mask.sum(1)).all()
    right = mask[:, 0].all() & ~mask[:, -1].all()
    whole, right = torch.stack([whole, right]).tolist()
    if whole:
        same = left.shape == mask.shape and torch.equal(left, mask)
        return None if same else OutputRows.between(left, mask)
    return on_the_right(left) if right else None


# -- shifted labels ----------------------------------------------------------------------------------------------------


def unshifted(shift_labels: Tensor) -> Tensor:
    """[B, L] label of the token behind each row -> label of each row; nothing is known of the first."""
    return torch.cat([shift_labels.new_full((len(shift_labels), 1), IGNORED), shift_labels[:, :-1]], dim=1)


def shifted(labels: Tensor, valid: Tensor, last: Tensor) -> Tensor:
    """[B, K] labels of rows -> of the token behind each; behind the last real row (``valid`` [B, K]) ``last`` [B]."""
    behind = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORED)], dim=1)
    return behind.where(~last_rows(valid), last[:, None].to(labels))


def last_rows(valid: Tensor) -> Tensor:
    """[B, K] True at the last real row of each sample."""
    return valid & (valid.flip(1).cumsum(1).flip(1) == 1)
