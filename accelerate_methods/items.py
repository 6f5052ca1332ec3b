"""One image or video between the vision side and the language model, before and after compression."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import MethodError

if TYPE_CHECKING:
    from .views import Views


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
        source: [N] flat index (view*P + patch) of each content token of an image; None for videos, and where tokens are
            mixtures of patches.
        views: an image's patch features before the projector, for a method that acts there. ``features`` and
            ``newlines`` are then placeholders of width 1.
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
    source: Tensor | None = None
    views: Views | None = None
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

    def signal(self, *names: str) -> Tensor:
        """A declared signal, or the first of several that is there; having none is the host's fault."""
        return pick_signal(self.signals, names, self.modality)

    def dense(self) -> Tensor:
        """[length, D] the uncompressed sequence."""
        flat = self.features.flatten(0, 1)
        if self.newlines is None:
            return flat  # content only: already in layout order
        out = flat.new_empty(self.length, flat.shape[-1])
        out[self.positions.flatten()] = flat
        out[self.newline_positions] = self.newlines.to(out.dtype)
        return out


def pick_signal(signals: dict[str, Tensor], names: tuple[str, ...], where: str) -> Tensor:
    """The first of ``names`` that is among ``signals``."""
    for name in names:
        if name in signals:
            return signals[name]
    have = ", ".join(sorted(signals)) or "none"
    wanted = " or ".join(repr(name) for name in names)
    raise MethodError(f"signal {wanted} was not provided for this {where} (provided: {have}).")


@dataclasses.dataclass
class Compressed:
    """What a compress stage gives back.

    Attributes:
        tokens: [K, D] content tokens that go on.
        positions: [K] layout row at which each stands (the row of the token that it was, or of the anchor that others
            were merged into).
        owner: [F, N] for every original content token the index (0..K-1) of the output token that holds it, -1 if none
            does. This is the provenance that pictures, statistics and tests read.
        info: what else the method can say (segment sizes, per-frame counts); its prefill stage gets it.
        order: "layout" sorts the tokens by ``positions``; "given" keeps them as they are here (a newline then closes
            those of its row or frame, too).
        newlines: "closing" keeps those whose row or frame still holds a token, "all" keeps every one, "last" only one
            after everything.
    """

    tokens: Tensor
    positions: Tensor
    owner: Tensor
    info: dict[str, object] = dataclasses.field(default_factory=dict)
    order: str = "layout"
    newlines: str = "closing"


@dataclasses.dataclass
class VisualSequence:
    """An item ready to be spliced into the prompt: content tokens and surviving newlines in layout order.

    Attributes:
        tokens: [R, D].
        positions: [R] layout rows; ascending unless the method gave another order.
        is_content: [R] False for newlines.
        modality: "image" or "video".
        length: rows of the uncompressed layout.
        num_content: content tokens, counted without a device read.
        owner: [F, N] index into ``tokens`` holding each original content token, -1 if dropped. After a method that acts
            on views: [V, P], over their patches.
        stands: like ``owner``, True where an output token stands.
    """

    tokens: Tensor
    positions: Tensor
    is_content: Tensor
    modality: str
    length: int
    num_content: int
    owner: Tensor
    stands: Tensor
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
        modality=item.modality,
        length=item.length,
        num_content=item.num_tokens,
        owner=item.positions,
        stands=torch.ones_like(item.positions, dtype=torch.bool),
    )


def assemble(item: VisualItem, compressed: Compressed) -> VisualSequence:
    """Put newlines back and bring everything into the order in which the LLM reads it.

    Which newlines return is ``Compressed.newlines``; with "closing", one survives if the row (or frame) it closes still
    holds a kept token, and the single newline after a "one_token" video always does (specs/fastvid.md section 7).
    """
    tokens, positions = compressed.tokens, compressed.positions
    content = tokens.shape[0]
    is_content = torch.ones(content, dtype=torch.bool, device=positions.device)
    kept = _surviving_newlines(item, compressed)
    # what is sorted by: the layout position, or with a given order the stretch that a newline closes
    key = positions
    if compressed.order == "given":
        stretches = item.newline_of is not None and compressed.newlines != "last"
        # content before stretch s: 2s, its newline: 2s + 1, content that no newline closes: -2
        key = item.newline_of[positions] * 2 if stretches else torch.zeros_like(positions)
    if kept is not None:
        at = item.newline_positions[kept]
        tokens = torch.cat([tokens, item.newlines[kept].to(tokens.dtype)])
        positions = torch.cat([positions, at])
        is_content = torch.cat([is_content, is_content.new_zeros(kept.shape[0])])
        if compressed.order == "given":
            at = item.newline_of[at] * 2 + 1 if compressed.newlines != "last" else torch.ones_like(at)
        key = torch.cat([key, at])
    order = torch.argsort(key, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.shape[0], device=order.device)
    owner = torch.where(compressed.owner >= 0, rank[compressed.owner.clamp(min=0)], compressed.owner)
    return VisualSequence(
        tokens=tokens[order],
        positions=positions[order],
        is_content=is_content[order],
        modality=item.modality,
        length=item.length,
        num_content=content,
        owner=owner,
        stands=torch.isin(item.positions, compressed.positions),
        info=compressed.info,
    )


def _surviving_newlines(item: VisualItem, compressed: Compressed) -> Tensor | None:
    """Indices into ``item.newlines``, or None if the layout has none."""
    if item.newlines is None or not item.newlines.shape[0]:
        return None
    count, device = item.newlines.shape[0], compressed.positions.device
    if compressed.newlines == "last":
        return torch.tensor([count - 1], device=device)
    if compressed.newlines == "all" or item.keep_all_newlines:
        return torch.arange(count, device=device)
    # One spare slot takes the rows that no newline closes (index -1).
    hit = torch.zeros(count + 1, dtype=torch.bool, device=device)
    hit[item.newline_of[compressed.positions]] = True
    return hit[:-1].nonzero().squeeze(1)


def selection(
    item: VisualItem, kept: Tensor, info: dict[str, object] | None = None, order: str = "layout"
) -> Compressed:
    """Compressed form of a pure selection: ``kept`` [K] are flat content indices (frame*N + token), in output order."""
    owner = torch.full((item.num_tokens,), -1, dtype=torch.long, device=item.features.device)
    owner[kept] = torch.arange(kept.shape[0], device=kept.device)
    return Compressed(
        tokens=item.features.flatten(0, 1)[kept],
        positions=item.positions.flatten()[kept],
        owner=owner.view(item.num_frames, item.tokens_per_frame),
        info=info or {},
        order=order,
    )
