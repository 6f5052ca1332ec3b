"""The tiny LLaVA checkpoints in transformers' own classes: same weights, keys mapped."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
)

from llava.model.builder import load_pretrained_model
from tests.support.paths import CHECKPOINTS

CLASSES = {
    "tiny-llava-1.5": (LlavaConfig, LlavaForConditionalGeneration),
    "tiny-llava-1.6": (LlavaNextConfig, LlavaNextForConditionalGeneration),
    "tiny-llava-onevision": (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration),
}
_TEXT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "rope_parameters", "tie_word_embeddings"),
)


@functools.cache
def tree_model(name: str) -> Any:
    """The checkpoint in this project's tree."""
    _, model, _, _ = load_pretrained_model(str(CHECKPOINTS / name), device_map="cpu", torch_dtype="float32")
    return model.eval()


@functools.cache
def native_model(name: str, image_token: int = 7) -> Any:
    """The same weights in the native class; ``image_token`` (and the next id, for videos) are the placeholders."""
    tree = tree_model(name)
    config_class, model_class = CLASSES[name]
    tower = tree.get_vision_tower()
    text = {key: getattr(tree.config, key) for key in _TEXT}
    text["vocab_size"] = tree.lm_head.weight.shape[0]
    text_class = Qwen2Config if "Qwen" in type(tree).__name__ else LlamaConfig
    vision = tower.vision_tower.config.to_dict()
    more: dict[str, Any] = {"image_token_index": image_token}
    if name != "tiny-llava-1.5":  # (height, width) here, (width, height) there
        more["image_grid_pinpoints"] = [point[::-1] for point in tree.config.image_grid_pinpoints]
    if name == "tiny-llava-onevision":
        more |= {"video_token_index": image_token + 1, "vision_feature_layer": -1}
        more |= {"vision_feature_select_strategy": "full", "vision_aspect_ratio": tree.config.image_aspect_ratio}
    config = config_class(vision_config=vision, text_config=text_class(**text), **more)
    model = model_class(config).eval()
    weights = {}
    for key, value in tree.state_dict().items():
        new = key.replace("model.vision_tower.vision_tower.", "model.vision_tower.")
        new = new.replace("model.mm_projector.0.", "model.multi_modal_projector.linear_1.")
        new = new.replace("model.mm_projector.2.", "model.multi_modal_projector.linear_2.")
        if new.startswith(("model.layers.", "model.embed_tokens.", "model.norm.")):
            new = "model.language_model." + new.removeprefix("model.")
        weights[new] = value
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert all("vision_tower.head" in k or "post_layernorm" in k for k in missing), missing
    return model


def expanded(ids: list[int], token: int, count: int) -> torch.Tensor:
    """[1, n] ids in which the one ``token`` stands ``count`` times, as a processor writes it."""
    at = ids.index(token)
    return torch.tensor([[*ids[:at], *[token] * count, *ids[at + 1 :]]])
