"""Pictures of what a method kept: token cells drawn over the frames (needs matplotlib)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import MethodError

if TYPE_CHECKING:
    from .recording import ItemRecord


def token_states(item: ItemRecord) -> np.ndarray:
    """[F, rows, columns] of 0 dropped, 1 merged into another token, 2 kept, from the provenance of one item.

    A token counts as kept if an output token stands at its position; every other token that some output token holds
    counts as merged. What a method dropped inside the language model counts as dropped.
    """
    if item.owner is None or item.grid is None:
        raise MethodError("this item has no provenance on a token grid (an anyres image, or a smaller input).")
    there = item.owner >= 0
    if item.left_at is not None:
        there &= item.left_at == item.num_layers
    states = there.long() + (item.kept & there).long()
    return states.cpu().numpy().reshape(-1, *item.grid)


def draw_kept_tokens(frames: np.ndarray, item: ItemRecord, path: str | Path, title: str = "", columns: int = 8) -> Path:
    """Save a PNG of ``frames`` [F, H, W, 3] uint8: kept cells in colour, merged ones faint, dropped ones dark."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    states = token_states(item)
    count, rows_of_cells, columns_of_cells = states.shape
    if len(frames) != count:
        raise MethodError(f"{len(frames)} frames given for the {count} frames of the item.")
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.6 * columns, 1.75 * rows + 0.4), squeeze=False)
    shade = np.array([0.18, 0.45, 1.0])
    for index, axis in enumerate(axes.flat):
        axis.axis("off")
        if index >= count:
            continue
        height, width = frames.shape[1:3]
        row = np.arange(height) * rows_of_cells // height
        column = np.arange(width) * columns_of_cells // width
        cells = states[index][row[:, None], column]
        axis.imshow((frames[index] * shade[cells][..., None]).astype(np.uint8))
        for r, c in zip(*np.nonzero(states[index] == 2), strict=True):
            axis.add_patch(
                plt.Rectangle(
                    (c * width / columns_of_cells - 0.5, r * height / rows_of_cells - 0.5),
                    width / columns_of_cells,
                    height / rows_of_cells,
                    fill=False,
                    edgecolor="#ffcc00",
                    linewidth=1.2,
                )
            )
        axis.set_title(f"frame {index}: {int((states[index] == 2).sum())}", fontsize=7)
    figure.suptitle(title or f"{item.tokens_after} of {item.tokens_before} visual tokens kept", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return Path(path)
