"""Outliers of a score, and tokens that take in their most similar others."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from accelerate_methods.ops.diversity import directions
from accelerate_methods.ops.select import pick_rows

NEIGHBOURS = 32


def above_whisker(scores: Tensor, factor: float = 1.5) -> Tensor:
    """Which scores are outliers: above the third quartile by more than ``factor`` times the quartiles' distance.

    Args:
        scores: [..., N]; quartiles are those of the last dimension, interpolated linearly.

    Returns:
        [..., N] bool. Where the scores hold what is not a number, there are none.
    """
    scores = scores.float()
    first, third = torch.quantile(scores, scores.new_tensor([0.25, 0.75]), dim=-1, keepdim=True)
    return scores > third + factor * (third - first)


def outlier_ratio(scores: Tensor) -> float:
    """Share of the scores [V, N] of all views together that are outliers. Reads the device."""
    return int(above_whisker(scores.flatten()).sum()) / scores.numel()


@dataclasses.dataclass
class Folded:
    """Tokens after :func:`fold_into`.

    Attributes:
        tokens: [V, K', D] in the dtype of the features: the chosen ones with what they took in, and one for the rest if
            there is any.
        places: [V, K'] the token at which each stands, -1 for one that is chosen a second time.
        slot: [V, N] which of them holds each token, -1 if none does.
    """

    tokens: Tensor
    places: Tensor
    slot: Tensor


def fold_into(
    features: Tensor, keys: Tensor, weights: Tensor, chosen: Tensor, neighbours: int = NEIGHBOURS
) -> Folded:
    """Every chosen token becomes itself plus the weighted sum of those most similar to it; one more is the rest's.

    The similar ones are looked for among all others, chosen or not, by cosine similarity of keys; one token can be
    taken in by several. Where there are fewer than ``neighbours``, all are taken in; never what is not a number.

    Args:
        features: [V, N, D]; keys: [V, N, d]; weights: [V, N].
        chosen: [V, K] indices. If a token stands there twice, it is its own neighbour, and as many of the first of the
            rest are lost as stand there twice.

    Source: LLaVA-PruMerge (42Shawn/LLaVA-PruMerge@097c041); docs/methods/prumerge.md, steps 3 and 4.
    """
    sets, size = weights.shape
    count = chosen.shape[1]
    rest = _last_of_rest(chosen, size)
    pool = torch.cat([chosen, rest], dim=1)
    states, weight = pick_rows(features.float(), pool), weights.float().gather(1, pool)
    clean = torch.where(torch.isfinite(states), states, 0.0)
    weight = weight.nan_to_num(0.0)
    similarity = _similarity(keys, pool, count)
    near = torch.zeros_like(similarity, dtype=torch.bool)
    near.scatter_(2, similarity.topk(min(neighbours, pool.shape[1] - 1), dim=2).indices, True)
    tokens = torch.baddbmm(states[:, :count], near * weight[:, None], clean)
    turn = torch.arange(count, device=chosen.device).expand(sets, -1)
    slot = torch.full((sets, size), -1, device=chosen.device)
    slot.scatter_reduce_(1, chosen, turn, "amin", include_self=False)
    places = torch.where(slot.gather(1, chosen) == turn, chosen, -1)
    if rest.shape[1]:
        tokens = torch.cat([tokens, weight[:, None, count:] @ clean[:, count:]], dim=1)
        places = torch.cat([places, rest.gather(1, weight[:, count:].argmax(1, keepdim=True))], dim=1)
        # the most similar of those that took a token in holds it, or else the rest's one, number ``count``
        holders = similarity.masked_fill(~near, -3.0)[..., count:]
        nobody = similarity.new_full((sets, 1, rest.shape[1]), -2.0)
        slot.scatter_(1, rest, torch.cat([holders, nobody], dim=1).max(1).indices)
        slot.scatter_(1, places[:, -1:], count)  # it stands there
    return Folded(tokens.to(features.dtype), places, slot)


def _similarity(keys: Tensor, pool: Tensor, count: int) -> Tensor:
    """[V, K, M] of the first ``count`` of the ``pool`` [V, M] to all of it, -2 to themselves."""
    unit = pick_rows(directions(keys)[0], pool)
    similarity = unit[:, :count] @ unit.mT
    similarity.diagonal(dim1=1, dim2=2).fill_(-2.0)
    return similarity


def _last_of_rest(chosen: Tensor, size: int) -> Tensor:
    """[V, size - K] ascending, the last ones of the indices that are not among ``chosen`` [V, K]."""
    left = torch.ones(chosen.shape[0], size, dtype=torch.uint8, device=chosen.device).scatter_(1, chosen, 0)
    return left.sort(dim=1, stable=True).indices[:, min(chosen.shape[1], size) :]
