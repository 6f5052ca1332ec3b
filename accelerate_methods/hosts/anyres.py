"""Any-resolution grids: which canvas an image is put on, and how many tiles that makes.

LLaVA-1.6 has a fixed list of canvases, OneVision up to 6 x 6 tiles. Sizes are (width, height) throughout. Names and
signatures are those of LLaVA-NeXT's ``llava.mm_utils``, which has them from here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

GridPinpoints = str | Sequence[Sequence[int]]

# -- any-resolution grid (LLaVA-1.6: fixed list; OneVision: up to 6 x 6 tiles) -----------------------------------------


def select_best_resolution(
    original_size: tuple[int, int], possible_resolutions: Sequence[Sequence[int]]
) -> tuple[int, int]:
    """Canvas that keeps most of the image's pixels and wastes the fewest of its own.

    The image is scaled to fit; pixels gained by enlarging do not count, so a small image takes the smallest canvas that
    holds it. Ties go to the canvas with less waste, then to the earlier one.

    Args:
        original_size: (width, height), positive.
        possible_resolutions: (width, height) candidates.
    Raises:
        ValueError: no candidate, or an empty image.
    """
    if not possible_resolutions:
        raise ValueError("no candidate resolution to choose from")
    width, height = (int(x) for x in original_size)
    if width <= 0 or height <= 0:
        raise ValueError(f"image size (width, height) must be positive, got {(width, height)}")

    def merit(candidate: Sequence[int]) -> tuple[int, int]:
        scale = min(candidate[0] / width, candidate[1] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - candidate[0] * candidate[1]

    best = max(possible_resolutions, key=merit)  # max() keeps the first of equals
    return int(best[0]), int(best[1])


def candidate_resolutions(grid_pinpoints: GridPinpoints, tile: int) -> list[tuple[int, int]]:
    """Candidate canvases (width, height) of a model config.

    Args:
        grid_pinpoints: pairs, a string of a python list of pairs, or a range of tile counts such as "(1x1),...,(6x6)".
        tile: side of a tile in pixels, used by a range. (The official code takes five hub towers' sides only.)
    Raises:
        ValueError: none of these forms.
    """
    if isinstance(grid_pinpoints, str) and "x" in grid_pinpoints:
        ends = [(int(a), int(b)) for a, b in re.findall(r"\((\d+)x(\d+)\)", grid_pinpoints)]
        if not ends:
            raise ValueError(f"grid range {grid_pinpoints!r} is not of the form '(1x1),...,(6x6)'")
        (a0, b0), (a1, b1) = ends[0], ends[-1]
        return [(i * tile, j * tile) for i in range(a0, a1 + 1) for j in range(b0, b1 + 1)]
    try:
        pairs = ast.literal_eval(grid_pinpoints) if isinstance(grid_pinpoints, str) else grid_pinpoints
        candidates = [(int(w), int(h)) for w, h in pairs]
    except (TypeError, ValueError, SyntaxError) as error:
        raise ValueError(
            f"image_grid_pinpoints {grid_pinpoints!r} is neither (width, height) pairs nor a range"
        ) from error
    return candidates


def get_anyres_image_grid_shape(
    image_size: tuple[int, int], grid_pinpoints: GridPinpoints, patch_size: int
) -> tuple[int, int]:
    """Number of tiles (columns, rows) for an image of (width, height); `patch_size` is the side of a tile."""
    width, height = select_best_resolution(image_size, candidate_resolutions(grid_pinpoints, patch_size))
    return width // patch_size, height // patch_size
