"""Per-request facts: tokens before and after, milliseconds per stage, LLM work. Off unless a recorder is open.

Recorders live in a context variable, so two threads or two nested blocks never see each other's requests, and nothing
is stored on a model::

    with record() as requests:
        model.generate(...)
    requests[0].samples[0].visual_tokens_after, requests[0].stage_ms["prefill"]

Printed, a record is one line without tensors; it says which prompt was cut.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate_methods.engine.sequences import VisualSequence
    from accelerate_methods.stages.compress import VisualItem

_active: ContextVar[list[RequestRecord] | None] = ContextVar("accelerate_methods_recorder", default=None)
_SHOWN = 2  # samples of a request that its line shows


@dataclasses.dataclass(repr=False)
class ItemRecord:
    """One image or video of a sample.

    Attributes:
        tokens_before, tokens_after: visual tokens without compression, and those that the first decoder layer gets.
        full_length: rows of the prompt that the item takes without compression, newlines included.
        grid: (rows, columns) of a frame or view, if there is one.
        owner: [F, N] for every original token the row of the item that holds it at the first decoder layer, -1 if none
            does; ``kept``: [F, N] True where such a row stands.
        left_at: [F, N] decoder layer before which the row that holds the token was dropped; ``num_layers`` if it never
            was; 0 where no row holds it. None as long as no layer has run.
        merged_at: [F, N] decoder layer before which the row that holds the token was merged into another one;
            ``num_layers`` if it never was. None as long as no layer has run.
        held_by: [F, N] row of the (padded) prompt at whose place the token's content stands after the last layer, -1 if
            it was dropped; None where no decoder layer dropped or merged anything.
        positions: [R] layout row of each of the item's rows.
        start: where the item begins in the (padded) prompt; rows: [R] where each of its rows stands there, if there
            may be text in between.
        info: what the method said.

    Of a prompt that was cut (:attr:`SampleRecord.cut`) the rows that were lost hold nothing: ``owner`` is -1 and
    ``kept`` False where they would have, ``tokens_after`` does not count them. An item of which nothing is left is
    recorded, too.
    """

    modality: str
    tokens_before: int
    tokens_after: int
    start: int = 0
    rows: torch.Tensor | None = None
    grid: tuple[int, int] | None = None
    owner: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    left_at: torch.Tensor | None = None
    merged_at: torch.Tensor | None = None
    held_by: torch.Tensor | None = None
    num_layers: int = 0
    full_length: int = 0
    info: dict[str, object] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        said = [f"{self.modality}: {self.tokens_before} -> {self.tokens_after} visual tokens"]
        if self.owner is not None:
            said.append(f"owner [{', '.join(map(str, self.owner.shape))}]")
        if self.grid is not None:
            said.append(f"grid {self.grid[0]} x {self.grid[1]}")
        if self.info:
            said.append(f"info {', '.join(self.info)}")
        return f"ItemRecord({'; '.join(said)})"


def item_record(
    item: VisualItem, sequence: VisualSequence, *, tokens_after: int, start: int = 0, rows: torch.Tensor | None = None
) -> ItemRecord:
    """Record of ``item``, of which ``sequence`` goes to the language model; the rest as in :class:`ItemRecord`.

    After an encode method, ``owner`` and ``kept`` are over the encoder's patches.
    """
    grid = item.grid if item.views is None else item.views.grid
    owner, kept = sequence.owner, sequence.stands
    if item.patches is not None:
        at, grid = item.patches.owner, item.patches.grid
        owner = owner.flatten()[at.clamp(min=0)].masked_fill(at < 0, -1)
        kept = item.patches.stands & (owner >= 0) & kept.flatten()[at.clamp(min=0)]
    return ItemRecord(
        modality=item.modality,
        tokens_before=item.full_tokens or item.num_tokens,
        tokens_after=tokens_after,
        start=start,
        rows=rows,
        grid=grid,
        owner=owner,
        positions=sequence.positions,
        kept=kept,
        full_length=item.full_length or item.length,
        info=sequence.info,
    )


@dataclasses.dataclass(repr=False)
class SampleRecord:
    """One row of a batch. Token counts are content tokens; newlines count in the sequence lengths.

    Attributes:
        dense_length: prompt length (text and all visual tokens) that the language model gets without compression.
        length: what layer 0 saw.
        cut: rows lost at the end of the prompt, which was longer than the model's context.
        untrained: rows that were not cut but stand at positions for which the model was not trained.
        over_dense: rows by which the uncompressed prompt is longer than the context: more than 0 also where the
            compressed one fits. What is relative to the dense run is then relative to answers without their question.
        limit: rows that the context holds, None if the config does not say.
        prefill_macs: multiply-accumulates of the decoder layers until the prompt is read, where it is read in several
            calls; None: they follow from the rows that each layer gets.
    """

    items: list[ItemRecord] = dataclasses.field(default_factory=list)
    dense_length: int = 0
    length: int = 0
    cut: int = 0
    untrained: int = 0
    over_dense: int = 0
    limit: int | None = None
    prefill_macs: int | None = None

    @property
    def visual_tokens_before(self) -> int:
        return sum(i.tokens_before for i in self.items)

    @property
    def visual_tokens_after(self) -> int:
        return sum(i.tokens_after for i in self.items)

    def count_left_out(self, thinned: Sequence[tuple[int, int]]) -> None:
        """Count the frames that a method kept from the model in what the uncompressed prompt would have been.

        Args:
            thinned: (frames without the method, frames) of each of the sample's videos.
        """
        videos = [item for item in self.items if item.modality == "video"]
        for item, (whole, there) in zip(videos, thinned, strict=False):
            newlines = item.full_length - item.tokens_before
            per_frame = newlines if newlines >= there else 0  # one at the end of a video does not grow with it
            self.dense_length += (item.tokens_before + per_frame) * (whole - there) // there
            item.tokens_before += item.tokens_before * (whole - there) // there

    @property
    def trouble(self) -> str:
        """What became of a prompt that is longer than the model's context, in words; "" if it fits."""
        holds = "" if self.limit is None else f", the context holds {self.limit}"
        if self.cut:
            return f"cut: lost its last {self.cut} tokens{holds}"
        if self.untrained:
            return f"its last {self.untrained} tokens stand beyond the training{holds}"
        return f"uncompressed it would be {self.over_dense} tokens too long{holds}" if self.over_dense else ""

    def __repr__(self) -> str:
        return f"SampleRecord({'; '.join(filter(None, (self._lengths(), self.trouble)))})"

    def _lengths(self) -> str:
        counts = collections.Counter(item.modality for item in self.items)
        items = ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in counts.items()) or "text only"
        visual = f"visual tokens {self.visual_tokens_before} -> {self.visual_tokens_after}, " if self.items else ""
        return f"{items}: {visual}prompt {self.dense_length} -> {self.length}"


