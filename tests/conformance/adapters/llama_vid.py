"""LLaMA-VID: its tower, Q-Former and tokens, frames by rate, and whole models with images, videos and features."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from llava.model.architectures import architecture_of
from llava.model.architectures.llama_vid.tokens import patches_of
from llava.model.builder import _set_config
from llava.model.checkpoint import load_config, read_config


@lru_cache(maxsize=2)
def load(folder: Path, tower: Path, bert: Path, **keys: Any) -> Any:
    """The checkpoint in float32 with ``keys`` in its config; a dict comes as a tuple of its items."""
    model_class = architecture_of(read_config(folder))
    config = load_config(model_class.config_class, folder)
    config.mm_vision_tower, config.bert_folder = str(tower), str(bert)
    for key, value in keys.items():
        _set_config(config, key, dict(value) if isinstance(value, tuple) else value)
    model = model_class.from_pretrained(folder, config=config, dtype=torch.float32, attn_implementation="sdpa").eval()
    model.get_vision_tower().load_model()
    return model


def _model(params: dict[str, Any], context: Any) -> Any:
    def path(name: str) -> Path:
        first, *rest = Path(name).parts
        return context.checkpoint(first).joinpath(*rest)

    keys: dict[str, Any] = {"eva_heads": params["eva_heads"]}
    if "compress_type" in params:
        keys["compress_type"] = params["compress_type"]
    if "image_size" in params:
        keys["image_processor"] = f"clip-patch14-{params['image_size']}"
    for key, value in params.get("config_override", {}).items():
        keys[key] = tuple(value.items()) if isinstance(value, dict) else value
    return load(path(params["checkpoint"]), path(params["eva"]), path(params["bert"]), **keys)


def _pixels(inputs, params):
    repeat = params["pixel_repeat"]
    return inputs["coarse"].float().repeat_interleave(repeat, 2).repeat_interleave(repeat, 3)


@torch.no_grad()
def eva_vit(inputs, params, context):
    return {"features": _model(params, context).get_vision_tower()(_pixels(inputs, params))}


@torch.no_grad()
def qformer(inputs, params, context):
    decoder = _model(params, context).get_model()
    ids, real = inputs["bert_input_ids"], inputs["bert_attention_mask"]
    queries, text_q = decoder.text_queries(inputs["features"].float(), ids, real)
    return {"queries": queries, "text_q": text_q}


@torch.no_grad()
def token_generation(inputs, params, context):
    decoder = _model(params, context).get_model()
    return {"tokens": decoder.image_tokens(inputs["text_q"].float(), patches_of(inputs["vis_embed"].float()))}


def sample_frames(inputs, params, context):
    from llava.frame_choice import sample_frames

    return {"indices": sample_frames(int(inputs["total"]), params["fps"], params["target_fps"]).indices}


@torch.no_grad()
def e2e(inputs, params, context):
    model, ids = _model(params, context), inputs["input_ids"]
    if "features" in inputs:
        images, modalities = [inputs["features"].float()], ["video"]
    else:
        pixels = _pixels(inputs, params)
        images = [pixels] if len(pixels) > 1 or len(pixels) != len(ids) else pixels
        modalities = ["video" if len(pixels) > 1 else "image"]
    asked = {"images": images, "modalities": modalities, "questions": params["prompts"]}
    spliced = model.prepare_multimodal(ids, None, None, **asked)
    logits = model(input_ids=ids, **asked).logits[:, -1]
    generated = model.generate(ids, **asked, do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0)
    texts = [text for own in params["prompts"] for text in own]
    return {
        "inputs_embeds": spliced.inputs_embeds,
        "prefill_logits": logits,
        "greedy_ids": generated,
        "n_visual": spliced.visual.sum(1),
        "bert_input_ids": model.question_tokenizer(texts)[0],
    }


ADAPTERS = {
    ("llama_vid", "eva_vit"): eva_vit,
    ("llama_vid", "qformer"): qformer,
    ("llama_vid", "token_generation"): token_generation,
    ("llama_vid", "sample_frames"): sample_frames,
    ("llama_vid", "e2e"): e2e,
}
