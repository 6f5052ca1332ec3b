"""Where prompts divide at their last ``<voco>``: what is read to fill these tokens, and the text that sees only them.

With lo and hi the first and last ``<voco>`` of a prompt, rows up to hi see each other causally, and rows behind it see
lo to themselves (`make_voco_mask_llava` of Yxxxb/VoCo-LLaMA@3b6e14d9). No row behind hi changes one before it. So the
mask never has to be made: the rows up to hi are a causal prompt of their own (a *look*), of which the keys and values
of lo to hi are kept, and the text is another one behind these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.prefill import VisualSpan


@dataclasses.dataclass
class Looks:
    """Prompts that end with their last ``<voco>``: one per sample, of a video one per frame. Padded on the right, where
    a causal mask hides padding.

    Attributes:
        sample: [R] of which sample of the batch.
        rows: [R, H] columns of the padded batch, 0 in padding; real: [R, H].
        positions: [R, H] position ids.
        own_positions: [R] whether the rows stand at consecutive positions, whatever the batch says.
        kept: [R, K] rows of the look whose keys and values stay, 0 where it has fewer.
        shift: [R] positions by which they move on, so that those of later frames stand behind those of earlier ones.
        written: flat places in [R, H], and in the batch [B, L], of the rows whose output is handed on.
    """

    sample: Tensor
    rows: Tensor
    real: Tensor
    positions: Tensor
    own_positions: Tensor
    kept: Tensor
    shift: Tensor
    written: tuple[Tensor, Tensor]

    @property
    def moves(self) -> bool:
        return bool(self.shift.any())

    def some(self, chosen: slice) -> Looks:
        parts = ("sample", "rows", "real", "positions", "own_positions", "kept", "shift")
        return dataclasses.replace(self, **{name: getattr(self, name)[chosen] for name in parts})


@dataclasses.dataclass
class Division:
    """A batch of prompts, divided. All tensors are on the host.

    Attributes:
        looks: None where nothing has to be read.
        entries: [B, S] kept entries of all looks, numbered r * K + k, that the text of a sample sees; real_entries.
        text: [B, T] columns of the rows behind the last ``<voco>``, padded on the left; real_text: [B, T].
        border: [B] column of the last ``<voco>``, -1 without; last: [B] column of the last row of each prompt.
        positions: sample -> (columns, position ids) where they are not those of the batch.
    """

    looks: Looks | None
    entries: Tensor
    real_entries: Tensor
    text: Tensor
    real_text: Tensor
    border: Tensor
    last: Tensor
    positions: dict[int, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict)

    def pieces(self, sample: int, given: int | None = None) -> list[tuple[int, int]]:
        """What the decoder layers run for one sample: rows, and entries cached before them, of every look and of the
        text; ``given``: entries that are kept already."""
        text = int(self.real_text[sample].sum())
        if self.looks is None:
            return [(text, given or 0)]
        looked = self.looks.real[self.looks.sample == sample].sum(1).tolist()
        return [*((rows, 0) for rows in looked), (text, int(self.real_entries[sample].sum()))]


@dataclasses.dataclass
class PromptRows:
    """One prompt with its images and videos, rows counted without padding.

    Attributes:
        length: rows; offset: padding in front of them.
        voco: rows of the ``<voco>`` tokens, ascending.
        spans: of images and videos, with rows of the padded prompt.
        frames: for each video among them the frame [n] of each of its rows.
    """

    length: int
    offset: int
    voco: Sequence[int]
    spans: Sequence[VisualSpan]
    frames: Sequence[Tensor]


@dataclasses.dataclass
class _Part:
    """What a prompt brings to the looks: rows [F, H] with ``length`` in padding, and how many of the last ones stay."""

    rows: Tensor
    kept: int
    shift: Tensor
    video: bool


def divide(prompts: Sequence[PromptRows], width: int, shared_positions: bool) -> Division | None:
    """The division of a batch of ``width`` columns; None where no prompt has ``<voco>`` tokens.

    Args:
        shared_positions: the tokens of all frames of a video stand at the same positions, those of the first.

    Raises:
        MethodError: a video without ``<voco>`` tokens behind it.
    """
    parts = [_part(prompt, shared_positions) for prompt in prompts]
    if all(part is None for part in parts):
        return None
    kept = [0 if part is None else part.kept * len(part.rows) for part in parts]
    starts = [prompt.voco[-1] + 1 if prompt.voco else 0 for prompt in prompts]
    looks = _looks(prompts, parts, width)
    numbers, first, most = [], 0, looks.kept.shape[1]
    for part in parts:
        frames, own = (0, 0) if part is None else (len(part.rows), part.kept)
        numbers.append(((torch.arange(frames) + first)[:, None] * most + torch.arange(own)).flatten())
        first += frames
    entries, real_entries = _padded(numbers, max(kept))
    positions = {
        number: _text_positions(prompt, part, shared_positions)
        for number, (prompt, part) in enumerate(zip(prompts, parts, strict=True))
        if part is not None and part.video
    }
    return Division(looks, entries, real_entries, *_text(prompts, starts), positions)


def text_alone(prompts: Sequence[PromptRows]) -> Division:
    """The division of prompts that have nothing to be read in front of the text."""
    entries = torch.zeros(len(prompts), 0, dtype=torch.long)
    return Division(None, entries, entries.bool(), *_text(prompts, [0] * len(prompts)))


def _text(prompts: Sequence[PromptRows], starts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Columns of the text and which are real, the column in front of it, and the last one."""
    rows = [torch.arange(start, prompt.length) + prompt.offset for start, prompt in zip(starts, prompts, strict=True)]
    columns, real = _padded(rows, max(len(own) for own in rows))
    border = [start - 1 + prompt.offset if start else -1 for start, prompt in zip(starts, prompts, strict=True)]
    last = [prompt.offset + prompt.length - 1 for prompt in prompts]
    return columns, real, torch.tensor(border), torch.tensor(last)


