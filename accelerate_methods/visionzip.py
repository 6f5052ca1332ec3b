"""VisionZip: longer is better but not necessary in vision language models (CVPR 2025, arXiv 2412.04467).

Every view of an image becomes, before the projector,

1. **dominant** tokens, unchanged: the CLS token and the patches that it attends to most;
2. **contextual** tokens: the other patches, folded by the similarity of their keys into a few of them that are evenly
   spaced (``ops.contextual``). As in the official code, and unlike the paper's text, such a token is the *sum* of a
   patch and the mean of those folded into it.

Attention and keys come from the encoder layer whose output is the visual feature. The question is not looked at. The
official code is for CLIP; for encoders without a CLS token (SigLIP) and for videos we follow the port that HoliTom
(cokeshao/HoliTom@e9b2972) compares itself with: patches are scored by the attention they receive, and a video is
compressed frame by frame after projector and pooling. The steps named below are those of docs/methods/visionzip.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from accelerate_methods.ops.contextual import contextual_merge
from accelerate_methods.ops.select import by_score, mask_to_indices, on_device, pick_rows, top_mask
from accelerate_methods.registry import register
from accelerate_methods.stages.budget import nearest_share
from accelerate_methods.stages.compress import Compressed, ViewCompressMethod, VisualItem, everything
from accelerate_methods.stages.fields import choice, integer, share
from accelerate_methods.stages.shapes import ItemShape
from accelerate_methods.stages.views import CompressedViews, Views

RELEASED = (191, 30, 576)  # defaults of the released entry point: dominant and contextual tokens out of so many patches


@register("visionzip")
@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionZip(ViewCompressMethod):
    """Hyper-parameters of VisionZip. Without a budget: 191 + 30 of 576 patches, other numbers in proportion.

    Attributes:
        dominant: dominant tokens of each view or frame, the CLS token counted where there is one.
        contextual: contextual tokens of each view or frame; 0 makes it a pure selection.
        retention_ratio: instead of these two, the share of each view's or frame's tokens that stays; 54/64 of them are
            dominant, as in the paper's settings (54+10, 108+20, 162+30).
        grid_order: videos with a newline after every row of tokens only. "raster" puts dominant tokens where they came
            from; "as_released" places them, in raster order, on those places in order of score.
    """

    title: ClassVar[str] = "VisionZip"
    paper: ClassVar[str] = "arXiv 2412.04467"
    code: ClassVar[str] = "dvlab-research/VisionZip@3151f6df"
    licence: ClassVar[str] = "Apache-2.0"
    signals: ClassVar[frozenset[str]] = frozenset({"cls_attention", "key_states"})
    substitutes: ClassVar[Mapping[str, str]] = {"cls_attention": "received_attention"}
    budget_required: ClassVar[bool] = False
    positions: ClassVar[str] = "compact"

    dominant: int | None = integer(None, low=1, budget="counts", aliases=("dominant_num",))
    contextual: int | None = integer(None, low=0, budget="counts", aliases=("contextual_num",))
    retention_ratio: float | None = share(None, budget=True)
    grid_order: str = choice("raster", "raster", "as_released")

    def view_budget(self, per_view: int) -> tuple[int, int]:
        """(dominant, contextual) tokens for views or frames of ``per_view`` tokens."""
        if self.dominant is not None:
            return self.dominant, self.contextual
        if self.retention_ratio is None:
            dominant, contextual, of = RELEASED
            return max(1, int(per_view * dominant / of + 0.5)), int(per_view * contextual / of + 0.5)
        total = nearest_share(per_view, self.retention_ratio)
        dominant = max(1, total * 54 // 64)
        return dominant, total - dominant

    def count(self, shape: ItemShape) -> int:
        each = sum(self.view_budget(shape.tokens_per_frame))
        return shape.of_each(each)

    def compress_views(self, views: Views) -> CompressedViews | None:
        dominant, contextual = self.view_budget(views.tokens_per_view)
        if dominant + contextual >= views.tokens_per_view:
            return None
        special = views.special[:, :1] if views.special is not None else views.features[:, :0]
        zipped = zip_tokens(
            views.features,
            views.signal("cls_attention", "received_attention"),
            views.signal("key_states"),
            dominant - special.shape[1],
            contextual,
        )
        return zipped_views(special, zipped)

    def compress(self, item: VisualItem) -> Compressed:
        """Frame by frame, in the space of the language model (step 5)."""
        dominant, contextual = self.view_budget(item.tokens_per_frame)
        if dominant + contextual >= item.tokens_per_frame:
            return everything(item)
        scores = item.signal("cls_attention", "received_attention")
        zipped = zip_tokens(item.features, scores, item.signal("key_states"), dominant, contextual)
        in_grid = item.layout == "grid"
        places = zipped.dominant
        if in_grid and self.grid_order == "as_released":
            places = by_score(scores)[:, :dominant]
        places = torch.cat([places, zipped.targets], dim=1)
        first = torch.arange(item.num_frames, device=places.device)[:, None] * places.shape[1]
        owner = zipped.owner(0)
        return Compressed(
            tokens=torch.cat([zipped.kept, zipped.merged], dim=1).flatten(0, 1),
            positions=item.positions.gather(1, places).flatten(),
            owner=torch.where(owner >= 0, owner + first, owner),
            order="layout" if in_grid else "given",
            newlines="all" if in_grid else "closing",
        )


@dataclasses.dataclass
class Zipped:
    """Views or frames after selection and merging; k dominant and c contextual tokens each.

    Attributes:
        kept: [V, k, D] dominant tokens in raster order, at the patches ``dominant`` [V, k].
        merged: [V, c, D] contextual tokens, at the patches ``targets`` [V, c].
        slot: [V, P] contextual token that each patch is or went to, -1 for dominant patches and where there is none.
    """

    kept: Tensor
    merged: Tensor
    dominant: Tensor
    targets: Tensor
    slot: Tensor

    def owner(self, before: int) -> Tensor:
        """[V, P] index of the token that holds each patch in [``before`` others, dominant, contextual], or -1."""
        count = self.dominant.shape[1]
        owner = torch.where(self.slot >= 0, self.slot + (before + count), self.slot)
        ranks = torch.arange(before, before + count, device=owner.device)
        return owner.scatter_(1, self.dominant, ranks.expand_as(self.dominant))


def zip_tokens(features: Tensor, scores: Tensor, keys: Tensor, dominant: int, contextual: int) -> Zipped:
    """Steps 2 and 3, all views at once: features [V, P, D], scores [V, P], keys [V, P, d]; counts without CLS token."""
    patches = features.shape[1]
    best = top_mask(scores, dominant)
    index = mask_to_indices(best, dominant)
    merged, targets, slot = contextual_merge(features, keys, ~best, patches - dominant, contextual)
    return Zipped(kept=pick_rows(features, index), merged=merged, dominant=index, targets=targets, slot=slot)


def zipped_views(special: Tensor, zipped: Zipped) -> CompressedViews:
    """Step 4: [CLS, dominant, contextual] of every view; with tiles, CLS and contextual tokens follow all patches.

    ``special`` is [V, 1, D], or [V, 0, D] where the encoder has no such token.
    """
    views, before = special.shape[:2]
    groups = (before, zipped.dominant.shape[1], zipped.targets.shape[1])
    each = sum(groups)
    section = [s for s, count in zip((1, 0, 2), groups, strict=True) for _ in range(count)]
    number = [view for view in range(views) for _ in range(each)]
    view, section = on_device([number, section * views], special.device)
    owner = zipped.owner(before)
    first = torch.arange(0, views * each, each, device=owner.device)[:, None]
    no_patch = zipped.dominant.new_full((views, before), -1)
    return CompressedViews(
        tokens=torch.cat([special, zipped.kept, zipped.merged], dim=1).flatten(0, 1),
        view=view,
        patch=torch.cat([no_patch, zipped.dominant, zipped.targets], dim=1).flatten(),
        section=section,
        owner=torch.where(owner >= 0, owner + first, owner),
        newlines="single",
    )
