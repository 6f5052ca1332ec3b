"""Analytic work of a request, in multiply-accumulates (MACs): one fused multiply-add counts once.

Papers of the field print MACs of the decoder layers as "FLOPs", attention as a full square, without the LM head.
``prefill_macs`` follows that convention and reproduces FastVID's table (48.82 / 10.73 / 8.46 / 6.23 / 4.04 T for 6272
... 608 tokens of LLaVA-OneVision-7B). ``torch.utils.flop_counter`` counts two per multiply-add and counts the same
products: everything here is half of what it finds (tests/engine/test_flops.py). Ratios do not depend on the convention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def _heads(config: Any) -> tuple[int, int, int]:
    """Query heads, key heads, and their width."""
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, key_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def layer_macs(tokens: int, config: Any) -> int:
    """Multiply-accumulates of one decoder layer over ``tokens`` prompt tokens (GQA, gated three-matrix FFN).

    ``2nD^2(1 + kv/heads) + 2n^2D + 3nDM`` (docs/efficiency.md, "FLOPs").
    """
    width = config.hidden_size
    heads, key_heads, head_dim = _heads(config)
    projections = 2 * tokens * width * head_dim * (heads + key_heads)
    attention = 2 * tokens * tokens * heads * head_dim
    feed_forward = 3 * tokens * width * config.intermediate_size
    return projections + attention + feed_forward


def prefill_macs(layer_tokens: Sequence[int], config: Any) -> int:
    """Sum over the decoder layers; ``layer_tokens`` holds the tokens that each of them processes."""
    return sum(layer_macs(tokens, config) for tokens in layer_tokens)


def pieces_macs(pieces: Iterable[tuple[int, int]], config: Any) -> int:
    """Prefill of all decoder layers of a prompt that is read piece by piece, on top of what the pieces before it have
    left in the cache: (rows, entries cached before them) of each."""
    heads, _, head_dim = _heads(config)
    one_layer = sum(layer_macs(rows, config) + 2 * rows * cached * heads * head_dim for rows, cached in pieces)
    return config.num_hidden_layers * one_layer


def prefill_macs_papers(layer_tokens: Sequence[int], config: Any) -> int:
    """The formula that FastV introduced and most papers print: ``4nD^2 + 2n^2D + 2nDM`` per layer.

    It takes attention for multi-head (no GQA) and the FFN for two matrices, where LLaMA and Qwen have three. Only for
    comparison with printed numbers (docs/efficiency.md, "FLOPs").
    """
    width, inner = config.hidden_size, config.intermediate_size
    return sum(4 * n * width**2 + 2 * n**2 * width + 2 * n * width * inner for n in layer_tokens)


def decode_macs(layer_tokens: Sequence[int], new_tokens: int, config: Any) -> int:
    """Multiply-accumulates of ``new_tokens`` decode steps on caches that prefill left at ``layer_tokens`` entries."""
    heads, _, head_dim = _heads(config)
    per_step = layer_macs(1, config) - 2 * heads * head_dim  # without the attention over one key
    total = 0
    for cached in layer_tokens:
        keys = new_tokens * cached + new_tokens * (new_tokens + 1) // 2
        total += new_tokens * per_step + 2 * keys * heads * head_dim
    return total


def head_macs(config: Any, positions: int = 1) -> int:
    """The LM head at ``positions`` positions: one in prefill, one per decode step."""
    return positions * config.hidden_size * config.vocab_size


def kv_cache_values(layer_tokens: Sequence[int], config: Any) -> int:
    """Numbers in the KV cache that prefill leaves; times the bytes of the dtype it is the cache's size."""
    _, key_heads, head_dim = _heads(config)
    return sum(2 * tokens * key_heads * head_dim for tokens in layer_tokens)


def tower_macs(views: int, config: Any, layers: int, special: int = 0, side: int | None = None) -> int:
    """CLIP or SigLIP encoder over ``views`` images.

    Args:
        config: vision config (``hidden_size``, ``intermediate_size``, ``image_size``, ``patch_size``).
        layers: encoder layers that run (LLaVA leaves out the last one).
        special: tokens beside the patches (1 for CLIP's CLS).
        side: input side in pixels, the config's own by default.
    """
    width, patch = config.hidden_size, config.patch_size
    patches = ((side or config.image_size) // patch) ** 2
    tokens = patches + special
    embedding = patches * getattr(config, "num_channels", 3) * patch**2 * width
    layer = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * config.intermediate_size
    return views * (embedding + layers * layer)


def projector_macs(tokens: int, projector: Any) -> int:
    """All linear layers of ``projector``, each applied to every one of ``tokens`` tokens."""
    from torch import nn

    return tokens * sum(m.weight.numel() for m in projector.modules() if isinstance(m, nn.Linear))


class MacCounter:
    """Counts the products that torch performs in chosen calls: the work that a method adds to the model's own.

    Matrix products, convolutions and attention are counted, in MACs; sorting, gathering and elementwise work is not.
    """

    def __init__(self) -> None:
        self.macs = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            yield
        self.macs += counter.get_total_flops() // 2

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` with every call counted."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.counting():
                return function(*args, **kwargs)

        return call
