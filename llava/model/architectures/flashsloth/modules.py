"""FlashSloth's own modules: pooling by attention inside small regions, and the module that refreshes its queries.

Follows `codefanw/FlashSloth@881445a`, ``flashsloth/model/pooling.py`` and ``lqformer.py`` (arXiv 2412.04317), with the
parameter names of its checkpoints.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

#: edge of a region, in patches
REGION = 3


class RegionPooling(nn.Module):
    """Spatial attention pooling: every region of REGION x REGION patches becomes the mean of them, weighted by scores.

    Args:
        width: D of the patches; region: edge of a region.
    """

    def __init__(self, width: int, region: int = REGION):
        super().__init__()
        self.region = region
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 1))

    def forward(self, patches: Tensor) -> Tensor:
        """[B, N, D] patches of square views -> [B, n, D]; at the right and lower edge regions may be smaller.

        Raises:
            ValueError: the views are no squares.
        """
        side, region = math.isqrt(patches.shape[1]), self.region
        if side * side != patches.shape[1]:
            raise ValueError(f"pooling needs the patches of square views, got {patches.shape[1]}.")
        missing = -side % region
        scores = self.mlp(patches).float().view(-1, side, side, 1)
        scores = functional.pad(scores, (0, 0, 0, missing, 0, missing), value=-torch.inf)
        maps = functional.pad(patches.unflatten(1, (side, side)), (0, 0, 0, missing, 0, missing))
        weights = self._regions(scores).softmax(2).to(patches.dtype)
        return (weights * self._regions(maps)).sum(2)

    def middles(self, values: Tensor) -> Tensor:
        """[B, N, C] values of patches, like their coordinates -> [B, n, C] plain means over the regions."""
        side = math.isqrt(values.shape[1])
        maps = values.transpose(1, 2).unflatten(2, (side, side))
        return functional.avg_pool2d(maps, self.region, ceil_mode=True).flatten(2).transpose(1, 2)

    def _regions(self, maps: Tensor) -> Tensor:
        """[B, s, s, D] -> [B, (s/k)^2, k*k, D] in the order in which regions are read."""
        k = self.region
        return maps.unflatten(2, (-1, k)).unflatten(1, (-1, k)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


class LearnableTokens(nn.Module):
    """The queries, before a word's embedding is added to each."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(count, width))

    def forward(self) -> Tensor:
        return self.token


class Attention(nn.Module):
    """Multi-head attention whose values may be wider than its keys; nothing is projected behind it."""

    def __init__(self, width: int, value_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj = nn.Linear(value_width, value_width)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, of: Tensor | None = None
    ) -> Tensor:
        """[G, Q, d] queries over [S, N, d] keys and [S, N, v] values -> [G, Q, v].

        Args:
            bias: [G, N] added to the scores of each key, or None.
            of: [G] which of the S each query group reads; None: its own.
        """
        parts = (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        if of is not None:
            key, value = key[of], value[of]
        mask = None if bias is None else bias[:, None, None].to(query.dtype)
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


class QueryLayer(nn.Module):
    def __init__(self, width: int, image_width: int, heads: int):
        super().__init__()
        self.ln_text, self.ln_q, self.ln_kv = (nn.LayerNorm(width) for _ in range(3))
        self.t2q_attn = Attention(width, width, heads)
        self.i2q_attn = Attention(width, image_width, heads)


class EmbeddedQuery(nn.Module):
    """Queries read the question, and what they find there reads the image.

    Args:
        hidden: H of the language model; image_width: D of the image's features; heads: of both attentions. They are
            D/2 wide.
    """

    def __init__(self, hidden: int, image_width: int, heads: int):
        super().__init__()
        width = image_width // 2
        self.down_projector_learnable_text = nn.Linear(hidden, width)
        self.down_projector_image = nn.Linear(image_width, width)
        self.up_projector = nn.Linear(image_width, hidden)
        self.layers = nn.ModuleList([QueryLayer(width, image_width, heads)])

    def macs(self, queries: int, words: int, patches: int) -> int:
        """Multiply-accumulates for one group of queries."""
        (layer,) = self.layers
        wide, narrow = layer.i2q_attn.v_proj.in_features, layer.t2q_attn.v_proj.in_features
        hidden = self.up_projector.out_features
        down = (queries + words) * hidden * narrow + patches * wide * narrow
        asked = (queries + 2 * words) * narrow**2 + 2 * queries * words * narrow
        seen = (queries + patches) * narrow**2 + patches * wide**2 + queries * patches * (narrow + wide)
        return down + asked + seen + queries * wide * hidden

    def forward(
        self,
        queries: Tensor,
        image: Tensor,
        text: Tensor,
        text_mask: Tensor,
        image_mask: Tensor | None = None,
        of: Tensor | None = None,
    ) -> Tensor:
        """The queries for the layer that comes next.

        Args:
            queries: [G, Q, H]; image: [S, N, D] features as the tower gives them.
            text: [G, L, H] the question's rows, zeros in padding; text_mask: [G, L] 0 there. A question without rows
                counts as one of padding alone.
            image_mask: [S, N] 0 at padding, or None; of: [G] which image each group reads, None: its own.

        Returns:
            [G, Q, H].
        """
        (layer,) = self.layers
        if not text.shape[1]:
            text, text_mask = text.new_zeros(len(text), 1, text.shape[2]), text_mask.new_zeros(len(text), 1)
        asking = layer.ln_q(self.down_projector_learnable_text(queries))
        said = layer.ln_text(self.down_projector_learnable_text(text))
        keys = layer.ln_kv(self.down_projector_image(image))
        # padding is far away and not excluded, as released: a group of padding alone still has a mean
        found = layer.t2q_attn(asking, said, said, (1 - text_mask.to(queries.dtype)) * -1e4)
        bias = None if image_mask is None else (1 - image_mask.to(queries.dtype)) * -1e4
        if bias is not None and of is not None:
            bias = bias[of]
        return queries + self.up_projector(layer.i2q_attn(found, keys, image, bias, of))
