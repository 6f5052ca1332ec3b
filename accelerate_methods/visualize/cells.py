"""What became of every visual token, as cells on the pictures that the model saw."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from accelerate_methods.stages.errors import MethodError

if TYPE_CHECKING:
    from PIL import Image

    from accelerate_methods.engine.recording import ItemRecord

#: states of a cell: no token, dropped before the LLM, merged into another token, kept, dropped between decoder layers
NOWHERE, DROPPED, MERGED, KEPT, LEFT = -1, 0, 1, 2, 3


@dataclasses.dataclass
class Panel:
    """A picture that tokens come from: a frame, an image, or the canvas that the tiles of an image make up.

    Attributes:
        picture: RGB; the region that the model saw, in the geometry of the original.
        tiles: (columns, rows) if it is such a canvas.
        seconds: when in the video.
    """

    caption: str
    picture: Image.Image
    tiles: tuple[int, int] | None = None
    seconds: float | None = None


@dataclasses.dataclass
class Cells:
    """The tokens of one panel, on a grid of R x C cells.

    Attributes:
        xs, ys: [C + 1], [R + 1] edges of the cells as fractions of the panel's width and height, ascending.
        state: [R, C] what the first decoder layer has of each token: NOWHERE, DROPPED, MERGED or KEPT.
        left: [R, C] decoder layer before which the token left; the number of layers if it never did.
        owner: [R, C] number of the output token that holds it, -1 if none does. One numbering per item.
        joined: [R, C] True where it left because a decoder layer merged it into another token; None: nowhere.
    """

    xs: np.ndarray
    ys: np.ndarray
    state: np.ndarray
    left: np.ndarray
    owner: np.ndarray
    joined: np.ndarray | None = None

    def at(self, layer: int) -> np.ndarray:
        """[R, C] states at decoder layer ``layer`` (from 0): LEFT where a token was there and is no more."""
        gone = LEFT if self.joined is None else np.where(self.joined, MERGED, LEFT)
        return np.where((self.state > DROPPED) & (self.left <= layer), gone, self.state)


@dataclasses.dataclass
class Overlay:
    """What one method did with the tokens of all panels (of one sample), and what the model answered.

    Attributes:
        tokens_before, tokens_after: visual tokens of the dense model, and those that the first decoder layer gets.
        cells: one entry per panel.
        note: printed in small type, e.g. that the method is an adaptation on this model.
    """

    label: str
    tokens_before: int
    tokens_after: int
    num_layers: int
    cells: list[Cells]
    answer: str = ""
    note: str = ""

    def alive(self, layer: int) -> int:
        """Tokens at decoder layer ``layer`` (from 0). Those without a place, like a CLS token, are counted nowhere."""
        return sum(int((c.at(layer) == KEPT).sum()) for c in self.cells)

    @property
    def layers(self) -> list[int]:
        """Decoder layers before which a token left, ascending."""
        gone = [c.left[(c.state > DROPPED) & (c.left < self.num_layers)] for c in self.cells]
        return np.unique(np.concatenate(gone)).tolist() if gone else []

    @property
    def drops(self) -> list[int]:
        """Those of :attr:`layers` before which a token was dropped, not merged."""
        gone = [c.left[(c.at(self.num_layers) == LEFT) & (c.left < self.num_layers)] for c in self.cells]
        return np.unique(np.concatenate(gone)).tolist() if gone else []

    @property
    def untouched(self) -> bool:
        """Whether every token is there in every layer, as in the dense model."""
        return self.tokens_after == self.tokens_before and not self.layers and self._all_kept()

    def _all_kept(self) -> bool:
        return all(bool(np.isin(c.state, (KEPT, NOWHERE)).all()) for c in self.cells)

    def notes(self) -> list[str]:
        """What else has to be said about the picture."""
        lines = [self.note] if self.note else []
        placeless = self.tokens_after - sum(int((c.state == KEPT).sum()) for c in self.cells)
        if placeless > 0:
            lines.append(f"CLS tokens among them, which have no place in the picture: {placeless}")
        return lines

    def counts(self) -> str:
        """ "64 of 784 visual tokens (8.2 %), 20 at the last layer"."""
        text = f"{self.tokens_after} of {self.tokens_before} visual tokens"
        if self.tokens_after != self.tokens_before:
            text += f" ({100 * self.tokens_after / self.tokens_before:.3g} %)"
        return text + (f", {self.alive(self.num_layers - 1)} at the last layer" if self.layers else "")


def token_states(item: ItemRecord) -> np.ndarray:
    """[F, rows, columns] of 0 dropped, 1 merged into another token, 2 kept, from the provenance of one item.

    A token counts as kept if an output token stands at its position; every other token that some output token holds
    counts as merged. What a method dropped inside the language model counts as dropped.
    """
    if item.owner is None or item.grid is None:
        raise MethodError("this item has no provenance on a token grid (an anyres image, or a smaller input).")
    state, left, _, joined = _fates(item)
    gone = (state > DROPPED) & (left < item.num_layers)
    return np.where(gone, np.where(joined, MERGED, DROPPED), state).reshape(-1, *item.grid)


def cells_of(item: ItemRecord, places: np.ndarray, panels: int) -> list[Cells]:
    """The tokens of one item as cells.

    Args:
        places: [M, 3] for every original token, in the order of ``item.owner``: the panel (0..panels-1), and its centre
            as fractions of that panel's width and height. The tokens of a panel lie on a (not quite even) grid.
    """
    state, left, owner, joined = _fates(item)
    which = np.rint(places[:, 0]).astype(int)
    out = []
    for panel in range(panels):
        here = np.nonzero(which == panel)[0]
        if not len(here):  # the model has no token of this picture
            whole = np.array([0.0, 1.0])
            out.append(Cells(whole, whole, np.array([[NOWHERE]]), np.array([[0]]), np.array([[-1]])))
            continue
        centres, slots = zip(*(_levels(places[here, axis]) for axis in (1, 2)), strict=True)
        shape = (len(centres[1]), len(centres[0]))

        def grid(values: np.ndarray, empty: int, here=here, slots=slots, shape=shape) -> np.ndarray:
            cells = np.full(shape, empty)
            cells[slots[1], slots[0]] = values[here]
            return cells

        edges = _edges(centres[0]), _edges(centres[1])
        out.append(
            Cells(*edges, grid(state, NOWHERE), grid(left, 0), grid(owner, -1), grid(joined, 0).astype(bool))
        )
    return out


def numbered_on(cells: list[Cells], before: list[Cells]) -> list[Cells]:
    """The cells of an item with the numbers of its output tokens behind those of the items ``before`` it."""
    first = max((int(c.owner.max(initial=-1)) for c in before), default=-1) + 1
    return [dataclasses.replace(c, owner=np.where(c.owner >= 0, c.owner + first, -1)) for c in cells]


def even_cells(item: ItemRecord) -> list[Cells]:
    """Cells of an item whose frames are covered evenly by its grid: every video whose frames are seen whole."""
    states = token_states(item)  # also checks that there is a grid
    frames, rows, columns = states.shape
    y, x = np.meshgrid((np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns, indexing="ij")
    place = np.stack([x.ravel(), y.ravel()], axis=1)
    which = np.repeat(np.arange(frames), rows * columns)[:, None]
    return cells_of(item, np.concatenate([which, np.tile(place, (frames, 1))], axis=1), frames)


def _fates(item: ItemRecord) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(state, left, owner, joined) of every token, flat."""
    owner = item.owner.cpu().numpy().ravel()
    held = owner >= 0
    kept = item.kept.cpu().numpy().ravel() & held
    left = np.full(owner.shape, item.num_layers) if item.left_at is None else item.left_at.cpu().numpy().ravel()
    joined = np.zeros(owner.shape, dtype=bool)
    if item.merged_at is not None and item.held_by is not None:
        merged = item.merged_at.cpu().numpy().ravel()
        joined = kept & (merged < item.num_layers) & (item.held_by.cpu().numpy().ravel() >= 0)
        left = np.where(kept, np.minimum(left, merged), left)  # its row is no more, whatever became of its content
    return np.where(kept, KEPT, np.where(held, MERGED, DROPPED)), np.where(held, left, 0), owner, joined


def _levels(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values, ascending, and for each value the number of its own; closer than 1e-4 counts as the same."""
    order = np.argsort(values, kind="stable")
    ranks = np.concatenate([[0], np.cumsum(np.diff(values[order]) > 1e-4)])
    slots = np.empty(len(values), dtype=int)
    slots[order] = ranks
    return values[order][np.unique(ranks, return_index=True)[1]], slots


def _edges(centres: np.ndarray) -> np.ndarray:
    """Edges half-way between ascending centres, and as far beyond the first and last; inside 0..1."""
    if len(centres) < 2:
        return np.array([0.0, 1.0])
    middle = (centres[1:] + centres[:-1]) / 2
    first, last = 2 * centres[0] - middle[0], 2 * centres[-1] - middle[-1]
    return np.clip(np.concatenate([[first], middle, [last]]), 0.0, 1.0)
