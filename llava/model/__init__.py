"""LLaVA models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_EXPORTS = {
    "LlavaConfig": "llava_llama",
    "LlavaLlamaForCausalLM": "llava_llama",
    "LlavaQwenConfig": "llava_qwen",
    "LlavaQwenForCausalLM": "llava_qwen",
    "LlavaMistralConfig": "llava_mistral",
    "LlavaMistralForCausalLM": "llava_mistral",
    "LlavaMixtralConfig": "llava_mixtral",
    "LlavaMixtralForCausalLM": "llava_mixtral",
    "LlavaGemmaConfig": "llava_gemma",
    "LlavaGemmaForCausalLM": "llava_gemma",
    "LlavaQwenMoeConfig": "llava_qwen_moe",
    "LlavaQwenMoeForCausalLM": "llava_qwen_moe",
}

__all__ = [
    "LlavaConfig",
    "LlavaLlamaForCausalLM",
    "LlavaQwenConfig",
    "LlavaQwenForCausalLM",
    "LlavaMistralConfig",
    "LlavaMistralForCausalLM",
    "LlavaMixtralConfig",
    "LlavaMixtralForCausalLM",
    "LlavaGemmaConfig",
    "LlavaGemmaForCausalLM",
    "LlavaQwenMoeConfig",
    "LlavaQwenMoeForCausalLM",
]

if TYPE_CHECKING:
    from llava.model.language_model.llava_gemma import LlavaGemmaConfig, LlavaGemmaForCausalLM
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
    from llava.model.language_model.llava_mixtral import LlavaMixtralConfig, LlavaMixtralForCausalLM
    from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM
    from llava.model.language_model.llava_qwen_moe import LlavaQwenMoeConfig, LlavaQwenMoeForCausalLM
else:

    def __getattr__(name: str):
        if name in _EXPORTS:
            return getattr(importlib.import_module(f"llava.model.language_model.{_EXPORTS[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
