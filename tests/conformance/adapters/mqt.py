"""MQT-LLaVA: the resampler, and whole models with 2 to 256 tokens."""

from __future__ import annotations

from typing import Any

import torch

from tests.conformance.adapters import whole_models


def _model(params: dict[str, Any], context: Any) -> Any:
    return whole_models.load_architecture(params, context, query_abstractor_heads=params["num_heads"])


def resample(inputs, params, context):
    model = _model(params, context)
    return {"tokens": model.get_model().mm_projector(inputs["features"].float(), params["num_visual_tokens"])}


def e2e(inputs, params, context):
    model, count = _model(params, context), params["num_visual_tokens"]
    repeat = params["pixel_repeat"]
    pixels = inputs["coarse"].float().repeat_interleave(repeat, 2).repeat_interleave(repeat, 3)
    images = list(pixels) if "image_form" in params else pixels
    ids = inputs["input_ids"]
    asked = {"images": images, "modalities": ["image"] * len(images), "num_visual_tokens": count}
    with torch.no_grad():
        spliced = model.prepare_multimodal(ids, None, None, **asked)
        logits = model(input_ids=ids, **asked).logits[:, -1]
        generated = model.generate(ids, **asked, do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0)
    return {
        "inputs_embeds": spliced.inputs_embeds,
        "prefill_logits": logits,
        "greedy_ids": generated,
        "n_visual": torch.full((len(images) // len(ids),), count),
    }


ADAPTERS = {("mqt", "resample"): resample, ("mqt", "e2e"): e2e}
