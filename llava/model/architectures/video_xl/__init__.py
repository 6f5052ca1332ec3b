"""Video-XL: hours of video as summary tokens in the KV cache (CVPR 2025, arXiv 2409.14485).

LLaVA on Qwen2 whose decoder reads visual tokens window by window. Among them stand summary tokens, one behind every r
of them; only their keys and values stay when the next window is read. Follows `VectorSpaceLab/Video-XL@6e3dc89`, the
model of its folder ``Video-XL``; Video-XL-Pro and Video-XL-2 are others.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from llava.model.architectures.video_xl.decoder import VideoXLConfig
from llava.model.architectures.video_xl.model import VideoXLForCausalLM


def recognises(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of a Video-XL checkpoint."""
    return bool(config.get("enable_beacon")) and any(key.startswith("beacon_") for key in config)


MODEL = VideoXLForCausalLM
AutoConfig.register("video_xl", VideoXLConfig, exist_ok=True)
AutoModelForCausalLM.register(VideoXLConfig, VideoXLForCausalLM, exist_ok=True)
