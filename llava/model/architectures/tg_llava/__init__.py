"""TG-LLaVA: image features and details that the question asks for (AAAI 2025, arXiv 2409.09564).

LLaVA-1.5 whose patches get a vector each from the question before they are projected, and 64 latents behind them that
have read the question and four enlarged quadrants: 640 tokens for an image, more than LLaVA's 576. Follows
`AIDC-AI/TG-LLaVA@0009eb8`. Decoders are Qwen2, or Llama (Vicuna, Llama-3).
"""

from __future__ import annotations

from typing import Any

from llava.model.architectures.tg_llava.model import (
    LlavaLlamaTextLearnableQueryForCausalLM,
    LlavaQwenTextLearnableQueryForCausalLM,
)


def recognises(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of a TG-LLaVA checkpoint: it has a text tower, or the classes' names."""
    named = [*(config.get("architectures") or ()), config.get("model_type") or ""]
    return any("text_learnable_query" in _plain(name) for name in named) or bool(config.get("mm_text_tower"))


def model_of(config: dict[str, Any]) -> Any:
    """The class for the decoder of a recognised checkpoint."""
    named = [*(config.get("architectures") or ()), config.get("model_type") or ""]
    llama = any("llama" in _plain(name) for name in named)
    return LlavaLlamaTextLearnableQueryForCausalLM if llama else MODEL


def _plain(name: str) -> str:
    """A class's name as a model type is spelt."""
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in str(name)).lstrip("_")


MODEL = LlavaQwenTextLearnableQueryForCausalLM
