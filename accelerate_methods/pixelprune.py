"""PixelPrune: pixel-level adaptive visual token reduction via predictive coding (arXiv 2604.00886).

Before the vision encoder's first block, a visual token of an image goes if its pixels can be told from those of its
neighbours to the left, above and above-left, as a lossless picture codec predicts them (``pred_2d``). With threshold 0
the picture can be rebuilt exactly from what stays. How much that is, the picture decides: flat margins and menus
go, photographs stay. Kept tokens keep their positions, in the encoder and in the language model.

All rules, and the faults of the official code: docs/methods/pixelprune.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from accelerate_methods.registry import register
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.fields import choice, flag, integer, real
from accelerate_methods.stages.pixels import PixelCells, PixelMethod

_TOGETHER = 1 << 18  # values that are compared at a time, so that differences stay in the cache
_GLANCE = 16  # pixels of each patch that are compared first, in one channel: those of one line of the cache
_SPARSE = 3  # a third of a row's tokens is as quickly compared as all of them
_FEW = 4  # pairs up to which looking at these first does not pay
_AHEAD, _FARTHEST = 4, 64  # tokens that are compared with the last one that stays at a time: at first, and at most


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
            return predicted(alike.left(), alike.above()) if exact or not self.anchored else predicted_anchored(alike)
        order = torch.arange(rows * columns, device=cells.values.device).view(rows, columns)
        if self.scan == "serpentine":
            order[1::2] = order[1::2].flip(1)
        order = order.flatten()
        changes = differs_from_before(alike, order, quickly=not exact)
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
        self._values = cells.values.flatten(0, 1)
        self._scale = torch.tensor(cells.scale, device=cells.values.device)
        self._test: Callable[[Tensor, Tensor], Tensor] = getattr(self, f"_{metric}")
        self._step = max(1, _TOGETHER // (self._values[0].numel() or 1))  # tokens that are compared at a time
        #: the host looks at a few pixels first and fetches the others only where these are alike
        self.glances = metric == "max" and cells.values.device.type == "cpu"
        middle = cells.values.shape[-1] // 2
        self._glance = self._values[:, :, 1, middle : middle + _GLANCE].flatten(1).unflatten(0, self.grid)

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """[K] bool of tokens by their raster numbers [K]."""
        if not self.glances or len(first) <= _FEW:
            return self._whole(first, second)
        glance = self._glance.flatten(0, 1)
        found = self._at_a_glance(glance.index_select(0, first), glance.index_select(0, second))
        near = found.nonzero().squeeze(1)
        found[near] = self._whole(first[near], second[near])
        return found

    def left(self, quickly: bool = False) -> Tensor:
        """[R, C] whether each token is like the one to the left; False where there is none.

        Args:
            quickly: True also where a glance leaves it open (:attr:`glances`).
        """
        return self._like_the_one_before(1, quickly)

    def above(self, quickly: bool = False) -> Tensor:
        """[R, C] whether each token is like the one above; False where there is none. As :meth:`left`."""
        return self._like_the_one_before(0, quickly)

    def _like_the_one_before(self, dim: int, quickly: bool) -> Tensor:
        def pairs(table: Tensor) -> tuple[Tensor, Tensor]:
            return table.narrow(dim, 1, self.grid[dim] - 1), table.narrow(dim, 0, self.grid[dim] - 1)

        found = torch.zeros(self.grid, dtype=torch.bool, device=self._values.device)
        here, _ = pairs(found)
        if self.glances:
            here.copy_(self._at_a_glance(*pairs(self._glance)))
            if quickly:
                return found
        rows = max(1, self._step // self.grid[1])
        for part, one, other in zip(*(table.split(rows) for table in (here, *pairs(self._cells.values))), strict=True):
            near = part.nonzero(as_tuple=True) if self.glances else None
            if near is None or _SPARSE * len(near[0]) > part.numel():  # as quick without picking them out
                part.copy_(self._test(one, other))
            elif len(near[0]):
                part[near] = self._test(one[near], other[near])
        return found

    def to_one(self, start: int, stop: int, one: int) -> Tensor:
        """[stop - start] bool whether each token from ``start`` on is like the token ``one``."""
        return self._test(self._values[start:stop], self._values[one])

    def _whole(self, first: Tensor, second: Tensor) -> Tensor:
        pairs, values = zip(first.split(self._step), second.split(self._step), strict=True), self._values
        return torch.cat([self._test(values.index_select(0, one), values.index_select(0, two)) for one, two in pairs])

    def _at_a_glance(self, one: Tensor, other: Tensor) -> Tensor:
        """False where a few pixels show already that tokens differ."""
        return (one - other).abs_().amax(-1) * self._scale[1] <= self._threshold

    def _max(self, one: Tensor, other: Tensor) -> Tensor:
        return ((one - other).abs_().amax(-1) * self._scale).amax((-1, -2)) <= self._threshold

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


def predicted_anchored(alike: Alike) -> Tensor:
    """The same with neighbours as they would be rebuilt: a token that goes has the pixels of its prediction.

    A rebuilt token has the pixels of one that stays, its *anchor*, so that anchors are compared. The tokens of a
    diagonal depend on those of the two before only: what they ask for is compared at once. On the host.
    """
    rows, columns = alike.grid
    known, total = _Known(alike), rows * columns
    anchor = list(range(total))
    for number in range(1, rows + columns - 1):
        row, last = max(0, number - columns + 1), min(rows - 1, number)
        waiting = [at * columns + number - at for at in range(row, last + 1)]
        while waiting:
            for cell in waiting:
                b = anchor[cell - columns] if cell >= columns else anchor[cell - 1]
                a = anchor[cell - 1] if cell % columns else b
                c = anchor[cell - columns - 1] if a != b else a
                anchor[cell] = _rebuilt_from(known, cell, a, b, c)
            waiting = [cell for cell in waiting if anchor[cell] < 0] if known.missed else []
            known.look_up()
    return (torch.tensor(anchor) == torch.arange(total)).view(rows, columns)


class _Known(dict[int, bool]):
    """Whether two tokens are alike, by ``later * total + earlier``. Of those not known it says None, and notes them.

    Attributes:
        missed: pairs that were asked for in vain since the last :meth:`look_up`.
    """

    def __init__(self, alike: Alike):
        super().__init__()
        rows, columns = alike.grid
        self.total = rows * columns
        cells = torch.arange(self.total).view(rows, columns)
        left, above = alike.left(quickly=True)[:, 1:], alike.above(quickly=True)[1:]
        for found, later, back in ((left, cells[:, 1:], 1), (above, cells[1:], columns)):
            sure = ~found | (not alike.glances)
            pairs = later[sure] * self.total + later[sure] - back
            self.update(zip(pairs.tolist(), found[sure].tolist(), strict=True))
        self._alike, self.missed = alike, []

    def __missing__(self, pair: int) -> None:
        self.missed.append(pair)

    def of(self, one: int, other: int) -> bool | None:
        """Of two tokens in any order."""
        return self[one * self.total + other if one > other else other * self.total + one]

    def look_up(self) -> None:
        """Learn what was missed."""
        if self.missed:
            pairs = torch.tensor(self.missed)
            alike = self._alike(pairs // self.total, pairs % self.total)
            self.update(zip(self.missed, alike.tolist(), strict=True))
            self.missed = []


def _rebuilt_from(known: _Known, cell: int, a: int, b: int, c: int) -> int:
    """The anchor of ``cell``, itself if it stays, from those of its neighbours A, B and C; -1 if more must be known."""
    like_a = known[cell * known.total + a]
    if a == b:  # C, which chooses between them, does not matter
        return -1 if like_a is None else a if like_a else cell
    like_b = known[cell * known.total + b]
    if like_a is False and like_b is False:
        return cell
    a_is_c = a == c or known.of(a, c)
    b_is_c = b == c or known.of(b, c)
    if None in (like_a, like_b, a_is_c, b_is_c):
        return -1
    source, goes = (b, like_b) if a_is_c and not b_is_c else (a, like_a)
    return source if goes else cell


def differs_from_before(alike: Alike, order: Tensor, quickly: bool = False) -> Tensor:
    """[N] bool: whether each token in ``order`` differs from the one before it, the first as if it did.

    Args:
        order: [N] rows one after the other, forwards or backwards; quickly: as in :meth:`Alike.left`.
    """
    before, here, columns = order[:-1], order[1:], alike.grid[1]
    same = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    same[1:] = alike.left(quickly).flatten()[torch.maximum(before, here)]
    turns = torch.arange(columns, len(order), columns, device=order.device)
    same[turns] = alike(order[turns - 1], order[turns])
    return ~same


def in_runs(alike: Alike, order: Tensor, changes: Tensor) -> Tensor:
    """[N] bool: which of the tokens in ``order`` stay, each compared with the last one that did.

    Args:
        order: as in :func:`differs_from_before`.
        changes: [N] True at the first, and nowhere but where a token differs from the one before it in this order.
            Others may differ, too.
    """
    columns, total = alike.grid[1], len(order)
    known, cells = _foreseen(alike, order, changes), order.tolist()
    limits = changes.nonzero().squeeze(1).tolist()[::-1]
    anchor, at, ahead, stay = 0, 1, _AHEAD, [0]
    while at < total:
        like, length = known.get(at * total + anchor), 0
        if like:
            at += 1
            continue
        if like is None:  # tokens of a row, which are neighbours in memory, up to where the run probably ends
            while limits and limits[-1] < at:
                limits.pop()
            stop = min(at + ahead, at - at % columns + columns, limits[-1] + 1 if limits else total)
            first, last = sorted((cells[at], cells[stop - 1]))
            same = alike.to_one(first, last + 1, cells[anchor]).tolist()
            same = same if cells[at] == first else same[::-1]
            if False not in same:
                at, ahead = stop, min(2 * ahead, _FARTHEST)
                continue
            length = same.index(False)
        anchor, ahead = at + length, max(_AHEAD, length + 1)
        stay.append(anchor)
        at = anchor + 1
    return torch.zeros(total, dtype=torch.bool).index_fill_(0, torch.tensor(stay), True)


def _foreseen(alike: Alike, order: Tensor, changes: Tensor) -> dict[int, bool]:
    """Whether tokens are like one before, by ``later * N + earlier``: pairs that :func:`in_runs` will probably ask for.

    Those are the first tokens of a run of alike ones, and the one behind it, with the run's beginning.
    """
    total = len(order)
    number = torch.arange(total)
    begin = torch.where(changes, number, 0).cummax(0).values.roll(1)  # of the run of the token before
    apart = number - begin
    asked = (apart > 0) & (apart <= _AHEAD) & ~(changes & (apart == 1))
    differing = changes.nonzero().squeeze(1)[1:]
    known = dict.fromkeys((differing * total + differing - 1).tolist(), False)
    pairs = (number * total + begin)[asked].tolist()
    known.update(zip(pairs, alike(order[asked], order[begin[asked]]).tolist(), strict=True))
    return known


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
