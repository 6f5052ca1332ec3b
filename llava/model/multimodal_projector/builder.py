"""Vision-to-language projectors, with the parameter names of the official checkpoints."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """x + MLP(LN(x)) of the ``mlpNx_resKx_gelu`` projectors."""

    def __init__(self, channels: int):
        super().__init__()
        self.pre_norm = nn.LayerNorm(channels)
        self.proj = nn.Sequential(nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre_norm(x)
        return x + self.proj(x)


class IdentityMap(nn.Module):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


def build_vision_projector(config: Any, **kwargs: Any) -> nn.Module:
    """Projector named by ``config.mm_projector_type``: linear, mlpNx_gelu, mlpNx_resKx_gelu or identity."""
    kind = getattr(config, "mm_projector_type", "linear")
    if kind == "linear":
        return nn.Linear(config.mm_hidden_size, config.hidden_size)
    if kind == "identity":
        return IdentityMap()
    match = re.fullmatch(r"mlp(\d+)x(?:_res(\d+)x)?_gelu", kind)
    if match is None:
        raise ValueError(
            f"mm_projector_type {kind!r} is not supported; allowed: linear, identity, mlpNx_gelu, mlpNx_resKx_gelu."
        )
    modules: list[nn.Module] = [nn.Linear(config.mm_hidden_size, config.hidden_size)]
    for _ in range(int(match[1]) - 1):
        modules += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
    modules += [ResidualBlock(config.hidden_size) for _ in range(int(match[2] or 0))]
    return nn.Sequential(*modules)
