"""What methods ask of a CLIP or SigLIP tower of vLLM: read from the inputs of its layers.

vLLM's layers hold queries, keys and values in one projection, sharded over the ranks of tensor parallelism, and their
attention is fused. The rows that are asked for are computed anew (``engine.encoder_attention``) from all heads, so that
every rank sees the same numbers. vLLM leaves out the layers behind the feature; the one that follows it, which some
methods read, is kept here as far as it is needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather

from accelerate_methods.engine.encoder_attention import Encoded, asked_layers, signals_of_layers
from accelerate_methods.stages.errors import MethodError

_PREFIX = re.compile(r"^(model\.)?vision_tower\.(?!vision_model\.)")
_POST_NORM = re.compile(r"vision_tower\.vision_model\.post_layernorm\.(\w+)$")
_LAYER = re.compile(r"vision_tower\.vision_model\.encoder\.layers\.(\d+)\.(layer_norm1|self_attn\.[qk]_proj)\.(\w+)$")


class ServedTower:
    """
    Args:
        tower: ``CLIPVisionModel`` or ``SiglipVisionModel`` of vLLM.
        config: its config.
    """

    def __init__(self, tower: nn.Module, config: Any):
        self.config, self.special = config, int(config.model_type == "clip_vision_model")
        self._layers = tower.vision_model.encoder.layers
        self.feature, self.depth = len(self._layers) - 1, config.num_hidden_layers
        self._next: dict[str, Tensor] = {}
        self._post_norm: dict[str, Tensor] = {}

    # -- weights -----------------------------------------------------------------------------------------------------

    def renamed(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The weights of a checkpoint on their way into the model, under the names that vLLM expects.

        transformers 5 writes "vision_tower.encoder", vLLM reads "vision_tower.vision_model.encoder". What belongs to
        the layer behind the feature is kept.
        """
        for name, value in weights:
            name = _PREFIX.sub(r"\1vision_tower.vision_model.", name)
            found = _LAYER.search(name)
            if found and int(found[1]) == self.feature + 1:
                like = next(self._layers[0].parameters())
                self._next[f"{found[2]}.{found[3]}"] = value.to(device=like.device, dtype=like.dtype, copy=True)
            found = _POST_NORM.search(name)
            if found:
                like = next(self._layers[0].parameters())
                self._post_norm[found[1]] = value.to(device=like.device, dtype=like.dtype, copy=True)
            yield name, value

    def post_norm(self, states: Tensor) -> Tensor:
        """The norm behind the encoder, which vLLM leaves out: patches go through it on their way to CLIP's space."""
        weights, width = self._post_norm, (self.config.hidden_size,)
        return nn.functional.layer_norm(states, width, weights["weight"], weights["bias"], self.config.layer_norm_eps)

    def _layer(self, index: int) -> SimpleNamespace:
        """The parts of a layer that signals are computed with, under the names of transformers."""
        if index > self.feature:
            return self._behind()
        layer = self._layers[index]
        attention = layer.self_attn
        return SimpleNamespace(
            layer_norm1=layer.layer_norm1,
            self_attn=SimpleNamespace(**self._heads(attention), q_proj=_part(attention, 0), k_proj=_part(attention, 1)),
        )

    def _behind(self) -> SimpleNamespace:
        weights = self._next
        if not weights:
            raise MethodError("the encoder layer behind the feature was not read: the checkpoint was not loaded.")
        norm = (self.config.hidden_size,), weights["layer_norm1.weight"], weights["layer_norm1.bias"]

        def projection(name: str) -> Any:
            weight, bias = weights[f"self_attn.{name}.weight"], weights.get(f"self_attn.{name}.bias")
            return lambda states: nn.functional.linear(states, weight, bias)

        return SimpleNamespace(
            layer_norm1=lambda states: nn.functional.layer_norm(states, *norm, eps=self.config.layer_norm_eps),
            self_attn=SimpleNamespace(
                **self._heads(self._layers[0].self_attn), q_proj=projection("q_proj"), k_proj=projection("k_proj")
            ),
        )

    @staticmethod
    def _heads(attention: nn.Module) -> dict[str, Any]:
        return {"num_heads": attention.num_heads, "head_dim": attention.head_dim, "scale": attention.scale}

    # -- one run -----------------------------------------------------------------------------------------------------

    def run(self, encode: Any, pixels: Tensor, wanted: frozenset[str]) -> tuple[Encoded, dict[str, Tensor]]:
        """``encode(pixels)`` of [V, 3, H, W], and the signals that are wanted, [V, P, ...] each."""
        asked = asked_layers(wanted, self.depth, self.feature)
        inputs: dict[int, Tensor] = {}
        handles = [
            self._layers[index].register_forward_pre_hook(_keeping(inputs, index), with_kwargs=True)
            for index in {*asked.values()} - {self.feature + 1}
        ]
        handles.append(self._layers[self.feature].register_forward_hook(_output(inputs, self.feature + 1)))
        try:
            encode(pixels)
        finally:
            for handle in handles:
                handle.remove()
        encoded = Encoded(inputs[self.feature + 1], self.special, inputs.get(self.feature))
        layers = {index: self._layer(index) for index in set(asked.values())}
        return encoded, signals_of_layers(layers, inputs, asked, self.special)


def _part(attention: nn.Module, number: int) -> Any:
    """Queries (0) or keys (1) of all heads."""

    def projected(states: Tensor) -> Tensor:
        own = attention.qkv_proj(states)[0].chunk(3, dim=-1)[number]
        return own if attention.tp_size == 1 else tensor_model_parallel_all_gather(own.contiguous(), dim=-1)

    return projected


def _keeping(inputs: dict[int, Tensor], index: int) -> Any:
    def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs[index] = args[0] if args else kwargs["hidden_states"]

    return hook


def _output(inputs: dict[int, Tensor], index: int) -> Any:
    def hook(layer: nn.Module, args: tuple, output: Any) -> None:
        inputs[index] = output[0] if isinstance(output, tuple) else output

    return hook


def in_parts(views: Tensor, most: int) -> tuple[Tensor, ...]:
    """[V, ...] in parts of at most ``most`` views, so that what a tower holds at a time stays bounded."""
    return torch.split(views, most) if views.shape[0] > most else (views,)
