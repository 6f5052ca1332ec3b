"""What the language model gets of an item: compressed tokens and newlines in the order in which they are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from accelerate_methods.stages.compress import Compressed, CompressMethod, VisualItem
from accelerate_methods.stages.contract import check_compressed, check_views
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.prefill import VisualSpan
from accelerate_methods.stages.printing import ShapesShown
from accelerate_methods.stages.views import CompressedViews, Views


@dataclasses.dataclass(repr=False)
class VisualSequence(ShapesShown):
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
        frames, frame_rows: as in :class:`.prefill.VisualSpan`.
        frame_marks: as in :class:`.compress.Compressed`.
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
    frames: int = 1
    frame_rows: int | None = None
    frame_marks: bool = True

    def span(self, start: int, item: int) -> VisualSpan:
        """Where it stands in a prompt, from row ``start`` on; ``item``: its number in the sample."""
        rows = self.tokens.shape[0]
        return VisualSpan(
            start, rows, self.modality, self.num_content, self.info, item, self.frames, self.frame_rows
        )

    def first(self, rows: int) -> VisualSequence:
        """What is left of the sequence where a prompt ends after ``rows`` of its rows.

        What the method said is about the whole sequence and no longer true (``info`` is empty). Reads the device once.
        """
        if rows >= self.tokens.shape[0]:
            return self
        held = (self.owner >= 0) & (self.owner < rows)
        content = self.is_content[:rows]
        return dataclasses.replace(
            self,
            tokens=self.tokens[:rows],
            positions=self.positions[:rows],
            is_content=content,
            num_content=int(content.sum()),
            owner=self.owner.masked_fill(~held, -1),
            stands=self.stands & held,
            info={},
        )


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
        frames=item.num_frames,
        frame_rows=item.frame_rows,
    )


def assemble(item: VisualItem, compressed: Compressed) -> VisualSequence:
    """Put newlines back and bring everything into the order in which the LLM reads it.

    Which newlines return is ``Compressed.newlines``; with "closing", one survives if the row (or frame) it closes still
    holds a kept token, and the single newline after a "one_token" video always does (docs/methods/fastvid.md, step 7).
    """
    positions, source = compressed.positions, compressed.source
    content, device = positions.shape[0], positions.device
    dtype = (compressed.tokens if source is None else source[0]).dtype
    newlines, rows = _surviving_newlines(item, compressed), None
    is_content = torch.ones(content, dtype=torch.bool, device=device)
    # what is sorted by: the layout position, or with a given order the stretch that a newline closes
    key = positions
    in_order, stretch = _in_order(item, compressed), item.newline_of
    each = compressed.newlines == "each"
    if compressed.newlines == "behind" and item.frame_rows:
        stretch = torch.arange(item.length, device=device) // item.frame_rows
    if each:
        key = 2 * (positions if compressed.order == "layout" else torch.arange(content, device=device))
    elif not in_order and compressed.order == "given":
        # content before stretch s: 2s, its newline: 2s + 1, content that no newline closes: -2
        key = stretch[positions] * 2
    if newlines is not None:
        at, rows = item.newline_positions[newlines], item.newlines[newlines].to(dtype)
        positions = torch.cat([positions, at])
        is_content = torch.cat([is_content, is_content.new_zeros(at.shape[0])])
        if not in_order:
            given = key + 1 if each else stretch[at] * 2 + 1 if compressed.order == "given" else at
            key = torch.cat([key, given])
    owner = compressed.owner
    order = rank = None
    if not in_order:
        order = torch.argsort(key, stable=True)
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=device))
        positions, is_content = positions[order], is_content[order]
        owner = torch.where(owner >= 0, rank[owner.clamp(min=0)], owner)
    stands = torch.zeros(item.length, dtype=torch.bool, device=device).index_fill_(0, compressed.positions, True)
    return VisualSequence(
        tokens=_placed(compressed, rows, order, rank),
        positions=positions,
        is_content=is_content,
        modality=item.modality,
        length=item.length,
        num_content=content,
        owner=owner,
        stands=stands[item.positions],
        info=compressed.info,
        frames=item.num_frames,
        frame_rows=item.frame_rows,
        frame_marks=compressed.frame_marks,
    )


def _placed(compressed: Compressed, newlines: Tensor | None, order: Tensor | None, rank: Tensor | None) -> Tensor:
    """[R, D] tokens and newlines in the order in which they are read: the tokens are what takes memory, and are copied
    once.

    Args:
        newlines: [S, D] that follow the tokens, or None.
        order: [R] which of all these stands in each place; None: they stand in order; rank: its inverse.
    """
    if compressed.source is None:
        tokens = compressed.tokens
        if order is None:
            return tokens if newlines is None else torch.cat([tokens, newlines])
        if newlines is None:
            return tokens[order]
        out = tokens.new_empty(order.shape[0], tokens.shape[-1])
        out.index_copy_(0, rank[: tokens.shape[0]], tokens)
        return out.index_copy_(0, rank[tokens.shape[0] :], newlines)
    features, rows = compressed.source
    content = rows.shape[0]
    if newlines is not None:  # any row holds their places
        rows = torch.cat([rows, rows.new_zeros(newlines.shape[0])])
    tokens = features.index_select(0, rows if order is None else rows[order])
    if newlines is None:
        return tokens
    if order is None:
        tokens[content:] = newlines
        return tokens
    return tokens.index_copy_(0, rank[content:], newlines)


def _in_order(item: VisualItem, compressed: Compressed) -> bool:
    """Whether the LLM reads the tokens as they are given, and what newlines there are after them."""
    if compressed.order != "given" or compressed.newlines == "each":
        return False
    return item.newline_of is None or compressed.newlines == "last" or item.layout == "one_token"


def _surviving_newlines(item: VisualItem, compressed: Compressed) -> Tensor | None:
    """Indices into ``item.newlines``, or None if the layout has none.

    How many rows or frames of a layout with several newlines still hold a token is for the device to say: one read.
    """
    if item.newlines is None or not item.newlines.shape[0]:
        return None
    count, device = item.newlines.shape[0], compressed.positions.device
    if compressed.newlines == "each":
        return item.newline_of[compressed.positions].clamp(min=0)
    if compressed.newlines == "last":
        return torch.arange(count - 1, count, device=device)
    if compressed.newlines in ("all", "behind") or item.keep_all_newlines:
        return torch.arange(count, device=device)
    # One spare slot takes the rows that no newline closes (index -1).
    hit = torch.zeros(count + 1, dtype=torch.bool, device=device)
    hit[item.newline_of[compressed.positions]] = True
    return hit[:-1].nonzero().squeeze(1)


def compressed_sequence(
    item: VisualItem, method: CompressMethod | None, project: Callable[[Tensor], Tensor]
) -> VisualSequence:
    """What goes to the language model of one item, under a compress method or none.

    Args:
        method: one that does not act on this kind of item leaves it as it is.
        project: projector, [K, M] -> [K, D], for a method that acts before it.
    """
    if method is None or item.modality not in method.modalities:
        return uncompressed(item)
    if item.views is None:
        selected = method.compress(item)
        check_compressed(method.name, selected, item)
        return assemble(item, selected)
    compressed = method.compress_views(item.views)
    if compressed is None:
        return uncompressed(item.views.uncompressed())
    check_views(method.name, compressed, item.views)
    return assemble_views(item, item.views, compressed, project)


def assemble_views(
    item: VisualItem, views: Views, compressed: CompressedViews, project: Callable[[Tensor], Tensor]
) -> VisualSequence:
    """Project and order what is left of an image.

    A single view, and views that are no tiles, keep the given order. With tiles: the base view; the tiles' patches in
    raster order of the whole image (rows of tiles beside each other interleave); then section after section, view after
    view. So the official codes of VisionZip and FasterVLM do
    (docs/methods/visionzip.md, step 4; docs/methods/fastervlm.md, step 3).

    Args:
        item: the image's layout (``newlines`` in the LLM's width).
        project: projector, [K, M] -> [K, D].
    """
    if compressed.newlines == "checkpoint":
        return _as_checkpoint(item, views, compressed, project)
    tokens, device = project(compressed.tokens), compressed.tokens.device
    count = tokens.shape[0]
    rank = torch.arange(count, device=device)
    if views.tiles is not None:
        order = torch.argsort(_reading_key(views, compressed), stable=True)
        tokens = tokens[order]
        rank = torch.empty_like(order).scatter_(0, order, rank)
    is_content = torch.ones(count, dtype=torch.bool, device=device)
    if compressed.newlines == "single" and views.num_views == 1 and item.newlines is not None:
        tokens = torch.cat([tokens, item.newlines[-1:].to(tokens.dtype)])
        is_content = torch.cat([is_content, is_content.new_zeros(1)])
    held = torch.where(compressed.owner >= 0, rank[compressed.owner.clamp(min=0)], compressed.owner)
    return VisualSequence(
        tokens=tokens,
        positions=torch.arange(tokens.shape[0], device=device),
        is_content=is_content,
        modality=item.modality,
        length=item.length,
        num_content=count,
        owner=held,
        stands=_standing(views, compressed),
        info=compressed.info,
    )


def _reading_key(views: Views, compressed: CompressedViews) -> Tensor:
    """[K] integers whose order is the reading order of an image with tiles."""
    rows, columns = views.grid
    across, down = views.tiles
    tile = compressed.view - 1
    row = tile // across * rows + compressed.patch // columns
    column = tile % across * columns + compressed.patch % columns
    cells = across * columns * down * rows
    cell = row * (across * columns) + column
    # base view, then cells, then a stretch of `views` keys per section
    key = torch.where(compressed.section == 0, cell, cells + (compressed.section - 1) * views.num_views + tile)
    return torch.where(compressed.view == 0, -1, key)


def _standing(views: Views, compressed: CompressedViews) -> Tensor:
    """[V, P] True where a token stands. A spare column takes the special tokens (patch -1)."""
    count, patches = views.num_views, views.tokens_per_view
    stands = torch.zeros(count, patches + 1, dtype=torch.bool, device=compressed.view.device)
    stands[compressed.view, compressed.patch] = True
    return stands[:, :patches]


def _as_checkpoint(
    item: VisualItem, views: Views, compressed: CompressedViews, project: Callable[[Tensor], Tensor]
) -> VisualSequence:
    """The kept patches inside the checkpoint's own layout; those that stand in padding are lost."""
    if item.source is None:
        raise MethodError(
            "this image was shrunk to the checkpoint's token limit: its tokens are mixtures of patches, and patches "
            "cannot be kept in the checkpoint's layout; use the method's own one (merge='spatial')."
        )
    slot = torch.full((views.num_views * views.tokens_per_view,), -1, dtype=torch.long, device=item.source.device)
    slot[compressed.view * views.tokens_per_view + compressed.patch] = torch.arange(
        compressed.tokens.shape[0], device=slot.device
    )
    at = slot[item.source]
    kept = (at >= 0).nonzero().squeeze(1)
    owner = torch.full_like(at, -1)
    owner[kept] = torch.arange(kept.shape[0], device=kept.device)
    return assemble(
        item,
        Compressed(
            tokens=project(compressed.tokens[at[kept]]),
            positions=item.positions.flatten()[kept],
            owner=owner[None],
            info=compressed.info,
            newlines="all",
        ),
    )
