"""FastVLM: its encoder map by map, preprocessing, and whole models with one, two and tiled images."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from llava.image_processing import clip_image_processor
from llava.mm_utils import process_images
from llava.model.architectures import architecture_of
from llava.model.checkpoint import read_config


@lru_cache(maxsize=2)
def _load(folder: Path) -> Any:
    """The checkpoint in float32."""
    model_class = architecture_of(read_config(folder))
    return model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def _pixels(inputs: dict[str, Tensor], params: dict[str, Any]) -> Tensor:
    factor = params["coarse_factor"]
    return inputs["coarse"].float().repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def vision_encoder(inputs, params, context):
    model = _load(context.checkpoint(params["checkpoint"]))
    tower, pixels = model.get_vision_tower(), _pixels(inputs, params)
    encoder, maps = tower.vision_tower, {}
    maps["stem"] = states = encoder.patch_embed(pixels[:1])
    for index, part in enumerate(encoder.network):
        maps[f"network_{index}"] = states = part(states)
    embeddings, tokens = encoder(pixels), tower(pixels)
    out = {
        "image_embeddings": embeddings,
        "tokens": tokens,
        "projected": model.project(tokens),
        "logits": encoder.head(embeddings),
    }
    return out | maps | {f"{name}_crop": value[:, :, -6:, :6] for name, value in maps.items()}


def preprocess(inputs, params, context):
    image = Image.fromarray(inputs["image_uint8"].numpy())
    processor = clip_image_processor(params["size"], mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    config = _with_defaults(params["image_aspect_ratio"])
    return {"pixel_values": process_images([image], processor, config)}


def _with_defaults(aspect: str | None) -> Any:
    """What the config of a checkpoint with (or, for None, without) this mode says."""
    from llava.model.architectures.fastvlm import FastVlmConfig

    given = {} if aspect is None else {"image_aspect_ratio": aspect}
    return SimpleNamespace(image_aspect_ratio=FastVlmConfig(**given).image_aspect_ratio, image_grid_pinpoints=None)


def e2e(inputs, params, context):
    model = _load(context.checkpoint(params["checkpoint"]))
    keys = ("image_aspect_ratio", "mm_patch_merge_type", "image_grid_pinpoints")
    before = {key: getattr(model.config, key) for key in keys}
    for key in keys:
        setattr(model.config, key, params.get(key, before[key]))
    if "image_newline" in params:
        model.get_model().image_newline = nn.Parameter(torch.tensor(params["image_newline"]))
    pixels, sizes = _pixels(inputs, params), params.get("image_sizes")
    images = [pixels] if sizes else pixels
    asked = {"images": images, "modalities": ["image"] * len(images), "image_sizes": sizes}
    ids = inputs["input_ids"]
    try:
        spliced = model.prepare_multimodal(ids, None, None, **asked)
        logits = model(input_ids=ids, **asked).logits[:, -1]
        generated = model.generate(ids, **asked, do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0)
    finally:
        for key, value in before.items():
            setattr(model.config, key, value)
        if "image_newline" in params:
            del model.get_model().image_newline
    return {"inputs_embeds": spliced.inputs_embeds, "prefill_logits": logits, "greedy_ids": generated}


ADAPTERS = {
    ("fastvlm", "vision_encoder"): vision_encoder,
    ("fastvlm", "preprocess"): preprocess,
    ("fastvlm", "e2e"): e2e,
}
