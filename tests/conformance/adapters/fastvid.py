"""Adapters for FastVID's contracts (specs/fastvid.md section 14)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import accelerate_methods
from accelerate_methods.engine.sequences import assemble
from accelerate_methods.fastvid import plan_quotas
from accelerate_methods.hosts.layouts import pool_2d, video_item
from accelerate_methods.hosts.native.qwen_vl import frame_attention
from accelerate_methods.hosts.pooling_head import SiglipPoolingHead
from accelerate_methods.ops.density import density_peak_scores
from accelerate_methods.ops.merge import merge_to_anchors
from accelerate_methods.ops.segment import dynamic_segments
from accelerate_methods.ops.select import mask_to_indices, top_mask
from accelerate_methods.stages.compress import VisualItem
from llava.model.checkpoint import load_config
from llava.model.language_model.llava_qwen import LlavaQwenForCausalLM

_HYPER_PARAMETERS = ("retention_ratio", "c", "tau", "d", "p", "beta", "ignore", "variant")


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
    pool, anchors = inputs["pool"].float()[None], inputs["anchors"].float()[None]
    everything = torch.ones(1, 1, pool.shape[1], dtype=torch.bool)
    return {"tokens": merge_to_anchors(pool, anchors, everything, params["beta"])[0][0]}


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
    method = accelerate_methods.get("fastvid", **{k: params[k] for k in _HYPER_PARAMETERS if k in params})
    features = inputs["features"].float()
    out: dict[str, Any] = {}
    if params["variant"] == "qwen2_5_vl":
        frame_features = features.mean(dim=1)
        out["global_features"] = frame_features
    else:
        frame_features = inputs["global_features"].float()
    item = _item(features, inputs, params)
    item.signals = {"frame_features": frame_features, "pooling_attention": inputs["attention"].float()}
    compressed = method.compress(item)
    sequence = assemble(item, compressed)
    return out | {
        "tokens": sequence.tokens,
        "positions": sequence.positions,
        "segment_sizes": torch.tensor(compressed.info["segment_sizes"]),
        "salient_per_frame": torch.tensor(compressed.info["salient_per_frame"]),
        "context_per_frame": torch.tensor(compressed.info["context_per_frame"]),
    }


def qwen_frame_attention(inputs, params, context):
    frames, unit = params["grid_thw"][0], params["merge"] ** 2
    query, key = (inputs[name].float().unflatten(0, (frames, -1)) for name in ("query", "key"))
    return {"attention": frame_attention(query, key, unit)}


def _item(features: Tensor, inputs: dict[str, Tensor], params: dict[str, Any]) -> VisualItem:
    """A video in the newline layout of the case's variant."""
    if params["variant"] == "llava_video":
        return video_item(features, inputs["newline"].float(), "grid", "spatial_unpad")
    frames, per_frame, _ = features.shape
    positions = torch.arange(frames * per_frame).view(frames, per_frame)
    return VisualItem(modality="video", features=features, positions=positions, length=frames * per_frame)


def e2e(inputs, params, context):
    """The whole model, loaded without the tokenizer's vocabulary cut, as the official run did."""
    folder = context.checkpoint(params["checkpoint"])
    config = load_config(LlavaQwenForCausalLM.config_class, folder)
    for key, value in params["config_overrides"].items():
        setattr(config, key, value)
    model = LlavaQwenForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    factor = params["upsample"]
    frames = inputs["frames_small"].float().repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    ids = inputs["input_ids"][None]
    method = accelerate_methods.get("fastvid", **{k: params[k] for k in _HYPER_PARAMETERS if k in params})
    with accelerate_methods.accelerate(model, method):
        item = model.visual_items([frames], ["video"])[0]
        spliced = model.prepare_multimodal(ids, None, None, [frames], params["modalities"])
        logits = model(input_ids=ids, images=[frames], modalities=params["modalities"]).logits
        generated = model.generate(
            ids,
            images=[frames],
            modalities=params["modalities"],
            do_sample=False,
            max_new_tokens=params["max_new_tokens"],
            eos_token_id=None,
            pad_token_id=0,
        )
    return {
        "positions": spliced.position_ids[0],
        "llm_input": spliced.inputs_embeds[0, :: params["llm_input_stride"]],
        "logits": logits[0, -1],
        "generated": generated[0],
        "global_features": item.signals["frame_features"],
        "attention": item.signals["pooling_attention"],
    }


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
