"""Tiny native checkpoints with a processor, tokenizer and chat template, written into a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tests.support.paths import CHECKPOINTS

QWEN_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}VIDEO{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<{{ part['type'] }}>{% endif %}"
    "{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(size: int, special: dict[int, str], **more: Any) -> PreTrainedTokenizerFast:
    """One token per byte (ids from 3), and special tokens at given ids below ``size``."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<unk>", "<s>", "</s>", *letters]
    words += [f"<unused{number}>" for number in range(len(words), size)]
    for number, word in special.items():
        words[number] = word
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="</s>",
        pad_token="<s>",
        **(more or {"additional_special_tokens": list(special.values())}),
    )


def qwen(folder: Path, name: str = "tiny-qwen2.5-vl") -> Path:
    """A tiny Qwen-VL checkpoint of tests/golden with a processor of tiny patches."""
    target = folder / name
    shutil.copytree(CHECKPOINTS / name, target)
    tokenizer = byte_tokenizer(
        300, {290: "<|vision_start|>", 291: "<|vision_end|>", 292: "<|image_pad|>", 293: "<|video_pad|>"}
    )
    sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    third = name == "tiny-qwen3-vl"
    limits = {"size": {"shortest_edge": 64, "longest_edge": 4096}}
    video = (Qwen3VLVideoProcessor if third else Qwen2VLVideoProcessor)(**sizes, **limits)
    # Qwen3-VL's processor writes the vision tokens of every frame itself
    pads = "<|video_pad|>" if third else "<|vision_start|><|video_pad|><|vision_end|>"
    processor = (Qwen3VLProcessor if third else Qwen2_5_VLProcessor)(
        Qwen2VLImageProcessor(**sizes, **limits), tokenizer, video, chat_template=QWEN_TEMPLATE.replace("VIDEO", pads)
    )
    processor.save_pretrained(target)
    return target


def onevision(folder: Path) -> Path:
    """The tiny LLaVA-OneVision checkpoint in transformers' class."""
    from tests.support.native_models import native_model

    target = folder / "tiny-llava-onevision-hf"
    model = native_model("tiny-llava-onevision")
    model.save_pretrained(target)
    config = model.config
    token, video = config.image_token_id, config.video_token_id
    side = config.vision_config.image_size
    size = {"height": side, "width": side}
    tokenizer = byte_tokenizer(config.text_config.vocab_size, {token: "<image>", video: "<video>"})
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=config.image_grid_pinpoints),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(side // config.vision_config.patch_size) ** 2,
        vision_feature_select_strategy="full",
        chat_template=LLAVA_TEMPLATE,
        vision_aspect_ratio=config.vision_aspect_ratio,
    )
    processor.save_pretrained(target)
    return target


def llava(folder: Path, name: str = "tiny-llava-1.5") -> Path:
    """The tiny LLaVA-1.5 or LLaVA-NeXT checkpoint in transformers' class."""
    from tests.support.native_models import native_model

    target = folder / f"{name}-hf"
    model = native_model(name)
    model.save_pretrained(target)
    config = model.config
    side = config.vision_config.image_size
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    tiled = name != "tiny-llava-1.5"
    processor = (LlavaNextProcessor if tiled else LlavaProcessor)(
        LlavaNextImageProcessor(**size, image_grid_pinpoints=config.image_grid_pinpoints)
        if tiled
        else CLIPImageProcessor(**size),
        byte_tokenizer(config.text_config.vocab_size, {config.image_token_id: "<image>"}),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    processor.save_pretrained(target)
    return target


def internvl(folder: Path) -> Path:
    """A random InternVL with tiles of 4 x 4 tokens."""
    target = folder / "tiny-internvl"
    vision = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    text = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"model_type": "qwen2", "vocab_size": 300, "intermediate_size": 64, "eos_token_id": 2, "bos_token_id": 1}
    config = InternVLConfig(
        vision_config={
            **vision,
            "image_size": [32, 32],
            "patch_size": [4, 4],
            "use_absolute_position_embeddings": True,
        },
        text_config={**text, "initializer_range": 0.3},
        image_token_id=292,
        image_seq_length=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        InternVLForConditionalGeneration(config).save_pretrained(target)
    special = {290: "<img>", 291: "</img>", 292: "<IMG_CONTEXT>", 293: "<video>"}
    tokenizer = byte_tokenizer(
        300,
        special,
        extra_special_tokens={
            **{"start_image_token": "<img>", "end_image_token": "</img>"},
            **{"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"},
        },
    )
    size = {"height": 32, "width": 32}
    named = "{{ {'image': '<IMG_CONTEXT>'}.get(part['type'], '<video>') }}"
    InternVLProcessor(
        GotOcr2ImageProcessor(size=size, max_patches=4, crop_to_patches=True),
        tokenizer,
        InternVLVideoProcessor(size=size),
        image_seq_length=16,
        chat_template=LLAVA_TEMPLATE.replace("<{{ part['type'] }}>", named),
    ).save_pretrained(target)
    return target
