"""FlashSloth: pooling, the refreshed queries, and whole models with one or five views and one or two turns."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from llava.model.architectures import architecture_of
from llava.model.architectures.flashsloth.modules import EmbeddedQuery, RegionPooling
from llava.model.checkpoint import load_config, read_config


@lru_cache(maxsize=2)
def load(folder: Path, **keys: Any) -> Any:
    """The checkpoint in float32 with ``keys`` in its config."""
    model_class = architecture_of(read_config(folder))
    config = load_config(model_class.config_class, folder)
    for key, value in keys.items():
        setattr(config, key, value)
    return model_class.from_pretrained(folder, config=config, dtype=torch.float32, attn_implementation="sdpa").eval()


def _weights(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix("w."): value.float() for key, value in inputs.items() if key.startswith("w.")}


@torch.no_grad()
def sap_pool(inputs, params, context):
    features = inputs["x"].float()
    pooling = RegionPooling(features.shape[-1], params["pooling_size"]).eval()
    pooling.load_state_dict(_weights(inputs))
    return {"tokens": pooling(features)}


@torch.no_grad()
def embq(inputs, params, context):
    queries, image = inputs["queries"].float(), inputs["image_tokens"].float()
    module = EmbeddedQuery(queries.shape[-1], image.shape[-1], params["num_heads"]).eval()
    module.load_state_dict(_weights(inputs))
    return {"queries": module(queries, image, inputs["text_tokens"].float(), inputs["text_mask"])}


@torch.no_grad()
def e2e(inputs, params, context):
    keys = {
        name: params[name] for name in ("learnable_token_index", "query_base_token_id", "image_hd") if name in params
    }
    model, ids = load(context.checkpoint(params["checkpoint"]), **keys), inputs["input_ids"]
    pixels = inputs["coarse"].float().repeat_interleave(16, 2).repeat_interleave(16, 3)
    asked = {"images": pixels[None] if len(pixels) > 1 else pixels}
    spliced = model.prepare_multimodal(ids, None, None, **asked)
    refreshed: list[torch.Tensor] = []
    hook = model.get_model().lqformer.register_forward_hook(lambda module, args, out: refreshed.append(out))
    logits = model(input_ids=ids, **asked).logits[:, -1]
    hook.remove()
    generated = model.generate(ids, **asked, do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0)
    groups = spliced.update.groups
    return {
        "inputs_embeds": spliced.inputs_embeds,
        "query_starts": torch.tensor([group.start for group in groups]),
        "question_ranges": torch.tensor([group.words for group in groups]),
        "queries_at_layer7": refreshed[0],
        "prefill_logits": logits,
        "greedy_ids": generated,
    }


ADAPTERS = {
    ("flashsloth", "sap_pool"): sap_pool,
    ("flashsloth", "embq"): embq,
    ("flashsloth", "e2e"): e2e,
}
