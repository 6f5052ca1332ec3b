"""LLaVA models."""

from __future__ import annotations

import importlib

_EXPORTS = {
    "LlavaConfig": "llava_llama",
    "LlavaLlamaForCausalLM": "llava_llama",
    "LlavaQwenConfig": "llava_qwen",
    "LlavaQwenForCausalLM": "llava_qwen",
    "LlavaMistralConfig": "llava_mistral",
    "LlavaMistralForCausalLM": "llava_mistral",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"llava.model.language_model.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
