"""TG-LLaVA: guidance, detail latents, and whole models on either decoder."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava.model.architectures import architecture_of
from llava.model.architectures.tg_llava.details import SIZES, PatchEncoder
from llava.model.architectures.tg_llava.guide import TextGuide
from llava.model.checkpoint import read_config

#: the views of whole models
SIDE = 336


def _filled(module: nn.Module, inputs: dict[str, Tensor]) -> nn.Module:
    module.load_state_dict({name[2:]: value.float() for name, value in inputs.items() if name.startswith("w.")})
    return module.eval()


@torch.no_grad()
def text_guide(inputs, params, context):
    width, text = inputs["w.resize_linear.weight"].shape
    inner = inputs["w.Qformer.bert.encoder.layer.0.intermediate_query.dense.weight"].shape[0]
    bert = {"num_attention_heads": params["num_heads"], "intermediate_size": inner}
    module = _filled(TextGuide(width, text, params["num_queries"], bert), inputs)
    return {"guidance": module(inputs["text_pooled"].float())}


@torch.no_grad()
def patch_encoder(inputs, params, context):
    width, text = inputs["w.resize_linear.weight"].shape
    places, out = len(inputs["w.position_embedding.weight"]), len(inputs["w.proj.0.weight"])
    module = _filled(PatchEncoder(width, text, out, places, {n: params[n] for n in SIZES if n in params}), inputs)
    return {"tokens": module(inputs["patch_features"].float(), inputs["text_tokens"].float())}


@lru_cache(maxsize=2)
def load(folder: Path) -> Any:
    """The checkpoint in float32."""
    model_class = architecture_of(read_config(folder))
    return model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


@torch.no_grad()
def e2e(inputs, params, context):
    model, ids, guide = load(context.checkpoint(params["checkpoint"])), inputs["input_ids"], inputs["text_guide_ids"]
    repeat = SIDE // inputs["coarse"].shape[-1]
    pixels = inputs["coarse"].float().repeat_interleave(repeat, 2).repeat_interleave(repeat, 3)
    asked = {"images": pixels, "text_guide_ids": guide}
    embeds = model.prepare_multimodal(ids, None, None, **asked)
    pooled, rows = model.get_text_tower()(guide.view(-1, guide.shape[-1]))
    start = embeds.spans[0][0].start + model.get_vision_tower().num_patches
    latents = torch.stack([row[start : start + 64] for row in embeds.inputs_embeds])
    return {
        "inputs_embeds_every4": embeds.inputs_embeds[:, ::4],
        "latent_tokens": latents,
        "text_pooled": pooled,
        "text_last_hidden": rows,
        "prefill_logits": model(input_ids=ids, **asked).logits[:, -1],
        "greedy_ids": model.generate(
            ids, **asked, do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0
        ),
        "n_visual": torch.tensor(embeds.spans[0][0].length),
    }


ADAPTERS = {
    ("tg_llava", "text_guide"): text_guide,
    ("tg_llava", "patch_encoder"): patch_encoder,
    ("tg_llava", "e2e"): e2e,
}
