"""FastVID: its steps one by one (docs/methods/fastvid.md), and whole models with the signals that it read."""

from __future__ import annotations

import torch

import accelerate_methods
from accelerate_methods.fastvid import plan_quotas
from accelerate_methods.hosts.layouts import pool_2d
from accelerate_methods.hosts.native.qwen_vl import frame_attention
from accelerate_methods.hosts.pooling_head import SiglipPoolingHead
from accelerate_methods.ops.density import density_peak_scores
from accelerate_methods.ops.merge import AnchorSets, blend_into_anchors, nearest_anchors
from accelerate_methods.ops.segment import dynamic_segments
from accelerate_methods.ops.select import mask_to_indices, top_mask
from tests.conformance.adapters import shared, whole_models


def dyseg(inputs, params, context):
    sizes = dynamic_segments(inputs["global_features"].float(), params["c"], params["tau"])
    return {"segment_sizes": torch.tensor(sizes)}


def siglip_pool_attention(inputs, params, context):
    weights = {k[2:]: v.float() for k, v in inputs.items() if k.startswith("w.")}
    head = SiglipPoolingHead(
        weights["probe"].shape[-1],
        weights["mlp.fc1.weight"].shape[0],
        params["num_heads"],
        params["layer_norm_eps"],
        params["hidden_act"],
    )
    head.load_state_dict(weights)
    global_features, attention = head(inputs["patch_features"].float())
    return {"global_features": global_features, "attention": attention}


def attention_pool(inputs, params, context):
    return {"attention": pool_2d(inputs["attention"].float()[..., None], params["mode"], params["stride"])[..., 0]}


def ats(inputs, params, context):
    mask = top_mask(inputs["attention"].float(), params["num_salient"])
    return {"indices": mask_to_indices(mask, params["num_salient"])}


def density_score(inputs, params, context):
    density, score = density_peak_scores(inputs["tokens"].float(), params["k"])
    return {"density": density, "score": score}


def dtm_merge(inputs, params, context):
    pool, anchors = inputs["pool"].float(), inputs["anchors"].float()
    sets, size = anchors.shape[:2]
    anchors = anchors.flatten(0, 1)
    member = nearest_anchors(pool, anchors, [AnchorSets(0, len(pool), 0, sets, size)])
    everything = torch.ones(len(member.token), dtype=torch.bool)
    tokens = blend_into_anchors(pool, anchors, member, everything, len(everything), params["beta"])
    return {"tokens": tokens.unflatten(0, (sets, size))}


def frame_quotas(inputs, params, context):
    out = {}
    for i, row in enumerate(params["rows"]):
        per_frame = row["num_tokens"]
        quota = int(per_frame * row["retention_ratio"])
        plan = plan_quotas(
            inputs[f"segment_sizes.{i}"].tolist(), per_frame, quota, row["d"], row["p"], params["variant"]
        )
        out[f"salient.{i}"], out[f"context.{i}"] = torch.tensor(plan.salient), torch.tensor(plan.context)
    return out


def compress(inputs, params, context):
    if params["variant"] == "qwen2_5_vl":  # no pooling head: a frame's feature is the mean of its tokens
        mean = {"global_features": inputs["features"].float().mean(dim=1)}
        return shared.compress(inputs | mean, params, context) | mean
    return shared.compress(inputs, params, context)


def qwen_frame_attention(inputs, params, context):
    frames, unit = params["grid_thw"][0], params["merge"] ** 2
    query, key = (inputs[name].float().unflatten(0, (frames, -1)) for name in ("query", "key"))
    return {"attention": frame_attention(query, key, unit)}


def e2e(inputs, params, context):
    question = whole_models.ask(inputs, params, context)
    with accelerate_methods.accelerate(question.model, question.method):
        signals = question.items()[0].signals
        out = whole_models.answer(question)
    return out | {"global_features": signals["frame_features"], "attention": signals["pooling_attention"]}


ADAPTERS = {
    ("fastvid", "dyseg"): dyseg,
    ("fastvid", "siglip_pool_attention"): siglip_pool_attention,
    ("fastvid", "attention_pool"): attention_pool,
    ("fastvid", "ats"): ats,
    ("fastvid", "density_score"): density_score,
    ("fastvid", "dtm_merge"): dtm_merge,
    ("fastvid", "frame_quotas"): frame_quotas,
    ("fastvid", "compress"): compress,
    ("fastvid", "qwen_frame_attention"): qwen_frame_attention,
    ("fastvid", "e2e"): e2e,
}
