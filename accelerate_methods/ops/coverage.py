"""Greedy maximum coverage (facility location): picks that together serve everything as well as they can."""

from __future__ import annotations

import torch
from torch import Tensor

POOL = 64  # candidates among which the next picks are looked for on a CPU
LAST = -torch.finfo(torch.float32).max  # of candidates that are picked when there are no others


def greedy_coverage(
    benefit: Tensor, count: int, weights: Tensor | None = None, *, add: bool = False, last: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Pick candidates one after the other, each the one that improves the coverage of everything most.

    What is to be covered is covered as well as by the best pick, and by 0 at first. A candidate gains the sum of what
    it would improve, times its weight. Of equal ones the lower index wins; no candidate is picked twice. Several sets
    are worked on at once, and a GPU is not waited for.

    Args:
        benefit: [B, N, M] how well each of N candidates covers each of M things; numbers only.
        count: picks of each set; more than N means N.
        weights: [B, N] at least 0; None weighs all alike.
        add: the weight is added to the gain, instead of being its factor.
        last: [B, N] True for candidates that come only after all others.

    Returns:
        [B, K] indices in the order of the picks, and [B, K] the weighted gain of each.

    Gains only fall as more is covered, so that those of earlier steps are bounds: a CPU evaluates anew only candidates
    that may come next (Minoux, 1978), with the same picks.
    """
    sets, size, _ = benefit.shape
    count = max(0, min(count, size))
    if count == 0:
        return torch.zeros(sets, 0, dtype=torch.long, device=benefit.device), benefit.new_zeros(sets, 0)
    if weights is None:
        weights = torch.full_like(benefit[:, :, 0], 0.0 if add else 1.0)
    weights = weights.to(benefit.dtype).nan_to_num().clamp(min=0)
    free = torch.zeros_like(weights) if last is None else last * LAST
    with torch.no_grad():
        if benefit.device.type != "cpu":
            return _from_all(benefit, count, weights, free, add)
        found = [_from_pools(*one, count, add) for one in zip(benefit, weights, free, strict=True)]
        return torch.stack([order for order, _ in found]), torch.stack([gain for _, gain in found])


def _weighted(gain: Tensor, weights: Tensor, free: Tensor, add: bool) -> Tensor:
    return (gain + weights if add else gain * weights) + free


def _from_all(benefit: Tensor, count: int, weights: Tensor, free: Tensor, add: bool) -> tuple[Tensor, Tensor]:
    """Every candidate of every set is evaluated in every step; reads nothing of the device."""
    left = torch.empty_like(benefit)
    covered = torch.zeros_like(benefit[:, :1])
    order, gains = [], []
    for _ in range(count):
        torch.sub(benefit, covered, out=left).clamp_(min=0)
        gain, pick = _weighted(left.sum(2), weights, free, add).max(1, keepdim=True)
        order.append(pick)
        gains.append(gain)
        covered = torch.maximum(covered, benefit.take_along_dim(pick[:, :, None], dim=1))
        free = free.scatter(1, pick, -torch.inf)
    return torch.cat(order, 1), torch.cat(gains, 1)


def _from_pools(benefit: Tensor, weights: Tensor, free: Tensor, count: int, add: bool) -> tuple[Tensor, Tensor]:
    """One set. As long as the best of the candidates with the highest bounds is above every other bound, it is next."""
    bound = _weighted(benefit.clamp(min=0).sum(1), weights, free, add)
    covered = benefit.new_zeros(benefit.shape[1])
    order, gains = [], []
    while len(order) < count:
        ranked = bound.sort(descending=True, stable=True).indices[: POOL + 1]
        pool = ranked[:POOL].sort().values
        floor, beyond = (-torch.inf, len(bound))  # the best of the others by bound, the first of equal ones
        if len(ranked) > POOL:
            beyond = int(ranked[POOL])
            floor = bound[beyond].item()
        rows, weight, left = benefit[pool], weights[pool], free[pool]
        while True:
            exact = _weighted((rows - covered).clamp_(min=0).sum(1), weight, left, add)
            gain, place = (found.item() for found in exact.max(0))
            pick = int(pool[place])
            if len(order) == count or gain < floor or (gain == floor and pick > beyond):
                break
            order.append(pick)
            gains.append(gain)
            covered = torch.maximum(covered, rows[place])
            left[place] = free[pick] = -torch.inf
        bound[pool] = exact
    return torch.tensor(order), benefit.new_tensor(gains)
