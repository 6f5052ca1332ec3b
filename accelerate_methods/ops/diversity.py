"""Choosing tokens that differ from each other: directions, and farthest-first picks by cosine distance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from accelerate_methods.ops.gram import gram, quick_dtype

GRAM_TOKENS = 4096  # up to so many tokens all their similarities are kept in float32 (64 MiB)
FEW_TOKENS = 1024  # up to so many it does not pay to compute less than all
AHEAD = 96  # picks that are foreseen at a time on a CPU
COARSE = 0.5  # distance up to which the estimate is too coarse to foresee picks
POOL = 128  # tokens among which they are foreseen then
AT_LEAST = 24  # picks that are foreseen then, certain or not: fewer rows take no less time
SHARE = 0.25  # of the tokens, up to which it pays to compute the rows of the picks alone
BLOCK = 16  # tokens whose nearest neighbours are looked for at a time
MAP_ENTRIES = 2**26  # distances of several sets that are kept at a time (256 MiB)
PICKED, LAST, FARTHEST = -3.0, -1.0, 3.0  # distances are within [0, 2] but for rounding


def directions(features: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ``features`` [..., N, D] at length one, float32, without gradient; [..., N] which have a direction.

    Those that are zero or hold what is not a number have none, and become zero.
    """
    states = features.detach().float()
    length = states.norm(dim=-1)
    has = torch.isfinite(length) & (length > 0)
    return torch.where(has[..., None], states / length[..., None], 0.0), has


def farthest_first(features: Tensor, count: int) -> Tensor:
    """Pick rows one after the other, each the farthest from those picked before by cosine distance.

    The first is the one whose nearest neighbour is farthest. Of equal ones the lower index wins, and no row is picked
    twice. Rows without a direction (zero, or not a number) come last.

    Args:
        features: [N, D]; compared in float32.
        count: 0 <= count <= N.

    Returns:
        [count] indices in the order of the picks.

    Source: DivPrune (vbdi/divprune@799e2d9); docs/methods/divprune.md. A CPU that multiplies bfloat16 much quicker than
    float32 estimates all similarities and computes only those that picks depend on; the picks are the same. A GPU would
    have to be waited for.
    """
    if count <= 0 or len(features) < 2:
        return torch.arange(min(count, len(features)), device=features.device)
    with torch.no_grad():
        if features.device.type != "cpu" or not _few_rows_do(len(features), count):
            return _from_all(*directions(features), count)
        states = features.detach().float()
        length = states.norm(dim=1)
        has = torch.isfinite(length) & (length > 0)
        if not bool(has.all()):
            states = states.masked_fill(~has[:, None], 0.0)
        return _from_some(_Directions(states, torch.where(has, 1 / length, 0.0), has), count)


def _few_rows_do(total: int, count: int) -> bool:
    """Whether a CPU had better compute rows of picks than all similarities of ``total`` tokens."""
    worth = count <= SHARE * total and quick_dtype() != torch.float32
    return total > GRAM_TOKENS or (total > FEW_TOKENS and worth)


def finite_rows(features: Tensor) -> tuple[Tensor, Tensor | None]:
    """``features`` [..., D] in float32 without gradient, rows that hold what is not a number as zeros.

    Returns:
        The rows, and [...] True where they are numbers; None where all of them are known to be. A CPU looks first, so
        that nothing is copied; a GPU, which would have to be waited for, always copies.
    """
    states = features.detach().float()
    if states.device.type == "cpu" and bool(torch.isfinite(states.sum())):
        return states, None
    finite = torch.isfinite(states).all(-1)
    return torch.where(finite[..., None], states, 0.0), finite


