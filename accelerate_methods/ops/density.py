"""Density peaks (DPC-kNN) on token embeddings: scores, and the clustering around them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from accelerate_methods.ops.select import by_score, on_device, pick_rows

_EXACT_UP_TO = 25  # tokens; as torch.cdist, which computes larger sets through their products


def squared_distances(tokens: Tensor, exact: bool = False) -> Tensor:
    """``|x_i - x_j|^2 / D`` within each set, float32: [B, M, D] -> [B, M, M], zero on the diagonal.

    Args:
        exact: from the differences instead of the products; slow for large sets, but equal tokens are at distance 0.
    """
    tokens = tokens.detach().float()
    size, width = tokens.shape[-2:]
    if exact or size <= _EXACT_UP_TO:
        return torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist").square_().mul_(1.0 / width)
    with torch.autocast(tokens.device.type, enabled=False):
        product = torch.bmm(tokens, tokens.transpose(1, 2))
    norm = product.diagonal(dim1=1, dim2=2).clone()  # of the products themselves: equal tokens cancel
    squared = product.mul_(-2.0).add_(norm[:, :, None]).add_(norm[:, None, :]).clamp_(min=0.0).mul_(1.0 / width)
    squared.diagonal(dim1=1, dim2=2).zero_()
    return squared


def density_peak_scores(
    tokens: Tensor, neighbours: int, noise: Tensor | None = None, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Density and density-peak score of every token within its own set.

    With distances ``dist_ij = |x_i - x_j| / sqrt(D)`` (float32): the density is ``exp(-mean of the k smallest
    dist_ij^2)``, i itself among the k; the peak distance is the smallest distance to a denser token, or the largest
    distance of the whole set for the densest; the score is their product. Of two tokens of equal density the one of
    lower index counts as the denser: tokens that are much alike, as those of a flat region, all have density 1 in
    float32, and without an order among them every one would be "the densest" of its set.

    Args:
        tokens: [B, M, D], B independent sets; any float dtype, computed in float32.
        neighbours: k; clipped to the size of a set.
        noise: [B, M] added to the density to break ties, or None.
        counts: [B] sizes of sets that are padded to M at the end; None where all are full. Padding scores -inf.

    Returns:
        density [B, M] and score [B, M], float32.

    Source: FastVID (LunarShen/FastVID@a40a109); the rules are in docs/methods/fastvid.md, step 5.
    """
    squared = squared_distances(tokens)
    padding = None
    if counts is not None:
        padding = torch.arange(squared.shape[-1], device=squared.device) >= counts[:, None]
        squared = squared.masked_fill(padding[:, None, :], torch.inf)
    number = None if counts is None else counts.clamp(min=1, max=min(neighbours, squared.shape[-1]))
    density = _spread(squared, neighbours, number).neg_().exp_()
    if noise is not None:
        density = density + noise
    if padding is None:
        return density, density * _peak_distance(squared, density)
    density = density.masked_fill(padding, -torch.inf)
    squared = squared.masked_fill(padding[:, :, None] | padding[:, None, :], 0.0)
    return density, (density * _peak_distance(squared, density)).masked_fill(padding, -torch.inf)


def dpc_knn(
    tokens: Tensor,
    clusters: int | Sequence[int],
    neighbours: int | Sequence[int],
    noise: Tensor | None = None,
    exact: bool = False,
    counts: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Clusters around the density peaks of each set, each token going to the nearest peak.

    Args:
        tokens: [B, M, D], B independent sets; any float dtype, computed in float32.
        clusters: n of all sets or of each, clipped to 1 and the set's size; neighbours: k of the density, of all sets
            or of each, clipped likewise.
        noise: [B, M] added to the density to break ties. Without it densities are taken relative to the largest of the
            set: the same clusters, but no underflow where tokens lie far apart. Equal ones are ordered as in
            :func:`density_peak_scores`.
        exact: see :func:`squared_distances`.
        counts: sizes of sets that are filled up to M with repetitions of their own tokens; None where all are full.

    Returns:
        labels [B, M] in 0..n-1, and centres [B, n]: the token that label c stands for, in descending order of score.
        Labels of what fills a set up, and centres beyond its own n, say nothing.

    Source: PruneVid (Visual-AI/PruneVid@b12600c6); the rules are in docs/methods/prunevid.md, step 1.
    """
    sets, size = tokens.shape[:2]
    counts = [size] * sets if counts is None else counts
    wanted = [clusters] * sets if isinstance(clusters, int) else clusters
    wanted = [max(1, min(number, count)) for number, count in zip(wanted, counts, strict=True)]
    filled, uneven = min(counts) < size, min(wanted) < max(wanted)
    near = [neighbours] * sets if isinstance(neighbours, int) else neighbours
    near = [max(1, min(number, count)) for number, count in zip(near, counts, strict=True)]
    most, few = max(near), min(near) < max(near)
    sizes = numbers = number = None
    if filled or uneven or few:
        sizes, numbers, number = on_device([counts, wanted, near], tokens.device)
    number = number if few else None
    squared = squared_distances(tokens, exact)
    if filled:
        padding = torch.arange(size, device=tokens.device) >= sizes[:, None]
        spread = _spread(squared.masked_fill(padding[:, None, :], torch.inf), most, number)
        spread = spread.masked_fill(padding, torch.inf)
    else:
        spread = _spread(squared, most, number)
    density = (spread.amin(1, keepdim=True) - spread).exp() if noise is None else (-spread).exp() + noise
    if filled and noise is not None:  # least dense, and last among equals; without noise it has density 0 and is last
        density = density.masked_fill(padding, -1.0)
    score = density * _peak_distance(squared, density)
    if filled:
        score = score.masked_fill(padding, -torch.inf)
    centres = by_score(score)[:, : max(wanted)]
    label = torch.arange(max(wanted), device=tokens.device).expand_as(centres)
    apart = pick_rows(squared, centres)
    if uneven:
        beyond = label >= numbers[:, None]
        apart = apart.masked_fill(beyond[:, :, None], torch.inf)
    labels = apart.min(1).indices  # of equal ones the first
    if uneven:
        label = torch.where(beyond, labels.gather(1, centres), label)
    return labels.scatter_(1, centres, label), centres


def alike(counts: Sequence[int], share: float = 0.8) -> list[list[int]]:
    """Numbers of sets that are clustered together, filled up: those of a batch have at least ``share`` of its largest.

    What a set is filled up with costs time, too. The largest sets come first; host integers.
    """
    batches: list[list[int]] = []
    for number in sorted(range(len(counts)), key=lambda i: -counts[i]):
        if not batches or counts[number] < share * counts[batches[-1][0]]:
            batches.append([])
        batches[-1].append(number)
    return batches


def _spread(squared: Tensor, neighbours: int, number: Tensor | None = None) -> Tensor:
    """[B, M] mean of each token's k smallest squared distances; in sets of fewer tokens of ``number`` [B] of them."""
    nearest = squared.topk(min(neighbours, squared.shape[-1]), dim=-1, largest=False).values
    if number is None:
        return nearest.mean(-1)
    number = number[:, None]
    beyond = torch.arange(nearest.shape[-1], device=squared.device) >= number[..., None]
    return nearest.masked_fill(beyond, 0.0).sum(-1) / number


def _peak_distance(squared: Tensor, density: Tensor) -> Tensor:
    """[B, M] distance to the nearest denser token (of equals the lower index is), or the largest of the set."""
    order = torch.sort(density, dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    farthest = squared.flatten(1).amax(1)[:, None, None]
    denser = rank[:, None, :] < rank[:, :, None]
    return torch.where(denser, squared, farthest).amin(-1).sqrt()
