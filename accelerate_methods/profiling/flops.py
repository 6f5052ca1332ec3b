"""Analytic work of the language model.

Papers of the field quote multiply-accumulates of the decoder layers as "FLOPs" (one fused multiply-add counts once,
attention as a full square, no LM head). ``prefill_macs`` follows that convention and reproduces FastVID's table
(48.82 / 10.73 / 8.46 / 6.23 / 4.04 T for 6272 ... 608 tokens of LLaVA-OneVision-7B). Ratios do not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def layer_macs(tokens: int, config: Any) -> int:
    """Multiply-accumulates of one decoder layer over ``tokens`` prompt tokens (GQA, gated three-matrix FFN).

    ``2nD^2(1 + kv/heads) + 2n^2D + 3nDM`` (specs/fastvid.md section 10).
    """
    width, heads = config.hidden_size, config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    projections = 2 * tokens * width * head_dim * (heads + key_heads)
    attention = 2 * tokens * tokens * heads * head_dim
    feed_forward = 3 * tokens * width * config.intermediate_size
    return projections + attention + feed_forward


def prefill_macs(layer_tokens: Sequence[int], config: Any) -> int:
    """Sum over the decoder layers; ``layer_tokens`` holds the tokens that each of them processes."""
    return sum(layer_macs(tokens, config) for tokens in layer_tokens)


def decode_macs(layer_tokens: Sequence[int], new_tokens: int, config: Any) -> int:
    """Multiply-accumulates of ``new_tokens`` decode steps on caches that prefill left at ``layer_tokens`` entries."""
    width, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    per_step = layer_macs(1, config) - 2 * heads * head_dim  # without the attention over one key
    total = 0
    for cached in layer_tokens:
        keys = new_tokens * cached + new_tokens * (new_tokens + 1) // 2
        total += new_tokens * per_step + 2 * keys * heads * head_dim
    return total
