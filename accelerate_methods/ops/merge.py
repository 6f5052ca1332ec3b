"""Merging tokens into chosen ones."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_to_anchors(pool: Tensor, anchors: Tensor, in_pool: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Blend every anchor with the mean of the pool tokens nearest to it (FastVID's density-based token merging).

    Each pool token goes to the anchor of highest cosine similarity; with n tokens of mean ``m`` an anchor ``t`` becomes
    ``w*t + (1-w)*m``, ``w = max(beta, 1/(n+1))``.

    Args:
        pool: [P, M, D] one pool per problem.
        anchors: [P, A, K, D]; A independent sets of K anchors share a pool.
        in_pool: [P, A, M] (or broadcastable) False where a pool row takes no part.
        beta: weight of the anchor.

    Returns:
        tokens [P, A, K, D]; assignment [P, A, M] (anchor 0..K-1 of each pool token); similarity [P, A, M] to it, not
        divided by the pool token's own norm, -inf where ``in_pool`` is False.

    Source: FastVID (LunarShen/FastVID@a40a109); the rules are in docs/methods/fastvid.md, step 6.
    """
    problems, sets, count, width = anchors.shape
    unit = torch.nn.functional.normalize(anchors, dim=-1, eps=1e-12).flatten(1, 2)
    similarity = torch.bmm(unit, pool.transpose(1, 2)).view(problems, sets, count, -1)
    similarity, assignment = similarity.max(dim=2)
    member = torch.zeros(problems, sets, count, pool.shape[1], dtype=pool.dtype, device=pool.device)
    member.scatter_(2, assignment[:, :, None], in_pool.expand_as(assignment)[:, :, None].to(pool.dtype))
    sizes = member.sum(-1, dtype=torch.float32)
    # Dividing the memberships instead of the sums keeps half-precision sums of thousands of tokens from overflowing.
    shares = (member / sizes.clamp(min=1.0)[..., None]).to(pool.dtype)
    mean = torch.bmm(shares.flatten(1, 2), pool).view(problems, sets, count, width)
    weight = (1.0 / (sizes + 1.0)).clamp(min=beta)[..., None].to(pool.dtype)
    similarity = similarity.masked_fill(~in_pool.expand_as(similarity), -torch.inf)
    return weight * anchors + (1 - weight) * mean, assignment, similarity
