"""What encoder layers of a CLIP or SigLIP tower attend to, recomputed from the inputs of those that are asked for.

The tower itself runs with whatever attention backend it has: no attention map of any other layer is ever formed. Works
on the layers of transformers' CLIPVisionModel and SiglipVisionModel. No gradients; probabilities are float32, so that
half precision makes no ties among hundreds of small numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.signals import LAYER_SIGNALS, Signal

if TYPE_CHECKING:
    from accelerate_methods.engine.encoder_blocks import EncodedTokens
    from accelerate_methods.stages.frames import FrameMap

ENCODER_SIGNALS = LAYER_SIGNALS
CHUNK_BYTES = 256 * 2**20  # what the attention maps alive at a time may take


@dataclasses.dataclass
class Encoded:
    """One run of a CLIP or SigLIP tower over V views.

    Attributes:
        hidden: [V, S + P, M] output of the layer whose output is the visual feature: S special tokens, then P patches.
        special_tokens: S (1 for the CLS token of CLIP, 0 for SigLIP).
        before: [V, S + P, M] input of that layer, from which signals are computed; None once nobody will ask for any.
        inputs: index of another layer -> [V, S + P, M] its input, of those that are asked for.
        merged: where the patches are after an encode method (``encoder_blocks.EncodedTokens``), with the inputs.
    """

    hidden: Tensor
    special_tokens: int
    before: Tensor | None
    inputs: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    merged: EncodedTokens | None = None

    def __getitem__(self, views: slice) -> Encoded:
        if self.frames is not None:
            merged = self.merged[views]
            return Encoded(merged.hidden, self.special_tokens, None, {}, merged)
        before = None if self.before is None else self.before[views]
        inputs = {index: states[views] for index, states in self.inputs.items()}
        merged = None if self.merged is None else self.merged[views]
        return Encoded(self.hidden[views], self.special_tokens, before, inputs, merged)

    @property
    def shortened(self) -> bool:
        """Whether the patches are no grid any more."""
        return self.merged is not None and not self.merged.grid

    @property
    def frames(self) -> list[FrameMap] | None:
        """Where the frames of each video went under a method that merges frames; None without one."""
        return None if self.merged is None else self.merged.frames

    def rows_of(self, views: slice) -> slice:
        """The rows of :attr:`hidden` for some views, of a video all that it had."""
        return views if self.frames is None else self.merged.rows_of(views)[1]

    @property
    def carried(self) -> dict[str, Tensor]:
        """Signals [V, P] that such a method has given itself."""
        return {} if self.merged is None else self.merged.carried

    def around(self, feature: int) -> dict[int, Tensor]:
        """Inputs of all layers that are known; ``feature`` is the index of the one whose output is the feature."""
        return {**self.inputs, feature: self.before, feature + 1: self.hidden}

    @property
    def patches(self) -> Tensor:
        """[V, P, M]."""
        return self.hidden[:, self.special_tokens :]

    @property
    def special(self) -> Tensor | None:
        """[V, S, M], None for a tower without special tokens."""
        return self.hidden[:, : self.special_tokens] if self.special_tokens else None


def asked_layers(
    names: Collection[str], depth: int, feature: int, whole: Collection[int] | None = None
) -> dict[str, int]:
    """Signal -> index of the encoder layer that it comes from; those that are none of a layer are left out.

    Args:
        depth: layers of the encoder; feature: index of the one whose output is the visual feature.
        whole: those that see whole frames, where the others attend to windows only.

    Raises:
        MethodError: a layer that the encoder does not have, or that does not run: behind the one after the feature.
    """
    found = {}
    for name in names:
        signal = Signal(name)
        if signal.name in LAYER_SIGNALS:
            found[name] = _layer_of(signal, depth, feature, whole)
    return found


def _layer_of(signal: Signal, depth: int, feature: int, whole: Collection[int] | None) -> int:
    last = min(feature + 1, depth - 1)
    if signal.layer == "feature":
        return feature
    if signal.layer == "next":
        return last
    if isinstance(signal.layer, float):
        index = max(0, math.ceil(signal.layer * depth - 1e-9) - 1)
        index = index if whole is None else min((i for i in whole if i >= index), default=index)
    else:
        index = signal.layer + depth if signal.layer < 0 else signal.layer
    if not 0 <= index <= last:
        raise MethodError(
            f"signal {signal!s} is of encoder layer {index}; this encoder has layers 0..{depth - 1}, and those up to "
            f"{last} can be read: its feature is the output of layer {feature}."
        )
    return index


def signals_of_layers(
    layers: Sequence[Any], inputs: Mapping[int, Tensor], asked: Mapping[str, int], special: int,
    sizes: Mapping[int, Tensor] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """:func:`encoder_signals` of several layers at once.

    Args:
        layers: all layers of the encoder; inputs: index -> [V, S, M] input of those that are asked for.
        asked: as :func:`asked_layers` gives it.
        sizes: index -> [V, S] patches that each token stands for, where attention counts them.
    """
    out: dict[str, Tensor] = {}
    for index in sorted(set(asked.values())):
        names = [name for name, at in asked.items() if at == index]
        out |= encoder_signals(layers[index], inputs[index], names, special, (sizes or {}).get(index))
    return out


@torch.no_grad()
def encoder_signals(
    layer: Any, hidden: Tensor, names: Collection[str], special: int, sizes: Tensor | None = None
) -> dict[str, Tensor]:
    """Signals of one encoder layer; names that are none of :data:`ENCODER_SIGNALS` are left to others.

    Args:
        layer: the layer (``layer_norm1``, ``self_attn``).
        hidden: [V, S, M] its input, the first ``special`` rows being special tokens (the CLS token of CLIP).
        names: what is asked for, of whatever layer; a :class:`Signal` says what becomes of the heads.
        sizes: [V, S] patches that each token stands for, where attention counts them.

    Returns:
        By the names given: "cls_attention" [V, P] and "received_attention" [V, P], averaged over heads; "key_states"
        [V, P, d]; P = S - special, the softmax including the special tokens. With joined heads d is the whole width.
    """
    asked = {name: signal for name in names if (signal := Signal(name)).name in ENCODER_SIGNALS}
    if not asked:
        return {}
    attention, states = layer.self_attn, layer.layer_norm1(hidden)
    projected = attention.k_proj(states)
    bias = None if sizes is None else sizes.log()
    out: dict[str, Tensor] = {}
    for name, signal in asked.items():
        heads = attention if signal.heads == "mean" else _joined(attention, projected.shape[-1])
        keys = _heads(heads, projected)
        if signal.name == "cls_attention":
            if not special:
                raise MethodError("this vision tower has no CLS token, so there is no cls_attention.")
            out[name] = _cls_probabilities(heads, states, keys, bias).mean(1)[:, special:]
        elif signal.name == "received_attention":
            out[name] = _received(heads, states, keys, bias)[:, special:]
        else:
            out[name] = keys.mean(1)[:, special:]
    return out


def _joined(attention: Any, width: int) -> Any:
    """The same projections as one head of the whole width."""
    return SimpleNamespace(q_proj=attention.q_proj, num_heads=1, head_dim=width, scale=width**-0.5)


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


def _cls_probabilities(attention: Any, states: Tensor, keys: Tensor, bias: Tensor | None = None) -> Tensor:
    """[V, H, S]; ``bias`` [V, S] is added to the logits of each key."""
    query = _heads(attention, attention.q_proj(states[:, :1]) * attention.scale)
    logits = (query @ keys.transpose(-1, -2))[:, :, 0]
    return (logits if bias is None else logits + bias[:, None]).softmax(-1, dtype=torch.float32)


def _received(attention: Any, states: Tensor, keys: Tensor, bias: Tensor | None = None) -> Tensor:
    """[V, S]; ``bias`` as in :func:`_cls_probabilities`."""
    queries = _heads(attention, attention.q_proj(states) * attention.scale).flatten(0, 1)
    bias = None if bias is None else bias.repeat_interleave(keys.shape[1], 0)
    received = received_per_map(queries, keys.flatten(0, 1).transpose(-1, -2), bias)
    return received.view(*keys.shape[:2], -1).mean(1)


def received_per_map(
    queries: Tensor, columns: Tensor, bias: Tensor | None = None, real: Tensor | None = None
) -> Tensor:
    """Attention that each key receives in each map, averaged over the query rows; float32.

    Args:
        queries: [N, S, d] scaled; columns: [N, d, S] keys. N counts heads of views; a few maps are formed at a time.
        bias: [N, S] added to the logits of each key; real: [N, S] False at query rows that give nothing.

    Returns:
        [N, S].
    """
    maps, length, _ = queries.shape
    received = torch.empty(maps, length, dtype=torch.float32, device=queries.device)
    step = max(1, CHUNK_BYTES // (length * length * (4 + queries.element_size())))  # probabilities and logits
    for start in range(0, maps, step):
        part = slice(start, start + step)
        logits = queries[part] @ columns[part]
        if bias is not None:
            logits = logits + bias[part, None]
        rows = logits.softmax(-1, dtype=torch.float32)
        received[part] = (rows if real is None else rows.masked_fill(~real[part, :, None], 0)).mean(1)
    return received
