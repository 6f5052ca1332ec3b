"""VidCom2: selections on plain features, in LLaVA-Video's layout and as vLLM makes them exact; whole models."""

from __future__ import annotations

import torch

import accelerate_methods
from accelerate_methods.engine.sequences import assemble
from accelerate_methods.hosts.layouts import video_item
from accelerate_methods.vidcom2 import VidCom2
from tests.conformance import vocabulary
from tests.conformance.adapters import qwen_models, shared, whole_models


def select_grid(inputs, params, context):
    features = inputs["features"].float()
    item = video_item(features, torch.zeros(features.shape[-1]), "grid", "spatial_unpad")
    assert item.grid == (params["grid"], params["grid"])
    return {"index": assemble(item, vocabulary.method_of(context, params).compress(item)).positions}


def vllm_select(inputs, params, context):
    method = VidCom2(retention_ratio=1 - params["pruning_rate"], exact=True)
    out = shared.compressed_item(method, vocabulary.item_of(method, inputs, params), context)
    return {"mask": out["mask"].bool(), "count": out["count"]}


def e2e(inputs, params, context):
    question = whole_models.ask(inputs, params, context)
    out = whole_models.answered(question)
    with accelerate_methods.accelerate(question.model, question.method):
        (item,) = question.items()
    compressed = question.method.compress(item)
    index = (compressed.owner.flatten() >= 0).nonzero().squeeze(1)
    return out | {"index": index, "counts": torch.bincount(index // item.tokens_per_frame)}


def e2e_qwen(inputs, params, context):
    return qwen_models.answered(inputs, params, context, vocabulary.method_of(context, params))[0]


ADAPTERS = {
    ("vidcom2", "select_grid"): select_grid,
    ("vidcom2", "vllm_select"): vllm_select,
    ("vidcom2", "e2e"): e2e,
    ("vidcom2", "e2e_qwen"): e2e_qwen,
}
