"""LLaVA-Mini: the compressor, pre-fusion, whole models with images and videos, sub-images and frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from llava.model.architectures.llava_mini.media import sample_frames, split_image
from llava.model.splice import Prompts
from tests.conformance.adapters import whole_models


def _model(params: dict[str, Any], context: Any) -> Any:
    return whole_models.load_architecture(params, context, compressor_heads=params["compressor_heads"])


def compress(inputs, params, context):
    compressor, features = _model(params, context).get_model().compressor, inputs["features"].float()
    return {"tokens": compressor(features), "attn": compressor.attention(features)}


def fuse(inputs, params, context):
    model, prompts = _model(params, context), Prompts(inputs["input_ids"], dummies=True)
    items = [model.unfused("image", 1, parts[None]) for parts in inputs["features"].float()]
    visual = torch.stack([sequence.tokens for sequence in model.compress(items, prompts)])
    return {"visual_tokens": visual, "text_embeds": prompts.embeds}


def e2e(inputs, params, context):
    model, ids, repeat = _model(params, context), inputs["input_ids"], params["pixel_repeat"]
    pixels = inputs["coarse"].float().repeat_interleave(repeat, 2).repeat_interleave(repeat, 3)
    pixels = pixels.view(params["image_shape"])
    images = pixels if params["image_form"] == "tensor" else list(pixels)
    asked = {"images": images, "attention_mask": inputs.get("attention_mask")}
    with torch.no_grad():
        spliced = model.prepare_multimodal(ids, asked["attention_mask"], None, images)
        logits = model(input_ids=ids, **asked).logits
        generated = model.generate(ids, **asked, do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0)
    lengths = torch.tensor(spliced.lengths)
    return {
        "inputs_embeds": spliced.inputs_embeds,
        "prefill_logits": logits[torch.arange(len(ids)), lengths - 1],
        "greedy_ids": generated,
        "lengths": lengths,
        "n_visual": torch.tensor([spliced.spans[0][0].length]),
    }


def hd_split(inputs, params, context):
    parts = split_image(Image.fromarray(inputs["image"].numpy()), params["n"])
    return {f"part_{number}": torch.from_numpy(np.array(part)) for number, part in enumerate(parts)}


def frames(inputs, params, context):
    return {"indices": torch.tensor(sample_frames(int(inputs["total"]), params["fps"], params.get("max_frames")))}


ADAPTERS = {
    ("llava_mini", "compress"): compress,
    ("llava_mini", "fuse"): fuse,
    ("llava_mini", "e2e"): e2e,
    ("llava_mini", "hd_split"): hd_split,
    ("llava_mini", "sample_frames"): frames,
}
