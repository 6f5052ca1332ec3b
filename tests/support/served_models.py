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
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
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
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.support.native_processors import LLAVA_TEMPLATE, QWEN_TEMPLATE, byte_tokenizer

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


def qwen2_vl(folder: Path) -> Path:
    """Qwen2-VL: every vision block sees whole frames."""
    vision = {"embed_dim": 32, "hidden_size": 64, "depth": 3, "num_heads": 2, "mlp_ratio": 2, **_QWEN_PATCHES}
    config = Qwen2VLConfig(vision_config=vision, text_config={**_TEXT, **_mrope([4, 6, 6])}, **_QWEN_IDS)
    return _saved(folder / "qwen2_vl", Qwen2VLForConditionalGeneration(config), _qwen_processor(Qwen2VLProcessor))


def qwen2_5_vl(folder: Path) -> Path:
    """Qwen2.5-VL: windows in all vision blocks but the last."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "depth": 4, "num_heads": 2}
    vision |= {"window_size": 16, "fullatt_block_indexes": [1, 3], "tokens_per_second": 2, **_QWEN_PATCHES}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config={**_TEXT, **_mrope([4, 6, 6])}, **_QWEN_IDS)
    return _saved(
        folder / "qwen2_5_vl", Qwen2_5_VLForConditionalGeneration(config), _qwen_processor(Qwen2_5_VLProcessor)
    )


def internvl(folder: Path) -> Path:
    """InternVL: tiles of 8 x 8 patches, 4 x 4 tokens."""
    vision = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    vision |= {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH], "use_absolute_position_embeddings": True}
    config = InternVLConfig(
        vision_config=vision, text_config={**_TEXT, "model_type": "qwen2"}, image_token_id=IMAGE, image_seq_length=16
    )
    named = {"start_image_token": "<img>", "end_image_token": "</img>"}
    named |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    tokenizer = byte_tokenizer(
        VOCABULARY, {302: "<img>", 303: "</img>", IMAGE: "<IMG_CONTEXT>", VIDEO: "<video>"}, extra_special_tokens=named
    )
    size = {"height": SIDE, "width": SIDE}
    image = "{{ {'image': '<IMG_CONTEXT>'}.get(part['type'], '<video>') }}"
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, max_patches=4, crop_to_patches=True),
        tokenizer,
        InternVLVideoProcessor(size=size),
        image_seq_length=16,
        chat_template=LLAVA_TEMPLATE.replace("<{{ part['type'] }}>", image),
    )
    return _saved(folder / "internvl", InternVLForConditionalGeneration(config), processor)


def qwen3_vl(folder: Path) -> Path:
    """Qwen3-VL, features of a second vision block for the first decoder layer."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "depth": 3, "num_heads": 2}
    vision |= {"deepstack_visual_indexes": [1], "num_position_embeddings": 64, **_QWEN_PATCHES}
    # transformers mixes the axes of this model's ids whatever its config says, vLLM only where the config says so
    text = {**_TEXT, "head_dim": 32, **_mrope([6, 5, 5], mrope_interleaved=True)}
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config=vision, text_config=text, **_QWEN_IDS))
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(**_QWEN_SIZES, **_QWEN_LIMITS, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        byte_tokenizer(VOCABULARY, _QWEN_WORDS),
        Qwen3VLVideoProcessor(**_QWEN_SIZES, **_QWEN_LIMITS),
        chat_template=QWEN_TEMPLATE.replace("VIDEO", "<|video_pad|>"),
    )
    return _saved(folder / "qwen3_vl", model, processor)


_QWEN_PATCHES = {"patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
_QWEN_IDS = {"image_token_id": 304, "video_token_id": 305, "vision_start_token_id": 302, "vision_end_token_id": 303}
_QWEN_WORDS = {302: "<|vision_start|>", 303: "<|vision_end|>", 304: "<|image_pad|>", 305: "<|video_pad|>"}
_QWEN_SIZES = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2}
_QWEN_LIMITS = {"size": {"shortest_edge": 64, "longest_edge": 4096}}


def _mrope(section: list[int], **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section, **more}}


def _qwen_processor(processor: Any) -> Any:
    return processor(
        Qwen2VLImageProcessor(**_QWEN_SIZES, **_QWEN_LIMITS),
        byte_tokenizer(VOCABULARY, _QWEN_WORDS),
        Qwen2VLVideoProcessor(**_QWEN_SIZES, **_QWEN_LIMITS),
        chat_template=QWEN_TEMPLATE.replace("VIDEO", "<|vision_start|><|video_pad|><|vision_end|>"),
    )


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
    "internvl": internvl,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
}
