"""Where HICom's tokens stand: blocks of the local branch with newlines, then the tokens of the global one."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from accelerate_methods.hosts.layouts import NEWLINE_POSITIONS, tile_grid, unpad_image
from accelerate_methods.stages.compress import VisualItem


@dataclasses.dataclass(frozen=True)
class Part:
    """Tokens [n, D] that follow each other, with a newline behind every ``row`` of them; None: without newlines."""

    tokens: Tensor
    row: int | None = None


def mosaic(views: Tensor, size: tuple[int, int] | None, tower_size: int, config: Any) -> Tensor:
    """The tiles of an image [1 + columns * rows, h, w, C] (the whole one first) as one map [H, W, C], by the config.

    Raises:
        ValueError: tiles, and a config without any-resolution images.
    """
    aspect, merge = str(getattr(config, "image_aspect_ratio", "square")), config.mm_patch_merge_type
    if aspect != "anyres" and "anyres_max" not in aspect:
        raise ValueError(
            f"an image of {len(views)} views needs an any-resolution model, and image_aspect_ratio is {aspect!r}. "
            "Frames of a video need modalities=['video']."
        )
    columns, rows = tile_grid(len(views), size, tower_size, config)
    side = views.shape[1]
    tiles = views[1:].unflatten(0, (rows, columns)).permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2)
    if "maxpool2x2" in merge:
        tiles = nn.functional.max_pool2d(tiles, 2)
    elif "unpad" in merge:
        tiles = unpad_image(tiles, size)
        limit = re.match(r"anyres_max_(\d+)", aspect)
        if limit is not None:
            tiles = _shrunk(tiles, int(limit[1]) * side * side)
    return tiles.permute(1, 2, 0)


def _shrunk(tiles: Tensor, budget: int) -> Tensor:
    """[C, H, W] of at most about ``budget`` cells."""
    rows, columns = tiles.shape[1:]
    factor = math.sqrt(rows * columns / budget)
    if factor <= 1.1:
        return tiles
    return nn.functional.interpolate(tiles[None], [int(rows // factor), int(columns // factor)], mode="bilinear")[0]


def part_of(blocks: Tensor, kind: str, tiled: bool, newline: Tensor | None, config: Any) -> Part:
    """The tokens of one grid of blocks.

    Args:
        blocks: [t, h, w, D]; kind: "image" or "video"; tiled: whether they are those of an image's tiles.
        newline: [D], or None where the model has none.

    Raises:
        ValueError: an unknown place for newlines, or one that needs a newline where there is none.
    """
    rows, columns = blocks.shape[1:3]
    tokens, position = blocks.flatten(0, 2), getattr(config, "mm_newline_position", "one_token")
    if not str(getattr(config, "mm_patch_merge_type", "flat")).startswith("spatial"):
        return Part(tokens)
    if kind == "video":
        if position not in NEWLINE_POSITIONS:
            raise ValueError(f"mm_newline_position {position!r} is not one of {', '.join(NEWLINE_POSITIONS)}.")
        row = {"grid": columns, "frame": rows * columns, "one_token": len(tokens), "no_token": None}[position]
    elif newline is None and not tiled:
        row = None
    else:
        row = columns if tiled else len(tokens)
    if row is not None and newline is None:
        raise ValueError(
            f"newlines are wanted (mm_newline_position {position!r}), and this model has no model.image_newline: only "
            "any-resolution models do (image_aspect_ratio)."
        )
    return Part(tokens, row)


def laid_out(parts: list[Part], newline: Tensor | None, modality: str) -> VisualItem:
    """One image or video: its parts in a row, as one frame, because queries have no place in any."""
    tokens = torch.cat([part.tokens for part in parts]) if len(parts) > 1 else parts[0].tokens
    device, rows, ends, closes = tokens.device, [], [], []
    length = 0
    for part in parts:
        index = torch.arange(len(part.tokens), device=device)
        if part.row is None:
            rows.append(index + length)
            closes.append(torch.full_like(index, -1))
            length += len(index)
            continue
        lines, before = len(index) // part.row, sum(len(end) for end in ends)
        line = torch.arange(lines, device=device)
        rows.append(index + index // part.row + length)
        ends.append((line + 1) * (part.row + 1) - 1 + length)
        closes.append((line + before).repeat_interleave(part.row + 1))
        length += len(index) + lines
    item = VisualItem(modality, tokens[None], torch.cat(rows)[None], length)
    if not ends:
        return item
    ends = torch.cat(ends)
    return dataclasses.replace(
        item,
        layout="anyres",
        newlines=newline.expand(len(ends), -1),
        newline_positions=ends,
        newline_of=torch.cat(closes),
    )
