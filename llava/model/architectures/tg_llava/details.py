"""Details of TG-LLaVA: latents that read the question, and then the enlarged quadrants of an image."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

LATENTS = 64
#: layers and latents; heads, their width, and heads of keys and values, as Idefics2's resampler has them
SIZES = {"depth": 2, "n_latents": LATENTS, "num_heads": 16, "head_dim": 96, "num_key_value_heads": 4}
_EPS, _INNER = 1e-5, 4


def quadrants(pixels: Tensor) -> Tensor:
    """[V, 3, S, S] -> [V, 4, 3, S, S]: twice as large, cut top left, top right, bottom left, bottom right."""
    large = functional.interpolate(pixels, scale_factor=2, mode="bilinear", align_corners=False)
    rows, columns = pixels.shape[-2:]
    cut = large.unflatten(3, (2, columns)).unflatten(2, (2, rows))  # [V, 3, 2, S, 2, S]
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


class Attention(nn.Module):
    """Latents that read a context and themselves."""

    def __init__(self, width: int, num_heads: int, head_dim: int, num_key_value_heads: int):
        super().__init__()
        self.heads, self.sources = num_heads, num_key_value_heads
        self.q_proj = nn.Linear(width, num_heads * head_dim, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(width, num_key_value_heads * head_dim, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(num_heads * head_dim, width, bias=False)

    def forward(self, latents: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """[B, N, C] latents and [B, S, C] context; ``mask`` [B, S] False at its padding, or None."""
        source = torch.cat([context, latents], dim=1)
        query = self.q_proj(latents).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = (
            proj(source).unflatten(-1, (self.sources, -1)).transpose(1, 2) for proj in (self.k_proj, self.v_proj)
        )
        key, value = (part.repeat_interleave(self.heads // self.sources, 1) for part in (key, value))
        if mask is not None:
            mask = functional.pad(mask, (0, latents.shape[1]), value=True)[:, None, None]
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, _INNER * width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(_INNER * width, width, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(states)) * self.up_proj(states))


class Layer(nn.Module):
    def __init__(self, width: int, **heads: int):
        super().__init__()
        norms = (nn.RMSNorm(width, eps=_EPS) for _ in range(3))
        self.input_latents_norm, self.input_context_norm, self.post_attention_layernorm = norms
        self.self_attn = Attention(width, **heads)
        self.mlp = FeedForward(width)

    def forward(self, latents: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.input_latents_norm(latents)
        latents = latents + self.self_attn(normed, self.input_context_norm(context), mask)
        return latents + self.mlp(self.post_attention_layernorm(latents))


class Perceiver(nn.Module):
    """The first layer reads the text, the others read the patches."""

    def __init__(self, width: int, depth: int, n_latents: int, **heads: int):
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(n_latents, width))
        self.layers = nn.ModuleList(Layer(width, **heads) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=_EPS)

    def forward(self, text: Tensor, mask: Tensor | None, patches: Tensor) -> Tensor:
        latents = self.latents.expand(len(patches), -1, -1)
        latents = self.layers[0](latents, text, mask)
        for layer in self.layers[1:]:
            latents = layer(latents, patches, None)
        return self.norm(latents)


class PatchEncoder(nn.Module):
    """Under the official names.

    Args:
        width: C of the patches; text: of the question's rows; out: D; places: patches of the four quadrants; sizes: in
            the place of :data:`SIZES`.
    """

    def __init__(self, width: int, text: int, out: int, places: int, sizes: dict[str, int] | None = None):
        super().__init__()
        self.position_embedding = nn.Embedding(places, width)
        self.pre_mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.proj = nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))
        self.perceiver = Perceiver(width, **{**SIZES, **(sizes or {})})
        self.resize_linear = nn.Linear(text, width)

    def encode(self, patches: Tensor) -> Tensor:
        """[V, 4, P, C] features of the quadrants with their places -> [V, 4 * P, C]."""
        places = torch.arange(self.position_embedding.num_embeddings, device=patches.device)
        return self.pre_mlp(patches.flatten(1, 2) + self.position_embedding(places))

    def forward(self, patches: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, 4, P, C] and the rows of the question [B, L, T] (``mask`` [B, L] False at padding) -> [B, 64, D]."""
        return self.proj(self.perceiver(self.resize_linear(text), mask, self.encode(patches)))
