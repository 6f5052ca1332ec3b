"""HICom: a video in blocks and queries that the instruction asks for (CVPR 2025, arXiv 2503.16036).

LLaVA on Qwen2.5 with SigLIP, whose projector has two branches: one token for each block of 4 x 3 x 3 patches, chosen
inside the block by the instruction, and 32 queries that carry the instruction and read all patches. 32 frames are 680
tokens. Follows `lntzm/HICom@df67ea1c`. Attention has no loop over blocks or frames.
"""

from __future__ import annotations

from typing import Any

from llava.model.architectures.hicom.grammar import is_compressor
from llava.model.architectures.hicom.model import HIComQwen2ForCausalLM


def recognises(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of a HICom checkpoint, by its projector or its classes (its baselines)."""
    named = [*(config.get("architectures") or ()), config.get("model_type") or ""]
    own = any(str(name).lower().startswith("hicom") for name in named)
    return own or is_compressor(config.get("mm_projector_type"))


MODEL = HIComQwen2ForCausalLM