def farthest_first_sets(features: Tensor, count: int, weights: Tensor | None = None) -> Tensor:
    """:func:`farthest_first` within each of many sets at once, the distance to a candidate times its weight.

    Args:
        features: [S, N, D] without what is not a number (:func:`finite_rows`); compared in float32.
        count: 0 <= count <= N picks of every set.
        weights: [S, N]; None weighs all alike.

    Returns:
        [S, count] indices in the order of the picks. Rows of zeros come last.

    Source: FlashVID (Fanziyang-v/FlashVID@1d37422c); the rules are in docs/methods/flashvid.md, step 2.
    """
    sets, size = features.shape[:2]
    if count <= 0:
        return torch.zeros(sets, 0, dtype=torch.long, device=features.device)
    each = max(1, MAP_ENTRIES // (size * size))
    parts = features.detach().float().split(each)
    weighed = [None] * len(parts) if weights is None else weights.detach().float().nan_to_num().split(each)
    return torch.cat([_weighted(part, count, weight) for part, weight in zip(parts, weighed, strict=True)])


def _weighted(states: Tensor, count: int, weights: Tensor | None) -> Tensor:
    with torch.autocast(states.device.type, enabled=False):
        gram = torch.bmm(states, states.mT)
    squared = gram.diagonal(dim1=1, dim2=2).clone()  # of the products themselves: a row is at distance 0 of itself
    has = squared > 0
    inverse = squared.clamp(min=torch.finfo(torch.float32).tiny).rsqrt()
    value = gram.mul_(inverse[:, :, None]).mul_(inverse[:, None, :]).neg_().add_(1.0)
    if weights is not None:
        value.mul_(weights[:, None])
    value.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    last = torch.finfo(torch.float32).min
    picks = torch.empty(len(states), count, dtype=torch.long, device=states.device)
    least = torch.where(has, value.amin(1), last)
    for step in range(count):
        pick = least.argmax(1, keepdim=True)
        picks[:, step : step + 1] = pick
        row = value.take_along_dim(pick[:, :, None], dim=1)[:, 0]
        least = torch.where(has, row, last) if step == 0 else torch.minimum(least, row)
        least.scatter_(1, pick, -torch.inf)
    return picks


def _from_all(unit: Tensor, has: Tensor, count: int) -> Tensor:
    """From all similarities, or row by row of too many tokens to keep them; reads nothing of the device."""
    total, device = len(unit), unit.device
    similar = gram(unit) if total <= GRAM_TOKENS else None
    nearest = torch.empty(total, device=device)
    for start in range(0, total, GRAM_TOKENS):
        rows = (unit[start : start + GRAM_TOKENS] @ unit.T) if similar is None else similar.clone()
        rows.diagonal(start).fill_(-2.0)
        nearest[start : start + GRAM_TOKENS] = 1 - rows.amax(1)
    order = torch.empty(count, dtype=torch.long, device=device)
    distance = torch.where(has, nearest, LAST)
    for step in range(count):
        pick = distance.argmax().view(1)
        order[step : step + 1] = pick
        row = unit.index_select(0, pick) @ unit.T if similar is None else similar.index_select(0, pick)
        if step == 0:
            distance = torch.where(has, FARTHEST, LAST)
        distance = torch.minimum(distance, 1 - row[0]).index_fill_(0, pick, PICKED)
    return order


class _Directions:
    """Rows of ``states`` [N, D] with the inverse of their lengths, 0 for those without a direction.

    Attributes:
        estimate: [N, N] bfloat16, all cosines, -2 on the diagonal; each within :meth:`slack` of the true one.
    """

    def __init__(self, states: Tensor, inverse: Tensor, has: Tensor):
        self.states, self.inverse, self.has = states, inverse, has
        unit = torch.empty(states.shape, dtype=quick_dtype())
        for to, part, factor in zip(unit.split(64), states.split(64), inverse.split(64), strict=True):
            to.copy_(part * factor[:, None])  # what is in between stays in the cache
        self.estimate = gram(unit).bfloat16().fill_diagonal_(-2.0)

    def distances(self, rows: Tensor, to: Tensor | None = None) -> Tensor:
        """[R, T] of ``rows`` to those of ``to``, all of them if None."""
        others, inverse = (self.states, self.inverse) if to is None else (self.states[to], self.inverse[to])
        return 1 - (self.states[rows] @ others.T).mul_(self.inverse[rows, None]).mul_(inverse)

    def slack(self, cosine: Tensor) -> Tensor:
        """How far an estimated cosine can be off: both vectors, the sum and the result were rounded."""
        return 2.0**-8 + (2 + self.states.shape[1]) * 2.0**-24 + cosine.abs() * 2.0**-9

    def most_isolated(self) -> int:
        """The row whose nearest neighbour is farthest.

        The distance to the neighbour that the estimate says is the nearest bounds how far the nearest one can be. That
        one is looked for where the bound is the largest, until no other can be farther.
        """
        near = self.estimate.amax(1).float()
        slack = self.slack(near)
        bound = torch.where(self.has, 1 - near + slack, LAST)
        open_rows = (bound >= (bound - 2 * slack).max()).nonzero().squeeze(1)
        for rows in open_rows.split(64):
            other = self.estimate[rows].max(1).indices
            inner = torch.linalg.vecdot(self.states[rows], self.states[other])
            bound[rows] = torch.where(self.has[rows], 1 - inner * self.inverse[rows] * self.inverse[other], LAST)
        exact = torch.full_like(bound, -torch.inf)
        best, first = -torch.inf, len(bound)
        index = torch.arange(len(bound))
        while bool((left := (bound > best) | ((bound == best) & (index < first))).any()):
            block = bound.masked_fill(~left, -torch.inf).topk(min(BLOCK, int(left.sum()))).indices
            found = self.distances(block).scatter_(1, block[:, None], torch.inf).amin(1)
            exact[block] = torch.where(self.has[block], found, LAST)
            bound[block] = -torch.inf
            first = int(exact.argmax())
            best = exact[first].item()
        return first

    def foreseen(self, distance: Tensor, pick: int, left: int) -> Tensor:
        """``pick`` and rows that are probably picked after it, from ``distance`` [N] to those picked before.

        As long as the farthest are far enough for the estimate to tell them apart, it says which. Afterwards the next
        picks are looked for among the farthest tokens. They are certain until what is left of those is nearer than the
        other tokens were.
        """
        coarse = distance[pick].item() <= COARSE
        distance = distance.index_fill(0, torch.tensor([pick]), torch.inf)
        if not coarse:
            return self._played(distance, lambda pick: 1 - self.estimate[pick].float(), min(AHEAD, left))
        near, pool = distance.topk(min(POOL, len(distance)))
        among = self.distances(pool, pool)
        return pool[self._played(near, among.__getitem__, left, near[-1].item())]

    @staticmethod
    def _played(distance: Tensor, row: Callable[[int], Tensor], count: int, floor: float = -torch.inf) -> Tensor:
        picks: list[int] = []
        while len(picks) < count:
            best = int(distance.argmax())
            if len(picks) >= AT_LEAST and distance[best].item() <= floor:
                break
            picks.append(best)
            distance = torch.minimum(distance, row(best))
            distance[best] = PICKED
        return torch.tensor(picks)


def _from_some(rows: _Directions, count: int) -> Tensor:
    """Only rows of picks are computed. Products of many rows are quick, so those of the next picks are foreseen."""
    known: dict[int, Tensor] = {}
    pick, picks = rows.most_isolated(), []
    distance = torch.where(rows.has, FARTHEST, LAST)
    while True:
        picks.append(pick)
        if len(picks) == count:
            return torch.tensor(picks)
        if pick not in known:
            ahead = rows.foreseen(distance, pick, count - len(picks))
            known.update(zip(ahead.tolist(), rows.distances(ahead), strict=True))
        torch.minimum(distance, known[pick], out=distance)
        distance[pick] = PICKED
        pick = int(distance.argmax())
