"""FastVLM: a vision encoder of total stride 64 gives 256 tokens for 1024 x 1024 pixels (CVPR 2025, arXiv 2412.13303).

LLaVA on Qwen2 with FastViTHD in the place of CLIP; nothing else differs. Follows `apple/ml-fastvlm@592b4add`. The
encoder's weights lie in the checkpoint, in the form for inference; without them nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2ForCausalLM

from accelerate_methods.hosts.checkpoint_files import weight_names
from accelerate_methods.hosts.layouts import video_item
from accelerate_methods.registry.architectures import architecture
from accelerate_methods.stages.compress import VisualItem
from llava.model.architectures.fastvlm.tower import FastViTHDTower
from llava.model.checkpoint import CheckpointError, check_whole_tower, load_config
from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM, LlavaQwenModel

_QWEN2 = ("LlavaQwen2ForCausalLM", "llava_qwen2")


def recognises(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of a FastVLM checkpoint: its tower is called mobileclip_<kind>_<side>."""
    return str(config.get("mm_vision_tower") or "").rpartition("/")[2].lower().startswith("mobileclip_")


class FastVlmConfig(LlavaQwenConfig):
    """The official class is called ``LlavaQwen2``; without ``image_aspect_ratio`` images are cropped, not padded."""

    model_type = "llava_qwen2"

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        if getattr(self, "image_aspect_ratio", None) is None:
            self.image_aspect_ratio = "square"


class FastVlmModel(LlavaQwenModel):
    config_class = FastVlmConfig

    @staticmethod
    def build_tower(config: Any, **how: Any) -> nn.Module:
        return FastViTHDTower(config.mm_vision_tower, config, **how)


class LlavaQwen2ForCausalLM(LlavaQwenForCausalLM):
    """(S / 64)^2 tokens for each image of side S. Frames of a video follow each other, whole.

    Raises:
        CheckpointError: another decoder than Qwen2, or an encoder that is not whole.
    """

    config_class = FastVlmConfig
    about = architecture("fastvlm")
    weight_names: ClassVar[Mapping[str, str]] = {
        r"^model\.vision_tower\.vision_tower\.model\.": "model.vision_tower.vision_tower."
    }

    def __init__(self, config: FastVlmConfig):
        super(Qwen2ForCausalLM, self).__init__(config)
        self.build(config, FastVlmModel)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any):
        """As for every model of the tree; a head that the checkpoint lacks is tied to the embeddings."""
        path, config = pretrained_model_name_or_path, kwargs.get("config")
        config = load_config(cls.config_class, path) if config is None else config
        _check_decoder(config, path)
        state = kwargs.get("state_dict")
        if "lm_head.weight" not in (weight_names(path) if state is None else state):
            config.tie_word_embeddings = True
        want_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(path, *args, **{**kwargs, "config": config, "output_loading_info": True})
        check_whole_tower(info, path, "FastVLM's encoder")
        return (model, info) if want_info else model

    def lay_out(self, tokens: Tensor, kind: str, size: tuple[int, int] | None) -> VisualItem:
        if kind == "video":
            return video_item(tokens, None, "no_token", "flat")
        return super().lay_out(tokens, kind, size)


def _check_decoder(config: Any, path: Any) -> None:
    named = getattr(config, "architectures", None) or _QWEN2
    if not any(name in named for name in _QWEN2):
        raise CheckpointError(
            f"{str(path)!r}: its tower is FastVLM's, but its decoder is {', '.join(named)}; released are models on "
            f"Qwen2 ({_QWEN2[0]})."
        )


MODEL = LlavaQwen2ForCausalLM
AutoConfig.register("llava_qwen2", FastVlmConfig, exist_ok=True)
AutoModelForCausalLM.register(FastVlmConfig, LlavaQwen2ForCausalLM, exist_ok=True)
