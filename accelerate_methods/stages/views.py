"""An image as the vision encoder saw it: one or several square views, before the projector.

Methods that act here (``ViewCompressMethod``) choose and merge patches inside every view;
:mod:`accelerate_methods.engine.sequences` gives the result the order in which the LLM reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accelerate_methods.ops.select import pick_rows
from accelerate_methods.stages.printing import ShapesShown
from accelerate_methods.stages.shapes import ItemShape
from accelerate_methods.stages.signals import pick_signal


@dataclasses.dataclass(repr=False)
class Views(ShapesShown):
    """The views of one image.

    Attributes:
        features: [V, P, M] patch features of the encoder.
        special: [V, S, M] what the encoder puts before the patches (the CLS token of CLIP), or None.
        grid: (rows, columns) of a view's patches, rows*columns == P.
        tiles: (columns, rows) in which views 1.. tile the image, view 0 being the whole image; None if they do not.
        signals: what the method asked for (see :data:`.signals.SIGNALS`), over the P patches.
        uncompressed: gives the image (a ``VisualItem``) as the model has it without any method, for a method that
            leaves it alone.
        project: the model's projector, [..., M] -> [..., D], for a method that compares tokens as the language model
            would get them.
        question: what the user asks about the image, None if nobody said.
        size: (width, height) of an image of one view that was padded to a square; None if it was not, or nobody said.
    """

    features: Tensor
    grid: tuple[int, int]
    special: Tensor | None = None
    tiles: tuple[int, int] | None = None
    signals: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    uncompressed: Callable[[], Any] | None = None
    project: Callable[[Tensor], Tensor] | None = None
    question: str | None = None
    size: tuple[int, int] | None = None

    @property
    def num_views(self) -> int:
        return self.features.shape[0]

    @property
    def tokens_per_view(self) -> int:
        return self.features.shape[1]

    @property
    def shape(self) -> ItemShape:
        """Without what only the layout knows: ``length`` and ``dense``."""
        return ItemShape(self.num_views, self.tokens_per_view, self.grid, on_views=True)

    def signal(self, *names: str) -> Tensor:
        """A declared signal, or the first of several that is there."""
        return pick_signal(self.signals, names, "image")


@dataclasses.dataclass(repr=False)
class CompressedViews(ShapesShown):
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


def view_selection(views: Views, kept: Tensor, newlines: str = "none") -> CompressedViews:
    """Compressed form of a pure selection: the patches ``kept`` [V, K] of every view, ascending."""
    count, per_view = kept.shape
    rows = torch.arange(kept.numel(), device=kept.device).view_as(kept)
    owner = torch.full(views.features.shape[:2], -1, dtype=torch.long, device=kept.device)
    return CompressedViews(
        tokens=pick_rows(views.features, kept).flatten(0, 1),
        view=torch.arange(count, device=kept.device).repeat_interleave(per_view),
        patch=kept.flatten(),
        section=torch.zeros(kept.numel(), dtype=torch.long, device=kept.device),
        owner=owner.scatter_(1, kept, rows),
        newlines=newlines,
    )


def view_merge(views: Views, tokens: Tensor, patch: Tensor, slot: Tensor, last: int = 0) -> CompressedViews:
    """Compressed form of tokens that hold others, as many in every view.

    Args:
        tokens: [V, K, M]; patch: [V, K] the patches at which they stand.
        slot: [V, P] which token of its view holds each patch, -1 if none does.
        last: how many at the end of each view's tokens follow after all patches of an image with tiles.
    """
    count, each = patch.shape
    first = torch.arange(0, count * each, each, device=slot.device)[:, None]
    section = (torch.arange(each, device=slot.device) >= each - last).long()
    return CompressedViews(
        tokens=tokens.flatten(0, 1),
        view=torch.arange(count, device=slot.device).repeat_interleave(each),
        patch=patch.flatten(),
        section=section.repeat(count),
        owner=torch.where(slot >= 0, slot + first, slot),
    )
