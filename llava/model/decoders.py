"""Which decoder (language model) a LLaVA checkpoint has: what its config says, and what a model name says.

The config decides. The official code looks at the name alone, so that a renamed folder is loaded into another class;
here a name that contradicts the config is an error.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

from llava.model.checkpoint import CheckpointError

#: decoder -> (class, module)
DECODERS = {
    "mixtral": ("LlavaMixtralForCausalLM", "llava_mixtral"),
    "gemma": ("LlavaGemmaForCausalLM", "llava_gemma"),
    "qwen_moe": ("LlavaQwenMoeForCausalLM", "llava_qwen_moe"),
    "mistral": ("LlavaMistralForCausalLM", "llava_mistral"),
    "qwen": ("LlavaQwenForCausalLM", "llava_qwen"),
    "llama": ("LlavaLlamaForCausalLM", "llava_llama"),
}
#: (decoder, what stands for it in a model name), in the order in which LLaVA-NeXT's loader asks
#: (`llava/model/builder.py` of LLaVA-VL/LLaVA-NeXT@006c78d). Short words must stand alone: "yi" is not in "trying".
_NAMED = tuple(
    (decoder, re.compile(pattern))
    for decoder, pattern in (
        ("mixtral", "mixtral"),
        ("mistral", "mistral|zephyr"),
        ("llama", r"llama|nous-hermes|llava-v1\.6-34b|llava-v1\.5|(?<![a-z])yi(?![a-z])|wizardlm-2.*vicuna"),
        ("qwen_moe", r"(qwen|quyen).*((?<![a-z])moe(?![a-z])|a14b)|(?<![a-z])moe(?![a-z]).*(qwen|quyen)"),
        ("qwen", "qwen|quyen"),
        ("gemma", "gemma"),
        # no decoders of this tree; the official loader takes such a checkpoint for a LLaMA
        ("moe", r"(?<![a-z])moe(?![a-z])"),
        ("mpt", r"(?<![a-z])mpt(?![a-z])"),
        ("llama", "vicuna"),
    )
)


def checkpoint_decoder(config: dict[str, Any], path: str = "") -> str:
    """Language model (a key of ``DECODERS``) that a config.json says it is."""
    named = [*config.get("architectures", ()), str(config.get("model_type", ""))]
    for decoder, (class_name, module) in DECODERS.items():
        if class_name in named or module in named:
            return decoder
    native = [n for n in named if n.endswith("ForConditionalGeneration")]
    hint = f" {native[0]} is the transformers-native format, which transformers itself loads." if native else ""
    raise CheckpointError(
        f"{path!r} is not a LLaVA checkpoint that this tree supports: architectures {config.get('architectures')}, "
        f"model_type {config.get('model_type')!r}; supported: {', '.join(c for c, *_ in DECODERS.values())}.{hint}"
    )


def decoder_of(model_class: type) -> str:
    """Language model (a key of ``DECODERS``) of a class of this tree, that of a trained architecture included."""
    bases = {base.__name__ for base in model_class.__mro__}
    return next(decoder for decoder, (class_name, _) in DECODERS.items() if class_name in bases)


def check_model_name(name: str, decoder: str, path: str) -> None:
    """Refuse a model name of another decoder than the checkpoint's (the official code would load garbage)."""
    said = named_decoder(name)
    if said is not None and said != decoder:
        raise CheckpointError(
            f"model_name {name!r} says {said}, but the config of {path!r} says {decoder}. "
            f"Use a name of the right decoder (e.g. {_example(decoder)!r}) or leave model_name out."
        )


def named_decoder(name: str) -> str | None:
    """Language model that a model name speaks of, None if it names none.

    Where a name speaks of two the official precedence decides: "llava-v1.5-13b-qwen" is a LLaMA.
    """
    lower = name.lower()
    return next((decoder for decoder, pattern in _NAMED if pattern.search(lower)), None)


def official_dispatch(model_name: str, multimodal: bool | None = None) -> dict[str, Any]:
    """What LLaVA-NeXT's loader would do with a name (`llava/model/builder.py` of LLaVA-VL/LLaVA-NeXT@df17966).

    For documentation and conformance only.

    Returns:
        The class name ("NameError" where the official code crashes), whether the tower load is delayed by the name,
        whether ``overwrite_config`` is applied, and whether a fast tokenizer is used.
    """
    lower = model_name.lower()
    delay = True if "v1.5" in lower else None

    def outcome(name: str, fast: bool, delay: bool | None = None, override: bool | None = None) -> dict[str, Any]:
        return {"class": name, "delay_load": delay, "override_applied": override, "use_fast_tokenizer": fast}

    if "llava" not in lower and not multimodal:
        return outcome("AutoModelForCausalLM", fast=False)
    if "mistral" in lower or "zephyr" in lower:
        return outcome("LlavaMistralForCausalLM", fast=True)
    wizard = "wizardlm-2" in lower and "vicuna" in lower
    if wizard or any(word in lower for word in ("llama", "yi", "nous-hermes", "llava-v1.6-34b", "llava-v1.5")):
        return outcome("LlavaLlamaForCausalLM", fast=False, delay=delay, override=True)
    if "qwen" in lower or "quyen" in lower:
        return outcome("LlavaQwenForCausalLM", fast=True, override=True)
    if "gemma" in lower:
        return outcome("NameError", fast=False)
    return outcome("LlavaLlamaForCausalLM", fast=False, override=True)


def model_class_of(decoder: str) -> Any:
    """The class of the tree's causal LM on this decoder."""
    class_name, module = DECODERS[decoder]
    return getattr(importlib.import_module(f"llava.model.language_model.{module}"), class_name)


def _example(decoder: str) -> str:
    return DECODERS[decoder][1]
