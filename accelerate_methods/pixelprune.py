"""PixelPrune: pixel-level adaptive visual token reduction via predictive coding (arXiv 2604.00886).

Before the vision encoder's first block, a visual token of an image goes if its pixels can be told from those of its
neighbours to the left, above and above-left, as a lossless picture codec predicts them (``pred_2d``). With threshold 0
the picture can be rebuilt exactly from what stays. How much that is, the picture decides: flat margins and menus
go, photographs stay. Kept tokens keep their positions, in the encoder and in the language model.

All rules, and the faults of the official code: docs/methods/pixelprune.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from accelerate_methods.registry import register
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.fields import choice, flag, integer, real
from accelerate_methods.stages.pixels import PixelCells, PixelMethod

_TOGETHER = 1 << 18  # values that are compared at a time, so that differences stay in the cache
_RUN = 16  # tokens that are compared with the beginning of their run at a time, at most


@register("pixelprune")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelPrune(PixelMethod):
    """Hyper-parameters of PixelPrune, defaults as released; all published numbers have them.

    Attributes:
        scan: "pred_2d": a token is predicted from three neighbours; "raster": from the last one kept, row after row;
            "serpentine": the same with every second row read backwards.
        metric: of the difference of two tokens' pixels in [0, 1]: "max", its largest value; "mae" and "rmse", the mean
            of its absolute values and the root of the mean of its squares; "exact": "max" with threshold 0.
        threshold: tau; tokens that differ by no more count as alike. 0 is lossless.
        anchored: with a threshold, whether neighbours are taken as they would be rebuilt, so that errors do not add up.
            Without, slow gradients vanish. "pred_2d" only.
        vit_layer: block of the vision encoder before which tokens go; the number of blocks: behind the last; -1: only
            before the language model, which saves nothing in the encoder.
    """

    title: ClassVar[str] = "PixelPrune"
    paper: ClassVar[str] = "arXiv 2604.00886"
    code: ClassVar[str] = "OPPO-Mente-Lab/PixelPrune@a870e31b"
    licence: ClassVar[str] = "Apache-2.0"

    scan: str = choice("pred_2d", "pred_2d", "raster", "serpentine")
    metric: str = choice("max", "max", "mae", "rmse", "exact")
    threshold: float = real(0.0, low=0, high=1)
    anchored: bool = flag(True)
    vit_layer: int = integer(0, low=-1)

    def first_block(self, num_blocks: int) -> int | None:
        if self.vit_layer > num_blocks:
            raise MethodError(
                f"{self.name}: vit_layer={self.vit_layer} is outside the allowed range [-1, {num_blocks}]: the vision "
                f"encoder has {num_blocks} blocks."
            )
        return None if self.vit_layer < 0 else self.vit_layer

    def choose(self, cells: PixelCells) -> Tensor:
        rows, columns = cells.grid
        exact = self.metric == "exact" or self.threshold == 0
        if not exact:  # one token depends on the choice of others: on the host
            cells = PixelCells(cells.values.cpu().float(), cells.scale)
        alike = Alike(cells, "exact" if exact else self.metric, self.threshold)
        if self.scan == "pred_2d":
            left, above = alike.left(), alike.above()
            if exact or not self.anchored:
                return predicted(left, above)
            return predicted_anchored(alike, left, above)
        order = torch.arange(rows * columns, device=cells.values.device).view(rows, columns)
        if self.scan == "serpentine":
            order[1::2] = order[1::2].flip(1)
        order = order.flatten()
        changes = differs_from_before(alike, order)
        # exactly like the last one that stays is exactly like the one before
        stays = changes if exact else in_runs(alike, order, changes)
        return torch.empty_like(stays).index_copy_(0, order, stays).view(rows, columns)


class Alike:
    """Whether tokens of an image resemble each other.

    Args:
        metric: as in :class:`PixelPrune`; threshold: largest difference of two tokens that are alike.
    """

    def __init__(self, cells: PixelCells, metric: str, threshold: float):
        metric, self._threshold = ("max", 0.0) if metric == "exact" else (metric, threshold)
        self._cells, self.grid = cells, cells.grid
        #: the host looks at one patch's first channel before it fetches the others
        self._peeks = metric == "max" and cells.values.device.type == "cpu"
        self._values = cells.values.flatten(0, 1)
        self._scale = torch.tensor(cells.scale, device=cells.values.device)
        self._test: Callable[[Tensor, Tensor], Tensor] = getattr(self, f"_{metric}")

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """[K] bool of tokens by their raster numbers [K]."""
        if not self._peeks or len(first) < 2:
            return self._test(self._values[first], self._values[second])
        corner = self._values[:, 0, 0]
        found = (corner[first] - corner[second]).abs_().amax(-1) * self._scale[0] <= self._threshold
        near = found.nonzero().squeeze(1)
        found[near] = self._test(self._values[first[near]], self._values[second[near]])
        return found

    def left(self) -> Tensor:
        """[R, C] whether each token is like the one to the left; False where there is none."""
        values, found = self._cells.values, self._nowhere()
        for rows in self._together():
            found[rows, 1:] = self._test(values[rows, 1:], values[rows, :-1])
        return found

    def above(self) -> Tensor:
        """[R, C] whether each token is like the one above; False where there is none."""
        values, found = self._cells.values, self._nowhere()
        for rows in self._together():
            rows = slice(max(rows.start, 1), rows.stop)
            found[rows] = self._test(values[rows], values[rows.start - 1 : rows.stop - 1])
        return found

    def _nowhere(self) -> Tensor:
        return torch.zeros(self.grid, dtype=torch.bool, device=self._values.device)

    def _together(self) -> Iterator[slice]:
        """A few rows at a time."""
        step = max(1, _TOGETHER // (self._cells.values[0].numel() or 1))
        for row in range(0, self.grid[0], step):
            yield slice(row, min(row + step, self.grid[0]))

    def _max(self, one: Tensor, other: Tensor) -> Tensor:
        return ((one - other).abs_().amax((-1, -3)) * self._scale).amax(-1) <= self._threshold

    def _mae(self, one: Tensor, other: Tensor) -> Tensor:
        return ((one - other).abs_().mean((-1, -3)) * self._scale).mean(-1) <= self._threshold

    def _rmse(self, one: Tensor, other: Tensor) -> Tensor:
        return ((one - other).square_().mean((-1, -3)) * self._scale**2).mean(-1).sqrt_() <= self._threshold


def predicted(left: Tensor, above: Tensor) -> Tensor:
    """[R, C] bool: tokens that stay, all neighbours being what they are in the picture (step 2 of the page).

    Args:
        left, above: [R, C] whether each token is like the one to the left, and like the one above.
    """
    from_above = torch.zeros_like(above)
    from_above[1:, 0] = True
    from_above[1:, 1:] = above[1:, :-1] & ~left[:-1, 1:]
    kept = ~torch.where(from_above, above, left)
    kept[0, 0] = True
    return kept


def predicted_anchored(alike: Alike, left: Tensor, above: Tensor) -> Tensor:
    """The same with neighbours as they would be rebuilt: a token that goes has the pixels of its prediction.

    The tokens of a diagonal depend on those of the two before only. A rebuilt token has the pixels of one that stays,
    its *anchor*; only pairs of anchors that are no neighbours have to be compared anew.

    Args:
        left, above: as in :func:`predicted`, on the host.
    """
    rows, columns = alike.grid
    left, above = left.flatten(), above.flatten()
    anchor = torch.arange(rows * columns)
    for number in range(1, rows + columns - 1):
        row = torch.arange(max(0, number - columns + 1), min(rows, number + 1))
        cell = row * columns + number - row
        inner = (row > 0) & (row < number)
        a, b, c = (cell - back for back in (1, columns, columns + 1))
        a, b, c = (torch.where(inner, at, cell) for at in (a, b, c))  # at the edges whatever is there
        a_is_c = _rebuilt(alike, anchor[a], anchor[c], (anchor[a] == a) & (anchor[c] == c), above[a], inner)
        b_is_c = _rebuilt(alike, anchor[b], anchor[c], (anchor[b] == b) & (anchor[c] == c), left[b], inner)
        from_above = torch.where(inner, a_is_c & ~b_is_c, row == number)
        source = torch.where(from_above, cell - columns, cell - 1)
        known = torch.where(from_above, above[cell], left[cell])
        goes = _rebuilt(alike, cell, anchor[source], anchor[source] == source, known, torch.ones_like(inner))
        anchor[cell] = torch.where(goes, anchor[source], cell)
    return (anchor == torch.arange(rows * columns)).view(rows, columns)


def _rebuilt(alike: Alike, one: Tensor, other: Tensor, own: Tensor, known: Tensor, asked: Tensor) -> Tensor:
    """[K] bool whether anchors are alike: ``known`` where both are ``own``; False where nobody ``asked``."""
    found = torch.where(own, known, one == other) & asked
    open_pairs = (asked & ~own & (one != other)).nonzero().squeeze(1)
    found[open_pairs] = alike(one[open_pairs], other[open_pairs])
    return found


def differs_from_before(alike: Alike, order: Tensor) -> Tensor:
    """[N] bool: whether each token in ``order`` differs from the one before it, the first as if it did.

    Args:
        order: [N] rows one after the other, forwards or backwards.
    """
    before, here, columns = order[:-1], order[1:], alike.grid[1]
    same = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    same[1:] = alike.left().flatten()[torch.maximum(before, here)]
    turns = torch.arange(columns, len(order), columns, device=order.device)
    same[turns] = alike(order[turns - 1], order[turns])
    return ~same


def in_runs(alike: Alike, order: Tensor, changes: Tensor) -> Tensor:
    """[N] bool: which of the tokens in ``order`` stay, each compared with the last one that did.

    Args:
        changes: [N] whether each differs from the one before it in this order.
    """
    changed, total = changes.tolist(), len(order)
    kept, at = [True] + [False] * (total - 1), 1
    anchor, ahead = 0, 1
    while at < total:
        if anchor == at - 1:  # known already
            kept[at] = changed[at]
            anchor, ahead = at if changed[at] else anchor, 1
            at += 1
            continue
        run = order[at : at + ahead]
        same = alike(run, order[anchor].expand_as(run)).tolist()
        length = same.index(False) if False in same else len(same)
        at, ahead = at + length, min(2 * ahead, _RUN)
        if length < len(same):
            kept[at], anchor, at = True, at, at + 1
    return torch.tensor(kept)


# -- position ids ------------------------------------------------------------------------------------------------------


def kept_positions(
    ids: Tensor, image_token: int, grids: Sequence[tuple[int, int, int]], keep: Sequence[Tensor], variant: str = "hf"
) -> tuple[Tensor, int, Tensor]:
    """Position ids (M-RoPE) of a prompt with images that have lost tokens (step 4 of the page).

    Models of transformers get those of "hf" by themselves; this is for hosts that number prompts on their own.

    Args:
        ids: [L] the whole prompt; image_token: its placeholder.
        grids: (frames, rows, columns) of each image, in tokens; keep: [K] of each, those that stay, ascending.
        variant: "hf": as in the whole prompt; "vllm": text goes on behind the largest position that is left.

    Returns:
        [3, L'] position ids; what is added to a generated token's number in the sequence (counted from L for "hf", from
        L' for "vllm"); [L'] rows of the whole prompt that are left.
    """
    visual = (ids == image_token).nonzero().squeeze(1).tolist()
    parts, rows, done, following, seen = [], [], 0, 0, 0

    def text(end: int) -> None:
        nonlocal done, following
        rows.append(torch.arange(done, end))
        parts.append((torch.arange(end - done) + following).expand(3, -1))
        following += end - done
        done = end

    for (frames, height, width), kept in zip(grids, keep, strict=True):
        text(visual[seen])
        kept = kept.cpu()
        inside = kept % (height * width)
        cells = torch.stack([kept // (height * width), inside // width, inside % width])
        rows.append(kept + done)
        parts.append(cells + following)
        done, seen = done + frames * height * width, seen + frames * height * width
        following += int(cells.max()) + 1 if variant == "vllm" else max(frames, height, width)
    text(len(ids))
    positions = torch.cat(parts, dim=1)
    length = positions.shape[1] if variant == "vllm" else len(ids)
    return positions, following - length, torch.cat(rows)
