"""From the grids of images and videos to their tokens: grids of one form go through a branch together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from accelerate_methods.engine.flops import MacCounter
from accelerate_methods.ops.select import on_device
from accelerate_methods.stages.compress import VisualItem
from llava.model.architectures.hicom.compressors import HIComProjector
from llava.model.architectures.hicom.layout import Part, laid_out, mosaic, part_of
from llava.model.vision import VisualInput

#: number of an item, and of one of its grids
Place = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Seen:
    """One image or video as the tower saw it.

    Attributes:
        kind: "image" or "video".
        grids: features [T, h, w, C] and patches in the space of texts [T, h, w, K] (None without instruction): one
            pair, or that of the whole image and that of its tiles, put together; the global branch reads the last.
        tiled: whether the last one is of tiles.
    """

    kind: str
    grids: list[tuple[Tensor, Tensor | None]]
    tiled: bool = False


def seen_as(visual: VisualInput, states: tuple[Tensor, Tensor | None], tower_size: int, config: Any) -> Seen:
    """The grids of one image or video, out of the ``states`` of all views of a request."""
    kind = "video" if visual.kind == "video" else "image"
    pair = tuple(None if part is None else part[visual.views] for part in states)
    merge = getattr(config, "mm_patch_merge_type", "flat")
    if kind == "video" or visual.num_views == 1 or not merge.startswith("spatial"):
        return Seen(kind, [pair])
    tiles = tuple(None if part is None else mosaic(part, visual.size, tower_size, config)[None] for part in pair)
    base = tuple(None if part is None else part[:1] for part in pair)
    return Seen(kind, [tiles] if "nobase" in merge else [base, tiles], tiled=True)


def items_of(
    seen: Sequence[Seen], guide: Tensor | None, projector: nn.Module, newline: Tensor | None, config: Any
) -> list[VisualItem]:
    """The tokens of every image and video in the layout of the prompt.

    Args:
        guide: [n, L, K] the instruction of each, or None; newline: [D], or None.
    """
    grids = [(number, place) for number, one in enumerate(seen) for place in range(len(one.grids))]
    last = [(number, len(one.grids) - 1) for number, one in enumerate(seen)]
    if not isinstance(projector, HIComProjector):
        blocks, tokens = {key: _projected(projector, seen, key) for key in grids}, {}
    else:
        blocks = _run(projector, "local", seen, grids, guide)
        tokens = _run(projector, "global", seen, last, guide)
    items = []
    for number, end in last:
        one = seen[number]
        parts = [
            part_of(blocks[number, place], one.kind, one.tiled and place == end, newline, config)
            for place in range(end + 1)
            if (number, place) in blocks
        ]
        if (number, end) in tokens:
            parts.append(Part(tokens[number, end]))
        items.append(laid_out(parts, newline, one.kind))
    return items


def _run(
    projector: HIComProjector, branch: str, seen: Sequence[Seen], places: Sequence[Place], guide: Tensor | None
) -> dict[Place, Tensor]:
    """What one branch makes of the grids at ``places``; nothing where the projector does not have it."""
    if getattr(projector, f"{branch}_compressor") is None:
        return {}
    alike: dict[Any, list[Place]] = {}
    for number, place in places:
        alike.setdefault((seen[number].kind, seen[number].grids[place][0].shape), []).append((number, place))
    found: dict[Place, Tensor] = {}
    for (kind, _), group in alike.items():
        pairs = [seen[number].grids[place] for number, place in group]
        features = torch.stack([pair[0] for pair in pairs])
        own, numbers = guide, [number for number, _ in group]
        if guide is not None and numbers != list(range(len(guide))):
            own = guide[on_device(numbers, guide.device)]
        if branch == "global":
            out = projector("global", features, own)
        else:
            embeds = None if pairs[0][1] is None else torch.stack([pair[1] for pair in pairs])
            out = projector("local", features, embeds, own, kind == "image")
        found |= dict(zip(group, out, strict=True))
    return found


def _projected(projector: nn.Module, seen: Sequence[Seen], place: Place) -> Tensor:
    """The baseline without compressors: [T, h, w, C] -> [T, h', w', D], of videos at half the resolution."""
    one = seen[place[0]]
    tokens = projector(one.grids[place[1]][0])
    if one.kind != "video":
        return tokens
    size = [tokens.shape[0], *(-(-edge // 2) for edge in tokens.shape[1:3])]
    halved = nn.functional.interpolate(tokens.permute(3, 0, 1, 2)[None], size=size, mode="trilinear")
    return halved[0].permute(1, 2, 3, 0)


def macs(twin: HIComProjector, width: int, tokens: int, kind: str, patches: int, words: int) -> int:
    """Multiply-accumulates of both branches for one image or video.

    Args:
        twin: of the projector, on the meta device; width: C; tokens: of the item; patches: of a view; words: rows of
            the instruction.

    How many patches there were is what the blocks hold, where they do not overlap; without a local branch one view.
    """
    local, whole, counter = twin.local_compressor, twin.global_compressor, MacCounter()
    cells = tokens - (0 if whole is None else whole.setting.queries)
    with torch.device("meta"):
        guide = torch.empty(1, words, width)
        shape = (1, patches) if local is None else local.kernels(2, kind == "image")[:2]
        side = 1 if local is None else local.setting.spatial * cells
        grid = torch.empty(1, *shape, side, width)
    with torch.no_grad(), counter.counting():
        if local is not None:
            twin("local", grid, grid, guide, kind == "image")
        if whole is not None:
            twin("global", grid, guide)
    return counter.macs