def _part(prompt: PromptRows, shared_positions: bool) -> _Part | None:
    videos = [span for span in prompt.spans if span.modality == "video"]
    if not prompt.voco:
        if videos:
            raise MethodError("a video needs <voco> tokens behind it: its frames reach the text through them alone.")
        return None
    first, last = prompt.voco[0], prompt.voco[-1]
    kept = last - first + 1
    frame_of = torch.full((last + 1,), -1)
    seen = 0
    for span, frames in zip(videos, prompt.frames, strict=True):
        start = span.start - prompt.offset
        if start + span.length > first:
            raise MethodError("a video must stand in front of the first <voco>: its frames are read one by one.")
        frame_of[start : start + span.length] = frames + seen
        seen += span.frames
    common = (frame_of < 0).nonzero().squeeze(1)
    if not videos:
        return _Part(common[None], kept, torch.zeros(1, dtype=torch.long), video=False)
    own = (frame_of >= 0).nonzero().squeeze(1)
    own = own[torch.argsort(frame_of[own], stable=True)]
    counts = torch.bincount(frame_of[own], minlength=seen)
    of_frames, _ = _padded(own.split(counts.tolist()), int(counts.max()), fill=prompt.length)
    # beyond every row of the look: sorting puts padding behind
    rows = torch.cat([common.expand(seen, -1), of_frames], dim=1).sort(dim=1).values
    shift = counts.max() - counts
    if not shared_positions:
        shift = shift + torch.arange(seen) * kept
    return _Part(rows, kept, shift, video=True)


def _looks(prompts: Sequence[PromptRows], parts: Sequence[_Part | None], width: int) -> Looks:
    longest = max(part.rows.shape[1] for part in parts if part is not None)
    most = max(part.kept for part in parts if part is not None)
    sample, rows, real, kept, shift, video, written = [], [], [], [], [], [], []
    for number, (prompt, part) in enumerate(zip(prompts, parts, strict=True)):
        if part is None:
            continue
        here = part.rows < prompt.length
        more = longest - part.rows.shape[1]
        rows.append(torch.nn.functional.pad((part.rows + prompt.offset).masked_fill(~here, 0), (0, more)))
        real.append(torch.nn.functional.pad(here, (0, more)))
        count = here.sum(1, keepdim=True)
        slots = torch.arange(most)
        kept.append((count - part.kept + slots).masked_fill(slots >= part.kept, 0))
        shift.append(part.shift)
        sample += [number] * len(part.rows)
        video += [part.video] * len(part.rows)
        written += [False] * (len(part.rows) - 1) + [True]  # rows that all frames have: as the last one leaves them
    real_rows, columns, owner = torch.cat(real), torch.cat(rows), torch.tensor(sample)
    handed = real_rows & torch.tensor(written)[:, None]
    return Looks(
        sample=owner,
        rows=columns,
        real=real_rows,
        positions=torch.arange(longest).expand(len(sample), -1),
        own_positions=torch.tensor(video),
        kept=torch.cat(kept),
        shift=torch.cat(shift),
        written=(handed.flatten().nonzero().squeeze(1), (owner[:, None] * width + columns)[handed]),
    )


def _text_positions(prompt: PromptRows, part: _Part, shared: bool) -> tuple[Tensor, Tensor]:
    """Columns from the last ``<voco>`` on, and their positions behind the kept tokens of all frames."""
    longest = int((part.rows < prompt.length).sum(1).max())
    start = longest if shared else longest + (len(part.rows) - 1) * part.kept
    columns = torch.arange(prompt.voco[-1], prompt.length) + prompt.offset
    return columns, torch.arange(len(columns)) + start - 1


def _padded(values: Sequence[Tensor], width: int, fill: int = 0) -> tuple[Tensor, Tensor]:
    """[N, width] integers padded on the left with ``fill``, and which of them are real."""
    out = torch.full((len(values), width), fill)
    lengths = torch.tensor([len(value) for value in values])
    real = torch.arange(width) >= width - lengths[:, None]
    out[real] = torch.cat(list(values))
    return out, real


def visible(attention_mask: Tensor, voco: Tensor) -> Tensor:
    """[B, L, L] the mask of the official prefill, which row (second) sees which (third).

    Args:
        attention_mask: [B, L] False in padding; voco: [B, k] rows of the ``<voco>`` tokens, k may be 0.
    """
    real, length = attention_mask.bool(), attention_mask.shape[1]
    rows = torch.arange(length, device=real.device)
    seen = (rows[None, :] <= rows[:, None]) & real[:, None, :]
    if voco.shape[1]:
        low, high = voco.amin(1)[:, None, None], voco.amax(1)[:, None, None]
        seen = seen & torch.where(rows[None, :, None] <= high, rows <= high, rows >= low)
    # rows in front of the prompt would see nothing
    in_front = real.long().cumsum(1) == 0
    return seen | in_front[:, :, None]
