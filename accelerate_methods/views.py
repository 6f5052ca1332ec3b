"""An image as the vision encoder saw it: one or several square views, before the projector.

Methods that act here (``base.ViewCompressMethod``) choose and merge patches inside every view; :func:`assemble_views`
gives the result the order in which the LLM reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import MethodError
from .items import Compressed, VisualItem, VisualSequence, assemble, pick_signal, uncompressed

if TYPE_CHECKING:
    from .base import CompressMethod


@dataclasses.dataclass
class Views:
    """The views of one image.

    Attributes:
        features: [V, P, M] patch features of the encoder.
        special: [V, S, M] what the encoder puts before the patches (the CLS token of CLIP), or None.
        grid: (rows, columns) of a view's patches, rows*columns == P.
        tiles: (columns, rows) in which views 1.. tile the image, view 0 being the whole image; None if they do not.
        signals: what the method asked for (see ``base.SIGNALS``), over the P patches.
        uncompressed: gives the image as the model has it without any method, for a method that leaves it alone.
    """

    features: Tensor
    grid: tuple[int, int]
    special: Tensor | None = None
    tiles: tuple[int, int] | None = None
    signals: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    uncompressed: Callable[[], VisualItem] | None = None

    @property
    def num_views(self) -> int:
        return self.features.shape[0]

    @property
    def tokens_per_view(self) -> int:
        return self.features.shape[1]

    def signal(self, *names: str) -> Tensor:
        """A declared signal, or the first of several that is there."""
        return pick_signal(self.signals, names, "image")


@dataclasses.dataclass
class CompressedViews:
    """What goes on of an image's views.

    Attributes:
        tokens: [K, M], view after view, in the order in which a single view is read.
        view: [K] view of each token; patch: [K] the patch at which it stands, -1 for a special token.
        section: [K] 0 for tokens that return to their place when tiles are stitched together; 1, 2, ... for those that
            follow after all patches, section by section.
        owner: [V, P] for every patch the index (0..K-1) of the token that holds it, -1 if none does.
        newlines: "none"; "single" for one newline after an image of a single view, if the checkpoint puts one there; or
            "checkpoint": the checkpoint's own unpadding and newlines, all of which stay (section 0 tokens only).
    """

    tokens: Tensor
    view: Tensor
    patch: Tensor
    section: Tensor
    owner: Tensor
    newlines: str = "none"
    info: dict[str, object] = dataclasses.field(default_factory=dict)


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
        return assemble(item, method.compress(item))
    compressed = method.compress_views(item.views)
    if compressed is None:
        return uncompressed(item.views.uncompressed())
    return assemble_views(item, item.views, compressed, project)


def assemble_views(
    item: VisualItem, views: Views, compressed: CompressedViews, project: Callable[[Tensor], Tensor]
) -> VisualSequence:
    """Project and order what is left of an image.

    A single view, and views that are no tiles, keep the given order. With tiles: the base view; the tiles' patches in
    raster order of the whole image (rows of tiles beside each other interleave); then section after section, view after
    view. Sources: specs/visionzip.md section 4, specs/fastervlm.md section 2.

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
