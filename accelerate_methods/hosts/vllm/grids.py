"""Position ids of three axes (M-RoPE) for prompts whose images and videos have lost tokens.

A token keeps the coordinates (t, h, w) that it has in the whole grid, and the text behind an item goes on where it
would without a method. So the ids of all text are known from sizes, when a request comes in; those of an item's tokens
travel from the encoder with their embeddings, as columns relative to where the item begins. Two columns per axis:
bfloat16 holds whole numbers up to 256 only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BASE = 256
COLUMNS = 6


def coordinates(frames: int, rows: int, columns: int, per_frame: float = 1.0) -> Tensor:
    """[3, T*h*w] (t, h, w) of a grid's tokens, frame by frame; a frame is ``per_frame`` ids long, truncated."""
    grid = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns)).view(-1, 3).T.clone()
    if per_frame != 1.0:
        grid[0] = (grid[0] * per_frame).long()
    return grid


def packed(positions: Tensor, like: Tensor) -> Tensor:
    """[3, R] whole numbers below 65536 -> [R, 6] columns in the dtype of ``like``, exact in half precision."""
    high, low = positions // BASE, positions % BASE
    return torch.stack([high, low], dim=-1).permute(1, 0, 2).flatten(1).to(like)


def unpacked(columns: Tensor) -> Tensor:
    """[R, 6] -> [3, R]."""
    pairs = columns.round().long().view(-1, 3, 2)
    return (pairs[..., 0] * BASE + pairs[..., 1]).T


def prompt_positions(length: int, items: Sequence[tuple[int, int, Tensor]]) -> tuple[Tensor, int]:
    """[3, L] ids of a prompt, and how far the next token's id is from the prompt's length.

    Args:
        items: offset and rows of each image or video in the prompt, ascending, and the ``coordinates`` of its whole
            grid. Where tokens are missing, those that are left stand at the beginning of the item for now.
    """
    out = torch.zeros(3, length, dtype=torch.long)
    start, base = 0, 0
    for offset, rows, grid in items:
        text = offset - start
        out[:, start:offset] = torch.arange(base, base + text)
        base += text
        out[:, offset : offset + rows] = base + grid if rows == grid.shape[1] else base
        base += int(grid.max()) + 1
        start = offset + rows
    out[:, start:] = torch.arange(base, base + length - start)
    return out, base + length - start - length


def with_encoded(
    ids: Tensor, media: Sequence[int], positions: Tensor, computed: int, parts: Sequence[Tensor]
) -> Tensor:
    """[3, L] ``positions`` with those of the media tokens that have been encoded.

    Args:
        ids: [L] the prompt; media: placeholder ids.
        computed: rows of the prompt that were computed before.
        parts: [R, 6] columns of the media rows from ``computed`` on, in order; those further on may be missing.

    The ids of text are final, so that doing it again, for a request that was put off or of which a part lay in the
    prefix cache, comes to the same.
    """
    if not parts:
        return positions
    device = positions.device
    ids = ids.to(device)
    is_media = torch.isin(ids, torch.tensor(list(media), device=device))
    index = torch.arange(ids.shape[0], device=device)
    relative = unpacked(torch.cat(list(parts))).to(device)
    rows = index[is_media & (index >= computed)][: relative.shape[1]]
    text = torch.where(is_media, torch.full_like(index, -1), index).cummax(0).values[rows]
    base = torch.where(text >= 0, positions[0, text.clamp(min=0)] + 1, torch.zeros_like(text))
    out = positions.clone()
    out[:, rows] = base + relative
    return out
