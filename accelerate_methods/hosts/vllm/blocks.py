"""Signals of the vision blocks of Qwen-VL models in vLLM, from the inputs of their attention."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import QKVParallelLinear

from accelerate_methods.engine.encoder_attention import asked_layers
from accelerate_methods.hosts.native.qwen_vl import block_signals, frame_windows, merged_patches


@dataclasses.dataclass
class _Input:
    """What the attention of a block got: [S, 1, M] states, rotary tables [S, d / 2]."""

    states: Tensor
    cos: Tensor
    sin: Tensor


class ServedBlocks:
    """
    Args:
        visual: vision transformer of a Qwen-VL model of vLLM.
        config: its config.
    """

    def __init__(self, visual: nn.Module, config: Any):
        self._attentions = [block.attn for block in visual.blocks]
        # what the merger gets goes into its norm; vLLM calls the merger itself past hooks
        self._merging = visual.merger.ln_q if hasattr(visual.merger, "ln_q") else visual.merger.norm
        self._config, self._whole = config, getattr(config, "fullatt_block_indexes", None)
        self._unit = config.spatial_merge_size**2

    @contextlib.contextmanager
    def watch(self, names: frozenset[str]) -> Iterator[dict[int, Any]]:
        """Block in which the inputs are kept that these signals come from."""
        kept: dict[int, Any] = {}

        def keeping(index: int) -> Any:
            def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                states = args[0] if args else kwargs["x"]
                kept[index] = _Input(states, kwargs["rotary_pos_emb_cos"], kwargs["rotary_pos_emb_sin"])

            return hook

        def merging(module: nn.Module, args: tuple) -> None:
            kept[len(self._attentions)] = args[0]

        handles = [
            self._attentions[index].register_forward_pre_hook(keeping(index), with_kwargs=True)
            for index in set(asked_blocks(names, len(self._attentions), self._whole).values())
        ]
        if "encoder_tokens" in names:
            handles.append(self._merging.register_forward_pre_hook(merging))
        try:
            yield kept
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def signals(
        self, kept: dict[int, Any], names: frozenset[str], shapes: list[tuple[int, int, int]]
    ) -> list[dict[str, Tensor]]:
        """Per item [T, N, ...] over its merged tokens; ``shapes``: (frames, rows, columns) of those."""
        asked = asked_blocks(names, len(self._attentions), self._whole)
        out: list[dict[str, Tensor]] = [{} for _ in shapes]
        lengths = [frames * rows * columns for frames, rows, columns in shapes]
        for index in sorted(set(asked.values())):
            own = [name for name, block in asked.items() if block == index]
            projected = _projected(self._attentions[index], kept[index])
            found = block_signals(projected, lengths, [shape[0] for shape in shapes], self._unit, own)
            for item, signals, shape in zip(out, found, shapes, strict=True):
                item |= self._by_raster(signals, shape)
        if "encoder_tokens" in names:
            states = kept[len(self._attentions)]
            found = merged_patches(states.reshape(-1, states.shape[-1]), self._unit, shapes)
            for item, own, shape in zip(out, found, shapes, strict=True):
                item |= self._by_raster({"encoder_tokens": own}, shape)
        return out

    def _by_raster(self, signals: dict[str, Tensor], shape: tuple[int, int, int]) -> dict[str, Tensor]:
        if self._whole is None:
            return signals
        order = torch.argsort(torch.argsort(frame_windows(self._config, *shape[1:]), stable=True))
        return {name: value[:, order.to(value.device)] for name, value in signals.items()}


def asked_blocks(names: frozenset[str], depth: int, whole: Any) -> dict[str, int]:
    """Signal -> block that it is read from."""
    found = asked_layers(names, depth, depth - 1, whole)
    return found | {name: depth - 1 for name in names & {"pooling_attention"}}


def _projected(attention: nn.Module, got: _Input) -> tuple[Tensor, Tensor, Tensor]:
    """[S, H, d] queries and keys, rotated, and keys as they were, of all heads."""
    own = attention.qkv(got.states)[0]
    split = attention.tp_size > 1
    if split and not isinstance(attention.qkv, QKVParallelLinear):  # a slice of all, not of each third
        own, split = tensor_model_parallel_all_gather(own), False
    query, key, _ = own.chunk(3, dim=-1)
    if split:
        query, key = (tensor_model_parallel_all_gather(part.contiguous()) for part in (query, key))
    size = attention.hidden_size_per_attention_head
    query, key = (part[:, 0].unflatten(-1, (-1, size)) for part in (query, key))
    both = torch.stack([query, key]).contiguous()
    rotated = attention.apply_rotary_emb(both, got.cos, got.sin)
    return rotated[0], rotated[1], key
