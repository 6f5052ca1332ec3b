"""SigLIP's attention-pooling head as a side reader of patch features.

LLaVA throws this head away. Applied to the features that go to the projector it gives one global feature per frame and
a map of which patches the pooling probe attends to (docs/methods/fastvid.md, step 1).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from accelerate_methods.hosts.tower_files import TowerError, VisionConfig, tower_config, tower_weights


class SiglipPoolingHead(nn.Module):
    """post_layernorm + attention-pooling head of a SigLIP model, returning the attention map as well.

    Args:
        width, intermediate, heads, eps, activation: as in the SigLIP vision config.
    """

    def __init__(self, width: int, intermediate: int, heads: int, eps: float, activation: str):
        super().__init__()
        self.heads = heads
        self.activation = ACT2FN[activation]
        self.post_layernorm = nn.LayerNorm(width, eps=eps)
        self.probe = nn.Parameter(torch.zeros(1, 1, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)  # holds the packed weights
        self.layernorm = nn.LayerNorm(width, eps=eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, intermediate), "fc2": nn.Linear(intermediate, width)})

    @classmethod
    def from_tower(cls, name: str, checkpoint: str | None) -> SiglipPoolingHead:
        """Read the head of the hub tower ``name`` (or of the checkpoint's ``vision_tower`` folder)."""
        config: VisionConfig = tower_config(name, checkpoint)
        if config.model_type != "siglip_vision_model":
            message = f"vision tower {name!r} is {config.model_type}; only SigLIP has an attention-pooling head."
            raise TowerError(message)
        weights = tower_weights(name, checkpoint, "post_layernorm") | {
            k.removeprefix("head."): v for k, v in tower_weights(name, checkpoint, "head.").items()
        }
        with torch.device("meta"):  # no random initial values: they would draw from the global generator
            head = cls(
                config.hidden_size,
                config.intermediate_size,
                config.num_attention_heads,
                config.layer_norm_eps,
                config.hidden_act,
            )
        head.load_state_dict(weights, assign=True)
        return head.requires_grad_(False).eval()

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[F, P, C] patch features -> global features [F, C] and attention [F, P] (mean over heads, rows sum to 1)."""
        frames, _, width = features.shape
        states = self.post_layernorm(features)
        attention = self.attention
        query_weight, key_weight, value_weight = attention.in_proj_weight.chunk(3)
        query_bias, key_bias, value_bias = attention.in_proj_bias.chunk(3)
        dim = width // self.heads
        query = nn.functional.linear(self.probe[0, 0], query_weight, query_bias).view(self.heads, dim)
        key = nn.functional.linear(states, key_weight, key_bias).view(frames, -1, self.heads, dim)
        value = nn.functional.linear(states, value_weight, value_bias).view(frames, -1, self.heads, dim)
        weights = (torch.einsum("hd,fphd->fhp", query, key) * dim**-0.5).softmax(dim=-1)
        pooled = torch.einsum("fhp,fphd->fhd", weights, value).flatten(1)
        pooled = attention.out_proj(pooled)
        hidden = self.mlp["fc2"](self.activation(self.mlp["fc1"](self.layernorm(pooled))))
        return pooled + hidden, weights.mean(dim=1)
