"""One image or video between the vision side and the language model, before and after compression."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .errors import MethodError


@dataclasses.dataclass
class VisualItem:
    """The visual tokens of one image or video as the uncompressed model would feed them to the LLM.

    The uncompressed sequence ("layout") has ``length`` rows: F*N content tokens and S structural ones (newlines).

    Attributes:
        modality: "image" or "video".
        features: [F, N, D] content tokens; F frames of a video, 1 for an image (all of its crops in one row).
        positions: [F, N] row of each content token in the layout.
        length: rows of the layout.
        layout: newline arrangement: "flat", "one_token", "grid", "frame", "no_token" or "anyres".
        grid: (rows, columns) of a frame's token grid with rows*columns == N, or None when there is no single grid.
        newlines: [S, D] structural tokens.
        newline_positions: [S] their rows in the layout.
        newline_of: [length] for each layout row the index (0..S-1) of the newline that closes its row/frame, else -1.
        keep_all_newlines: whether newlines stay even if nothing in their row/frame does.
        signals: what the method asked for (see ``base.SIGNALS``).
        full_tokens, full_length: content tokens and layout rows at the full input size, where a sample stage made the
            input smaller; None otherwise.
    """

    modality: str
    features: Tensor
    positions: Tensor
    length: int
    layout: str = "flat"
    grid: tuple[int, int] | None = None
    newlines: Tensor | None = None
    newline_positions: Tensor | None = None
    newline_of: Tensor | None = None
    keep_all_newlines: bool = False
    signals: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    full_tokens: int | None = None
    full_length: int | None = None

    @property
    def num_frames(self) -> int:
        return self.features.shape[0]

    @property
    def tokens_per_frame(self) -> int:
        return self.features.shape[1]

    @property
    def num_tokens(self) -> int:
        """Content tokens F*N (newlines not counted)."""
        return self.features.shape[0] * self.features.shape[1]

    def signal(self, name: str) -> Tensor:
        """A declared signal; a missing one is the host's fault and is said clearly."""
        try:
            return self.signals[name]
        except KeyError:
            have = ", ".join(sorted(self.signals)) or "none"
            message = f"signal {name!r} was not provided for this {self.modality} (provided: {have})."
            raise MethodError(message) from None

    def dense(self) -> Tensor:
        """[length, D] the uncompressed sequence."""
        flat = self.features.flatten(0, 1)
        if self.newlines is None:
            return flat  # content only: already in layout order
        out = flat.new_empty(self.length, flat.shape[-1])
        out[self.positions.flatten()] = flat
        out[self.newline_positions] = self.newlines.to(out.dtype)
        return out


@dataclasses.dataclass
class Compressed:
    """What a compress stage gives back.

    Attributes:
        tokens: [K, D] content tokens that go on.
        positions: [K] layout row at which each stands (the row of the token that it was, or of the anchor that others
            were merged into).
        owner: [F, N] for every original content token the index (0..K-1) of the output token that holds it, -1 if none
            does. This is the provenance that pictures, statistics and tests read.
        info: what else the method can say (segment sizes, per-frame counts); not used by the host.
    """

    tokens: Tensor
    positions: Tensor
    owner: Tensor
    info: dict[str, object] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class VisualSequence:
    """An item ready to be spliced into the prompt: content tokens and surviving newlines in layout order.

    Attributes:
        tokens: [R, D].
        positions: [R] ascending layout rows.
        is_content: [R] False for newlines.
        length: rows of the uncompressed layout.
        num_content: content tokens, counted without a device read.
        owner: [F, N] index into ``tokens`` holding each original content token, -1 if dropped; None when uncompressed.
    """

    tokens: Tensor
    positions: Tensor
    is_content: Tensor
    length: int
    num_content: int
    owner: Tensor | None = None
    info: dict[str, object] = dataclasses.field(default_factory=dict)


def uncompressed(item: VisualItem) -> VisualSequence:
    """The item as it is."""
    tokens = item.dense()
    positions = torch.arange(item.length, device=tokens.device)
    content = torch.ones(item.length, dtype=torch.bool, device=tokens.device)
    if item.newline_positions is not None:
        content[item.newline_positions] = False
    return VisualSequence(
        tokens=tokens,
        positions=positions,
        is_content=content,
        length=item.length,
        num_content=item.num_tokens,
    )


def assemble(item: VisualItem, compressed: Compressed) -> VisualSequence:
    """Put back the newlines that still close something and sort everything by layout position.

    A newline survives if the row (or frame) it closes still holds a kept token; the single newline after a
    "one_token" video always does (specs/fastvid.md section 7).
    """
    tokens, positions = compressed.tokens, compressed.positions
    is_content = torch.ones(positions.shape[0], dtype=torch.bool, device=positions.device)
    if item.newlines is not None and item.newlines.shape[0]:
        alive = torch.ones(item.newlines.shape[0], dtype=torch.bool, device=positions.device)
        if not item.keep_all_newlines:
            # One spare slot takes the rows that no newline closes (index -1).
            hit = torch.zeros(item.newlines.shape[0] + 1, dtype=torch.bool, device=positions.device)
            hit[item.newline_of[positions]] = True
            alive = hit[:-1]
        kept = alive.nonzero().squeeze(1)
        tokens = torch.cat([tokens, item.newlines[kept].to(tokens.dtype)])
        positions = torch.cat([positions, item.newline_positions[kept]])
        is_content = torch.cat([is_content, is_content.new_zeros(kept.shape[0])])
    order = torch.argsort(positions, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.shape[0], device=order.device)
    owner = torch.where(compressed.owner >= 0, rank[compressed.owner.clamp(min=0)], compressed.owner)
    return VisualSequence(
        tokens=tokens[order],
        positions=positions[order],
        is_content=is_content[order],
        length=item.length,
        num_content=compressed.positions.shape[0],
        owner=owner,
        info=compressed.info,
    )


def selection(item: VisualItem, kept: Tensor, info: dict[str, object] | None = None) -> Compressed:
    """Compressed form of a pure selection: ``kept`` [K] are flat content indices (frame*N + token), in output order."""
    owner = torch.full((item.num_tokens,), -1, dtype=torch.long, device=item.features.device)
    owner[kept] = torch.arange(kept.shape[0], device=kept.device)
    return Compressed(
        tokens=item.features.flatten(0, 1)[kept],
        positions=item.positions.flatten()[kept],
        owner=owner.view(item.num_frames, item.tokens_per_frame),
        info=info or {},
    )
