"""LLaVA-Mini: one visual token per image or frame (ICLR 2025, arXiv 2501.03895).

A query compressor makes C x C tokens of an image; four decoder layers of their own ("pre-fusion") let the text read the
whole image before the language model runs, which then gets the C x C tokens and the fused text. Follows
`ictnlp/LLaVA-Mini@47da1137`.
"""

from __future__ import annotations

from typing import Any

from llava.model.architectures.llava_mini.model import LlavaMiniForCausalLM


def recognises(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of a LLaVA-Mini checkpoint."""
    said = {str(config.get("model_type")), *(config.get("architectures") or ())}
    own = {"llava_mini_llama", "LlavaMiniLlamaForCausalLM", LlavaMiniForCausalLM.__name__}
    return bool(own & said) or {"compressor_size", "prefusion_layer_num"} <= set(config)


MODEL = LlavaMiniForCausalLM
