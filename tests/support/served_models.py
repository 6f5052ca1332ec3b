"""Random checkpoints that vLLM can serve on a CPU: its attention there needs heads of at least 32 numbers.

Every family with a processor, byte tokenizer and chat template; transformers loads the same folders.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.support.native_processors import LLAVA_TEMPLATE, byte_tokenizer

VOCABULARY = 320
IMAGE, VIDEO = 300, 301
SIDE, PATCH = 32, 4  # pixels; a view has 8 x 8 patches
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [SIDE, SIDE]]


def scaled(model: Any, seed: int = 0, spread: float = 0.15) -> Any:
    """``model`` with weights large enough that different inputs have different answers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            values = torch.randn(weight.shape, generator=generator) * spread
            weight.copy_(1 + values if "norm" in name and name.endswith("weight") else values)
    return model.eval()


def llava_1_5(folder: Path) -> Path:
    """LLaVA-1.5: CLIP, the features of the last layer but one."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION),
        text_config=LlamaConfig(**_TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    processor = LlavaProcessor(
        CLIPImageProcessor(**size), byte_tokenizer(VOCABULARY, {IMAGE: "<image>"}), **_llava_processor()
    )
    return _saved(folder / "llava_1_5", LlavaForConditionalGeneration(config), processor)


def llava_next(folder: Path) -> Path:
    """LLaVA-NeXT: CLIP, tiles and newlines."""
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_VISION),
        text_config=LlamaConfig(**_TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    processor = LlavaNextProcessor(
        LlavaNextImageProcessor(**size, image_grid_pinpoints=PINPOINTS),
        byte_tokenizer(VOCABULARY, {IMAGE: "<image>"}),
        **_llava_processor(),
    )
    return _saved(folder / "llava_next", LlavaNextForConditionalGeneration(config), processor)


def llava_onevision(folder: Path) -> Path:
    """LLaVA-OneVision: SigLIP (its pooling head in the folder ``vision_tower``), images in tiles, videos."""
    vision = SiglipVisionConfig(**_VISION)
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=Qwen2Config(**_TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_9",
    )
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS),
        byte_tokenizer(VOCABULARY, {IMAGE: "<image>", VIDEO: "<video>"}),
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=LLAVA_TEMPLATE,
        vision_aspect_ratio="anyres_max_9",
    )
    target = _saved(folder / "llava_onevision", LlavaOnevisionForConditionalGeneration(config), processor)
    tower = target / "vision_tower"
    vision.save_pretrained(tower)
    weights = scaled(SiglipVisionModel(vision), seed=1).state_dict()
    # under the names of the towers on the hub
    named = {
        f"vision_model.{name.removeprefix('vision_model.')}": value.contiguous() for name, value in weights.items()
    }
    save_file(named, tower / "model.safetensors")
    return target


def _llava_processor() -> dict[str, Any]:
    return {
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": LLAVA_TEMPLATE,
    }


def _saved(target: Path, model: Any, processor: Any) -> Path:
    scaled(model).save_pretrained(target)
    processor.save_pretrained(target)
    return target


#: name of the family -> what writes its checkpoint into a folder
CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "llava_1_5": llava_1_5,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
}
