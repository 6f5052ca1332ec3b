"""Density-peak scores (DPC-kNN) on token embeddings."""

from __future__ import annotations

import torch
from torch import Tensor


def density_peak_scores(tokens: Tensor, neighbours: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Density and density-peak score of every token within its own set.

    With distances ``dist_ij = |x_i - x_j| / sqrt(D)`` (float32): the density is ``exp(-mean of the k smallest
    dist_ij^2)``, i itself among the k; the peak distance is the smallest distance to a denser token, or the largest
    distance of the whole set for the densest; the score is their product.

    Args:
        tokens: [B, M, D], B independent sets; any float dtype, computed in float32.
        neighbours: k; clipped to M.
        noise: [B, M] added to the density to break ties, or None.

    Returns:
        density [B, M] and score [B, M], float32.

    Source: specs/fastvid.md section 5.
    """
    tokens = tokens.float()
    size, width = tokens.shape[-2:]
    distance = torch.cdist(tokens, tokens) * width**-0.5
    nearest = distance.topk(min(neighbours, size), dim=-1, largest=False).values
    density = (-nearest.square().mean(-1)).exp()
    if noise is not None:
        density = density + noise
    denser = density[:, None, :] > density[:, :, None]
    farthest = distance.flatten(1).amax(1)[:, None, None]
    peak = torch.where(denser, distance, farthest).amin(-1)
    return density, density * peak