class RequestRecord:
    """One ``forward`` or ``generate`` call: its samples, stage times and number of decode steps."""

    def __init__(self) -> None:
        self.samples: list[SampleRecord] = []
        self.layer_tokens: list[list[int] | torch.Tensor] = []
        #: after each call, the entries that every decoder layer caches (padding included): prompt, then decode steps
        self.cached: list[list[int]] = []
        self.decode_steps = 0
        self._spans: list[tuple[str, object]] = []

    def __repr__(self) -> str:
        said = [f"sample {number}: {sample._lengths()}" for number, sample in enumerate(self.samples[:_SHOWN])]
        if len(self.samples) > _SHOWN:
            said.append(f"{len(self.samples) - _SHOWN} more samples")
        troubled = [(number, sample.trouble) for number, sample in enumerate(self.samples) if sample.trouble]
        said += [f"the prompt of sample {number}: {trouble}" for number, trouble in troubled[:_SHOWN]]
        if len(troubled) > _SHOWN:
            said.append(f"so are {len(troubled) - _SHOWN} more prompts")
        said.append(f"{self.decode_steps} decode steps")
        said += [f"{name} {ms:.3g} ms" for name, ms in self.stage_ms.items()]
        return f"RequestRecord({'; '.join(said)})"

    @property
    def stage_ms(self) -> dict[str, float]:
        """Milliseconds per stage (vision, compress, prefill, decode), summed. Synchronises CUDA when read."""
        total: dict[str, float] = {}
        for name, span in self._spans:
            if isinstance(span, tuple):
                start, end = span
                end.synchronize()
                elapsed = start.elapsed_time(end)
            else:
                elapsed = span
            total[name] = total.get(name, 0.0) + elapsed
        return total

    def layer_lengths(self, sample: int) -> list[int]:
        """Prompt tokens of one sample that each decoder layer processed in prefill. May synchronise."""
        return [int(tokens[sample * (len(tokens) // len(self.samples))]) for tokens in self.layer_tokens]  # beams

    def started(self, layers: int) -> None:
        """Prefill begins, through ``layers`` layers unless :meth:`went_on` says otherwise."""
        for sample in self.samples:
            for item in sample.items:
                item.num_layers = layers
                item.left_at = (item.owner >= 0).long() * layers
                item.merged_at = torch.full_like(item.left_at, layers)

    def went_on(self, layer: int, held: torch.Tensor, kept: torch.Tensor) -> None:
        """What goes on to ``layer`` of the prompt.

        Args:
            held: [B, L] which of the rows that go on holds each row of the prompt, -1 if none does.
            kept: [B, K] the row of the prompt at whose place each of them stands.
        """
        beams = held.shape[0] // len(self.samples) if self.samples else 1
        stands = torch.where(held >= 0, kept.gather(1, held.clamp(min=0)), held)
        for sample, here in zip(self.samples, stands[::beams], strict=False):
            for item in sample.items:
                own = item.owner.clamp(min=0)
                at = own + item.start if item.rows is None else item.rows[own]
                now = here.to(item.owner.device)[at].masked_fill(item.owner < 0, -1)
                item.left_at = torch.where(now >= 0, item.left_at, item.left_at.clamp(max=layer))
                item.merged_at = torch.where((now < 0) | (now == at), item.merged_at, item.merged_at.clamp(max=layer))
                item.held_by = now

    @contextlib.contextmanager
    def span(self, name: str, device: torch.device) -> Iterator[None]:
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(torch.cuda.current_stream(device))
            yield
            end.record(torch.cuda.current_stream(device))
            self._spans.append((name, (start, end)))
        else:
            begin = time.perf_counter()
            yield
            self._spans.append((name, 1000.0 * (time.perf_counter() - begin)))


@contextlib.contextmanager
def record() -> Iterator[list[RequestRecord]]:
    """Collect a :class:`RequestRecord` for every request made inside the block."""
    requests: list[RequestRecord] = []
    token = _active.set(requests)
    try:
        yield requests
    finally:
        _active.reset(token)


def new_request() -> RequestRecord | None:
    """Open a record if somebody is listening."""
    requests = _active.get()
    if requests is None:
        return None
    requests.append(RequestRecord())
    return requests[-1]


def listens_to(request: RequestRecord | None) -> bool:
    """Whether ``request`` belongs to the recorder that is open."""
    return request is not None and any(other is request for other in _active.get() or ())


@contextlib.contextmanager
def stage(request: RequestRecord | None, name: str, device: torch.device) -> Iterator[None]:
    """Time a block into ``request``; free when nobody listens."""
    if request is None:
        yield
        return
    with request.span(name, device):
        yield
