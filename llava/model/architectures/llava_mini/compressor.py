"""The query compressor of LLaVA-Mini: a square map of CLIP features -> C x C tokens of the same width."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from accelerate_methods.engine.devices import own_weights
from llava.model.checkpoint import CheckpointError


class QueryCompressor(nn.Module):
    """C x C learnt queries that attend to the patches, with the parameter names of the official checkpoints.

    Positions are added behind the norms: to the queries the table itself, to the keys the table enlarged to the map's
    size; values have none (`llavamini/model/multimodal_projector/builder.py` of ictnlp/LLaVA-Mini@47da1137).

    Args:
        width: of the features, K; side: C; heads: of the attention.
    """

    def __init__(self, width: int, side: int, heads: int):
        super().__init__()
        if width % heads:
            raise CheckpointError(f"compressor: width {width} cannot be divided among {heads} heads.")
        self.side = side
        self.pos_embed = nn.Parameter(torch.zeros(side * side, width), requires_grad=False)
        self.query = nn.Parameter(torch.zeros(side * side, width))
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)  # holds the packed weights
        self.ln_q, self.ln_kv = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        """[B, M, K] features of a square map, row by row -> [B, C*C, K] tokens.

        Raises:
            ValueError: M is no square.
        """
        query, key, value = self._heads(features)
        out = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.attn.out_proj(out.transpose(1, 2).flatten(2))

    def attention(self, features: Tensor) -> Tensor:
        """[B, C*C, M] how much each token takes from each feature of the map, the mean over heads."""
        query, key, _ = self._heads(features)
        return (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1).mean(1)

    def _heads(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, C*C, d], keys and values [B, H, M, d]."""
        with own_weights(self), own_weights(self.attn):
            return self._projected(features)

    def _projected(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values = self.ln_kv(features)
        queries = (self.ln_q(self.query) + self.pos_embed).expand(len(features), -1, -1)
        states = (queries, values + self.key_positions(features.shape[1]), values)
        weight, bias = self.attn.in_proj_weight.chunk(3), self.attn.in_proj_bias.chunk(3)
        query, key, value = (
            nn.functional.linear(part, w, b).unflatten(-1, (self.attn.num_heads, -1)).transpose(1, 2)
            for part, w, b in zip(states, weight, bias, strict=True)
        )
        return query, key, value

    def key_positions(self, count: int) -> Tensor:
        """[M, K] the position table at the size of a map of ``count`` features: bicubic, in float32."""
        side = math.isqrt(count)
        if side * side != count:
            raise ValueError(f"LLaVA-Mini's compressor needs a square map of features, got {count} features.")
        if side == self.side:
            return self.pos_embed
        grid = self.pos_embed.float().view(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        resized = nn.functional.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
        return resized.flatten(2)[0].T.to(self.pos_embed.dtype)


def position_table(width: int, side: int) -> Tensor:
    """[side*side, width] the sine-cosine table of a new checkpoint: columns in the first half, rows in the second."""
    half = width // 2
    rate = 10000.0 ** (-torch.arange(half // 2, dtype=torch.float64) / (half / 2))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rate
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([line.repeat(side, 1), line.repeat_interleave(side, 0)], dim=1).float()


def stitched(parts: Tensor) -> Tensor:
    """[B, n*n, P, K] features of sub-images in raster order -> [B, n*n*P, K] of the whole map, row by row."""
    batch, tiles, patches, width = parts.shape
    across, side = math.isqrt(tiles), math.isqrt(patches)
    maps = parts.view(batch, across, across, side, side, width)
    return maps.transpose(2, 3).reshape(batch, tiles * patches, width)
