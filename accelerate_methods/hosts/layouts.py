"""From patch features to the visual tokens of the uncompressed sequence: pooling, newlines, any-resolution grids.

The layouts make a :class:`VisualItem`, which separates content tokens from newlines and knows where each stands, so
that a compression method can act before the sequence is laid out. The rules are written down in docs/llava_tree.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from accelerate_methods.hosts.anyres import get_anyres_image_grid_shape
from accelerate_methods.stages.compress import VisualItem

POOL_MODES = ("average", "max", "bilinear")
NEWLINE_POSITIONS = ("grid", "frame", "one_token", "no_token")


def pool_2d(features: Tensor, mode: str, stride: int = 2) -> Tensor:
    """[T, h*h, C] -> [T, h'*h', C]; h' is floor(h/stride) for average and max, ceil(h/stride) for bilinear."""
    frames, patches, width = features.shape
    side = math.isqrt(patches)
    maps = features.view(frames, side, side, width).permute(0, 3, 1, 2)
    if mode == "average":
        maps = nn.functional.avg_pool2d(maps, stride)
    elif mode == "max":
        maps = nn.functional.max_pool2d(maps, stride)
    elif mode == "bilinear":
        maps = nn.functional.interpolate(maps, size=[math.ceil(side / stride)] * 2, mode="bilinear")
    else:
        raise ValueError(f"mm_spatial_pool_mode {mode!r} is not one of {', '.join(POOL_MODES)}.")
    return maps.flatten(2).transpose(1, 2)


def video_item(pooled: Tensor, newline: Tensor | None, position: str, merge_type: str) -> VisualItem:
    """Pooled frames [T, q, D] with newlines by ``mm_newline_position``."""
    frames, per_frame, _ = pooled.shape
    side = math.isqrt(per_frame)
    device = pooled.device
    grid = (side, side) if side * side == per_frame else None
    index = torch.arange(frames * per_frame, device=device)
    common = {"modality": "video", "features": pooled, "grid": grid}
    if not merge_type.startswith("spatial"):
        return VisualItem(positions=index.view(frames, per_frame), length=frames * per_frame, layout="flat", **common)
    if position not in NEWLINE_POSITIONS:
        raise ValueError(f"mm_newline_position {position!r} is not one of {', '.join(NEWLINE_POSITIONS)}.")
    if position == "one_token" and "unpad" not in merge_type:
        position = "no_token"
    if position == "no_token":
        return VisualItem(positions=index.view(frames, per_frame), length=len(index), layout="no_token", **common)
    if newline is None:
        raise ValueError(
            f"mm_newline_position {position!r} needs model.image_newline, which this checkpoint does not have "
            "(its mm_patch_merge_type has no 'unpad')."
        )
    row = {"grid": side, "frame": per_frame, "one_token": len(index)}[position]  # content tokens before each newline
    return _with_newlines(index.view(frames, per_frame), row, newline, layout=position, **common)


def _with_newlines(index: Tensor, row: int, newline: Tensor, layout: str, **common: Any) -> VisualItem:
    """Insert ``newline`` after every ``row`` content tokens. ``index`` [F, N] numbers the content tokens."""
    positions = index + index // row
    rows = index.numel() // row
    length = index.numel() + rows
    return VisualItem(
        positions=positions,
        length=length,
        layout=layout,
        newlines=newline.expand(rows, -1),
        newline_positions=torch.arange(1, rows + 1, device=index.device) * (row + 1) - 1,
        newline_of=torch.arange(length, device=index.device) // (row + 1),
        keep_all_newlines=layout == "one_token",
        **common,
    )


def shortened_item(features: Tensor, modality: str, newline: Tensor | None) -> VisualItem:
    """Tokens [F, N, D] of views or frames whose grid is gone: neither pooled nor unpadded, one newline behind all."""
    frames, per_frame, _ = features.shape
    index = torch.arange(frames * per_frame, device=features.device).view(frames, per_frame)
    if newline is None:
        return VisualItem(modality=modality, features=features, positions=index, length=index.numel())
    return _with_newlines(index, index.numel(), newline, layout="one_token", modality=modality, features=features)


def image_item(
    features: Tensor,
    newline: Tensor | None,
    size: tuple[int, int] | None,
    tower_size: int,
    config: Any,
    unpad: Callable[[Tensor, tuple[int, int]], Tensor] | None = None,
) -> VisualItem:
    """One image: [V, P, D] views -> its tokens by ``mm_patch_merge_type``.

    ``unpad`` takes the place of :func:`unpad_image`.
    """
    merge_type = getattr(config, "mm_patch_merge_type", "flat")
    views, patches, width = features.shape
    if merge_type == "flat":
        return flat_item(features.reshape(1, views * patches, width), patches if views == 1 else None)
    if not merge_type.startswith("spatial"):
        raise ValueError(f"mm_patch_merge_type {merge_type!r} is not supported; allowed: flat or spatial_*.")
    if views == 1:
        if "unpad" not in merge_type:
            return flat_item(features, patches)
        index = torch.arange(patches, device=features.device)[None]
        item = _with_newlines(
            index, patches, _need(newline, merge_type), layout="one_token", modality="image", features=features,
            grid=_square(patches), source=index[0],
        )
        return item
    return _anyres_item(features, newline, size, tower_size, config, merge_type, unpad or unpad_image)


def flat_item(features: Tensor, patches: int | None) -> VisualItem:
    """[1, n, D] tokens in a row without newlines; ``patches`` if they are the patches of a single view."""
    index = torch.arange(features.shape[1], device=features.device)
    return VisualItem(
        modality="image",
        features=features,
        positions=index[None],
        length=features.shape[1],
        grid=_square(patches),
        source=index,
    )


