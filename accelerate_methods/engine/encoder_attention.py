"""What an encoder layer of a CLIP or SigLIP tower attends to, recomputed from the input of that one layer.

The tower itself runs with whatever attention backend it has: no attention map of any other layer is ever formed. Works
on the layers of transformers' CLIPVisionModel and SiglipVisionModel. No gradients; probabilities are float32, so that
half precision makes no ties among hundreds of small numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from accelerate_methods.stages.errors import MethodError

ENCODER_SIGNALS = frozenset({"cls_attention", "received_attention", "key_states"})
CHUNK_BYTES = 256 * 2**20  # what the attention maps alive at a time may take


@dataclasses.dataclass
class Encoded:
    """One run of a CLIP or SigLIP tower over V views.

    Attributes:
        hidden: [V, S + P, M] output of the layer whose output is the visual feature: S special tokens, then P patches.
        special_tokens: S (1 for the CLS token of CLIP, 0 for SigLIP).
        before: [V, S + P, M] input of that layer, from which signals are computed; None once nobody will ask for any.
    """

    hidden: Tensor
    special_tokens: int
    before: Tensor | None

    def __getitem__(self, views: slice) -> Encoded:
        before = None if self.before is None else self.before[views]
        return Encoded(self.hidden[views], self.special_tokens, before)

    @property
    def patches(self) -> Tensor:
        """[V, P, M]."""
        return self.hidden[:, self.special_tokens :]

    @property
    def special(self) -> Tensor | None:
        """[V, S, M], None for a tower without special tokens."""
        return self.hidden[:, : self.special_tokens] if self.special_tokens else None


@torch.no_grad()
def encoder_signals(layer: Any, hidden: Tensor, names: Collection[str], special: int) -> dict[str, Tensor]:
    """Signals of one encoder layer; names that are none of :data:`ENCODER_SIGNALS` are left to others.

    Args:
        layer: the layer (``layer_norm1``, ``self_attn``).
        hidden: [V, S, M] its input, the first ``special`` rows being special tokens (the CLS token of CLIP).
        names: what is asked for.

    Returns:
        "cls_attention" [V, P] and "received_attention" [V, P], averaged over heads; "key_states" [V, P, d]; P = S -
        special, the softmax including the special tokens.
    """
    wanted = ENCODER_SIGNALS & set(names)
    if not wanted:
        return {}
    attention, states = layer.self_attn, layer.layer_norm1(hidden)
    keys = _heads(attention, attention.k_proj(states))
    out: dict[str, Tensor] = {}
    if "cls_attention" in wanted:
        if not special:
            raise MethodError("this vision tower has no CLS token, so there is no cls_attention.")
        out["cls_attention"] = _cls_probabilities(attention, states, keys).mean(1)[:, special:]
    if "received_attention" in wanted:
        out["received_attention"] = _received(attention, states, keys)[:, special:]
    if "key_states" in wanted:
        out["key_states"] = keys.mean(1)[:, special:]
    return out


@torch.no_grad()
def cls_attention(layer: Any, hidden: Tensor) -> Tensor:
    """[V, H, S-1] attention of the first token to all others, per head, in the dtype of the model."""
    states = layer.layer_norm1(hidden)
    keys = _heads(layer.self_attn, layer.self_attn.k_proj(states))
    return _cls_probabilities(layer.self_attn, states, keys)[..., 1:].to(hidden.dtype)


@torch.no_grad()
def received_attention(layer: Any, hidden: Tensor) -> Tensor:
    """[V, S] attention that each token receives, averaged over heads and query rows; float32."""
    states = layer.layer_norm1(hidden)
    return _received(layer.self_attn, states, _heads(layer.self_attn, layer.self_attn.k_proj(states)))


@torch.no_grad()
def mean_keys(layer: Any, hidden: Tensor) -> Tensor:
    """[V, S, d] keys (bias included, not scaled) averaged over heads, in the dtype of the model."""
    return _heads(layer.self_attn, layer.self_attn.k_proj(layer.layer_norm1(hidden))).mean(1)


def _heads(attention: Any, projected: Tensor) -> Tensor:
    """[V, S, H*d] -> [V, H, S, d]."""
    return projected.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)


def _cls_probabilities(attention: Any, states: Tensor, keys: Tensor) -> Tensor:
    """[V, H, S]."""
    query = _heads(attention, attention.q_proj(states[:, :1]) * attention.scale)
    return (query @ keys.transpose(-1, -2))[:, :, 0].softmax(-1, dtype=torch.float32)


def _received(attention: Any, states: Tensor, keys: Tensor) -> Tensor:
    """[V, S]."""
    queries = _heads(attention, attention.q_proj(states) * attention.scale).flatten(0, 1)
    received = received_per_map(queries, keys.flatten(0, 1).transpose(-1, -2))
    return received.view(*keys.shape[:2], -1).mean(1)


def received_per_map(queries: Tensor, columns: Tensor) -> Tensor:
    """Attention that each key receives in each map, averaged over the query rows; float32.

    Args:
        queries: [N, S, d] scaled; columns: [N, d, S] keys. N counts heads of views; a few maps are formed at a time.

    Returns:
        [N, S].
    """
    maps, length, _ = queries.shape
    received = torch.empty(maps, length, dtype=torch.float32, device=queries.device)
    step = max(1, CHUNK_BYTES // (length * length * (4 + queries.element_size())))  # probabilities and logits
    for start in range(0, maps, step):
        part = slice(start, start + step)
        received[part] = (queries[part] @ columns[part]).softmax(-1, dtype=torch.float32).mean(1)
    return received
