"""A vision transformer as timm builds it, small, whose blocks run through the project's loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from accelerate_methods.engine.encoder_block import EncoderBlock
from accelerate_methods.engine.encoder_blocks import BlockRun, EncodedTokens
from accelerate_methods.stages.encode import EncodeMethod


class TimmBlock(EncoderBlock):
    """One block out of timm's weights ``blocks.<number>.*``."""

    def __init__(self, weights: dict[str, Tensor], heads: int, eps: float):
        self._weights, self._heads, self._eps = weights, heads, eps
        self.scale = (weights["attn.proj.weight"].shape[0] // heads) ** -0.5

    def _linear(self, name: str, states: Tensor) -> Tensor:
        return nn.functional.linear(states, self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias"))

    def _norm(self, name: str, states: Tensor) -> Tensor:
        if f"{name}.weight" not in self._weights:  # of a case whose states are normed already
            return states
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return nn.functional.layer_norm(states, weight.shape, weight, bias, self._eps)

    def project(self, hidden: Tensor, tokens: Any) -> tuple[Tensor, ...]:
        projected = self._linear("attn.qkv", self._norm("norm1", hidden)).unflatten(-1, (3, self._heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        return query, key, value, key

    def attended(self, hidden: Tensor, output: Tensor) -> Tensor:
        return hidden + self._linear("attn.proj", output)

    def feed_forward(self, hidden: Tensor) -> Tensor:
        inner = nn.functional.gelu(self._linear("mlp.fc1", self._norm("norm2", hidden)))
        return hidden + self._linear("mlp.fc2", inner)

    def whole(self, hidden: Tensor) -> Tensor:
        """Written out, without the loop's parts."""
        query, key, value, _ = self.project(hidden, None)
        weights = (query @ key.transpose(-1, -2) * self.scale).softmax(-1)
        return self.feed_forward(self.attended(hidden, (weights @ value).transpose(1, 2).flatten(2)))


class TinyViT:
    """Image classifier.

    Args:
        weights: a timm state dict; heads: of the attention; eps: of the norms.
        global_pool: mean of the patches instead of the CLS token (MAE).
    """

    def __init__(self, weights: dict[str, Tensor], heads: int, eps: float, global_pool: bool = False):
        self.weights = {name: value.float() for name, value in weights.items()}
        self.eps, self.global_pool = eps, global_pool
        depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        self.blocks = [TimmBlock(self._under(f"blocks.{n}."), heads, eps) for n in range(depth)]
        self.special = 1 + ("dist_token" in weights)

    def _under(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in self.weights.items() if name.startswith(prefix)}

    def embed(self, pixels: Tensor) -> Tensor:
        """[V, 3, S, S] -> [V, T, C]."""
        kernel = self.weights["patch_embed.proj.weight"]
        patches = nn.functional.conv2d(pixels, kernel, self.weights["patch_embed.proj.bias"], kernel.shape[-1])
        front = [self.weights[name] for name in ("cls_token", "dist_token") if name in self.weights]
        front = [token.expand(len(pixels), -1, -1) for token in front]
        return torch.cat([*front, patches.flatten(2).transpose(1, 2)], dim=1) + self.weights["pos_embed"]

    def encode(self, pixels: Tensor, method: EncodeMethod) -> EncodedTokens:
        run = BlockRun(self.blocks, method, depth=len(self.blocks), special=self.special)
        return run(self.embed(pixels))

    def norm(self, hidden: Tensor, name: str = "norm") -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return nn.functional.layer_norm(hidden, weight.shape, weight, bias, self.eps)

    def classify(self, hidden: Tensor, sizes: Tensor | None = None) -> Tensor:
        """[V, T, C] output of the last block -> [V, classes].

        Args:
            sizes: [V, T] patches of each token, for the mean over patches.
        """
        if self.global_pool:
            patches = hidden[:, self.special :]
            sizes = torch.ones(patches.shape[:2]) if sizes is None else sizes[:, self.special :]
            mean = (patches * sizes[..., None]).sum(1) / sizes.sum(1, keepdim=True)
            return self._head("head", self.norm(mean, "fc_norm"))
        hidden = self.norm(hidden)
        first = self._head("head", hidden[:, 0])
        return (first + self._head("head_dist", hidden[:, 1])) / 2 if self.special > 1 else first

    def _head(self, name: str, states: Tensor) -> Tensor:
        return nn.functional.linear(states, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def dense(self, pixels: Tensor) -> Tensor:
        """[V, classes] without any method."""
        hidden = self.embed(pixels)
        for block in self.blocks:
            hidden = block.whole(hidden)
        return self.classify(hidden)
