"""VoCo-LLaMA: the language model compresses images into a few ``<voco>`` tokens itself (CVPR 2025, arXiv 2406.12275).

LLaVA-1.5 with k special tokens between image and text. Text sees nothing in front of the first of them, so that after
one pass over image and ``<voco>`` tokens the keys and values of these alone stay. Follows `Yxxxb/VoCo-LLaMA@3b6e14d9`,
whose cached decoding does not run; here a generated token is what it should be there, later text.
"""

from __future__ import annotations

from typing import Any

from llava.model.architectures.voco_llama.model import VocoLlamaForCausalLM
from llava.model.architectures.voco_llama.tokens import VOCO


def recognises(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of a checkpoint that was saved by this project."""
    return "voco_token_id" in config


def recognises_tokens(tokens: dict[str, int]) -> bool:
    """Whether these tokens, added to a checkpoint's tokenizer, are VoCo-LLaMA's; its config.json is plain LLaVA's."""
    return VOCO in tokens


MODEL = VocoLlamaForCausalLM
