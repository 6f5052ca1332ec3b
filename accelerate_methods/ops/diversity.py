"""Choosing tokens that differ from each other: directions, and farthest-first picks by cosine distance."""

from __future__ import annotations

import torch
from torch import Tensor

GRAM_TOKENS = 4096  # up to so many tokens a GPU keeps all their similarities (64 MiB)
FEW_TOKENS = 1024  # up to so many tokens a CPU does, too
POOL = 64  # tokens among which the next picks are looked for on a CPU
SKETCH = 1024  # channels that are enough to find a near neighbour
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

    Source: DivPrune (vbdi/divprune@799e2d9); docs/methods/divprune.md. Of many tokens a CPU computes only the
    similarities that picks depend on. A GPU, which would have to be waited for, computes all of them.
    """
    if count <= 0 or len(features) < 2:
        return torch.arange(min(count, len(features)), device=features.device)
    with torch.no_grad():
        if features.device.type != "cpu" or len(features) <= FEW_TOKENS:
            return _from_all(*directions(features), count)
        states = features.detach().float()
        length = states.norm(dim=1)
        has = torch.isfinite(length) & (length > 0)
        if not bool(has.all()):
            states = states.masked_fill(~has[:, None], 0.0)
        return _from_some(_Directions(states, torch.where(has, 1 / length, 0.0), has), count)


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
    gram = unit @ unit.T if total <= GRAM_TOKENS else None
    nearest = torch.empty(total, device=device)
    for start in range(0, total, GRAM_TOKENS):
        rows = (unit[start : start + GRAM_TOKENS] @ unit.T) if gram is None else gram.clone()
        rows.diagonal(start).fill_(-2.0)
        nearest[start : start + GRAM_TOKENS] = 1 - rows.amax(1)
    order = torch.empty(count, dtype=torch.long, device=device)
    distance = torch.where(has, nearest, LAST)
    for step in range(count):
        pick = distance.argmax().view(1)
        order[step : step + 1] = pick
        row = unit.index_select(0, pick) @ unit.T if gram is None else gram.index_select(0, pick)
        if step == 0:
            distance = torch.where(has, FARTHEST, LAST)
        distance = torch.minimum(distance, 1 - row[0]).index_fill_(0, pick, PICKED)
    return order


class _Directions:
    """Rows of ``states`` [N, D] with the inverse of their lengths, 0 for those without a direction."""

    def __init__(self, states: Tensor, inverse: Tensor, has: Tensor):
        self.states, self.inverse, self.has = states, inverse, has

    def distances(self, rows: Tensor, to: Tensor | None = None) -> Tensor:
        """[R, T] of ``rows`` to those of ``to``, all of them if None."""
        others, inverse = (self.states, self.inverse) if to is None else (self.states[to], self.inverse[to])
        return 1 - (self.states[rows] @ others.T).mul_(self.inverse[rows, None]).mul_(inverse)

    def most_isolated(self) -> int:
        """The row whose nearest neighbour is farthest.

        A sketch of the rows finds a near neighbour of each, which bounds how far the nearest one can be. The nearest
        one itself is looked for where that bound is the largest, until no other can be farther.
        """
        total, width = self.states.shape
        sketch = (self.states[:, :: -(-width // SKETCH)] * self.inverse[:, None]).bfloat16()
        near = (sketch @ sketch.T).fill_diagonal_(-2.0).max(1).indices
        bound = torch.empty(total)
        for start in range(0, total, 64):
            part = slice(start, start + 64)
            inner = torch.linalg.vecdot(self.states[part], self.states[near[part]])
            bound[part] = 1 - inner * self.inverse[part] * self.inverse[near[part]]
        bound[~self.has] = LAST
        exact = torch.full((total,), -torch.inf)
        best, first = -torch.inf, total
        index = torch.arange(total)
        while bool((left := (bound > best) | ((bound == best) & (index < first))).any()):
            block = bound.masked_fill(~left, -torch.inf).topk(min(POOL // 4, int(left.sum()))).indices
            found = self.distances(block).scatter_(1, block[:, None], torch.inf).amin(1)
            exact[block] = torch.where(self.has[block], found, LAST)
            bound[block] = -torch.inf
            first = int(exact.argmax())
            best = exact[first].item()
        return first


def _from_some(rows: _Directions, count: int) -> Tensor:
    """Distances to the picks only fall: as long as one of the farthest tokens is still farther than the nearest of them
    was, the next pick is among them, and their distances to each other are enough to find it."""
    picks = [torch.tensor([rows.most_isolated()])]
    distance = torch.where(rows.has, FARTHEST, LAST)
    left = count - 1
    while True:
        distance = torch.minimum(distance, rows.distances(picks[-1]).amin(0))
        distance[picks[-1]] = PICKED
        if not left:
            return torch.cat(picks)
        pool = distance.sort(descending=True, stable=True).indices[:POOL]
        near, among = distance[pool], rows.distances(pool, pool)
        floor, chosen = near[-1].item(), []
        while len(chosen) < left:
            best = int(near.argmax())
            if chosen and near[best].item() <= floor:
                break
            chosen.append(best)
            near = torch.minimum(near, among[best])
            near[best] = PICKED
        picks.append(pool[chosen])
        left -= len(chosen)