def tile_grid(views: int, size: tuple[int, int] | None, tower_size: int, config: Any) -> tuple[int, int] | None:
    """(columns, rows) in which views 1.. of an image tile it; None for a single view and for a config without tiles."""
    tiled = views > 1 and getattr(config, "mm_patch_merge_type", "flat").startswith("spatial")
    return _grid_shape(size, tower_size, config, views - 1) if tiled else None


def _anyres_item(
    features: Tensor,
    newline: Tensor | None,
    size: tuple[int, int] | None,
    tower_size: int,
    config: Any,
    merge_type: str,
    unpad: Callable[[Tensor, tuple[int, int]], Tensor],
) -> VisualItem:
    views, patches, _ = features.shape
    side = math.isqrt(patches)
    columns, rows = _grid_shape(size, tower_size, config, views - 1)
    aspect = getattr(config, "image_aspect_ratio", "square")
    big = _stitch(features[1:], rows, columns)
    every = torch.arange(views * patches, device=features.device).view(views, patches, 1)
    source: Tensor | None = _stitch(every[1:], rows, columns)
    ends_rows = False
    if "maxpool2x2" in merge_type:
        big, source = nn.functional.max_pool2d(big, 2), None
    elif "unpad" in merge_type:
        big, source = unpad(big, size), unpad(source, size)
        limit = _max_tiles(aspect)
        if limit is not None:
            whole, big = big, _shrink_to(big, limit * side * side)
            source = source if big is whole else None
        ends_rows = True
    height, row = big.shape[1:]
    content = big.flatten(1).transpose(0, 1)
    base = features[0] if "nobase" not in merge_type else features[:0].flatten(0, 1)
    start = base.shape[0]
    if source is not None:
        source = torch.cat([every[0, :start, 0], source.flatten()])
    index = torch.arange(height * row, device=features.device)
    if not ends_rows:
        return dataclasses.replace(flat_item(torch.cat([base, content])[None], None), source=source)
    tiles = _with_newlines(
        index[None], row, _need(newline, merge_type), layout="anyres", modality="image", features=content[None]
    )
    closes = torch.full((start + tiles.length,), -1, dtype=torch.long, device=features.device)
    closes[start:] = tiles.newline_of
    base_index = torch.arange(start, device=features.device)[None]
    return VisualItem(
        modality="image",
        features=torch.cat([base, content])[None],
        positions=torch.cat([base_index, tiles.positions + start], dim=1),
        length=start + tiles.length,
        layout="anyres",
        newlines=tiles.newlines,
        newline_positions=tiles.newline_positions + start,
        newline_of=closes,
        source=source,
    )


def _stitch(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """[rows*columns, side*side, D] tiles -> one big map [D, rows*side, columns*side]."""
    side, width = math.isqrt(tiles.shape[1]), tiles.shape[2]
    return tiles.view(rows, columns, side, side, width).permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2)


_VIDEO = "Frames of a video need modalities=['video']."


def _grid_shape(size: tuple[int, int] | None, tower_size: int, config: Any, tiles: int) -> tuple[int, int]:
    """(columns, rows) of the tile grid; 2 x 2 unless the aspect mode is an anyres one."""
    aspect = getattr(config, "image_aspect_ratio", "square")
    if aspect == "anyres" or "anyres_max" in str(aspect):
        if size is None:
            raise ValueError(f"image_aspect_ratio {aspect!r} needs image_sizes=[(width, height), ...]. {_VIDEO}")
        shape = get_anyres_image_grid_shape(tuple(size), config.image_grid_pinpoints, tower_size)
    else:
        shape = (2, 2)
    if shape[0] * shape[1] != tiles:
        raise ValueError(
            f"an image of {size} (width, height) has {tiles} tiles, but its grid is {shape[0]} x {shape[1]}; were "
            f"image_sizes and images given in the same order, and processed with this model's config? {_VIDEO}"
        )
    return shape


def _max_tiles(aspect: Any) -> int | None:
    text = str(aspect)
    return int(text.rsplit("anyres_max_", 1)[1]) if "anyres_max_" in text else None


def unpad_image(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut from a map [D, H, W] what padding to the grid's aspect ratio had added; ``size`` is (width, height)."""
    width, height = size
    rows, columns = features.shape[1:]
    if width / height > columns / rows:
        kept = int(height * (columns / width))
        pad = (rows - kept) // 2
        return features[:, pad : rows - pad, :]
    kept = int(width * (rows / height))
    pad = (columns - kept) // 2
    return features[:, :, pad : columns - pad]


def _shrink_to(features: Tensor, budget: int) -> Tensor:
    """Resize a map [D, H, W] with more than about ``budget`` cells (by a factor above 1.1) down to it."""
    rows, columns = features.shape[1:]
    factor = math.sqrt(rows * columns / budget)
    if factor <= 1.1:
        return features
    size = [int(rows // factor), int(columns // factor)]
    return nn.functional.interpolate(features[None], size, mode="bilinear")[0]


def _need(newline: Tensor | None, merge_type: str) -> Tensor:
    if newline is None:
        raise ValueError(f"mm_patch_merge_type {merge_type!r} needs model.image_newline, which the checkpoint lacks.")
    return newline


def _square(patches: int | None) -> tuple[int, int] | None:
    if patches is None:
        return None
    side = math.isqrt(patches)
    return (side, side) if side * side == patches else None
