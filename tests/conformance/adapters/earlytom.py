"""EarlyTom: groups of frames, one merge, the choice in each frame, one merge in the LLM, a tower and whole models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accelerate_methods.earlytom import ATTENTION, EarlyTom, frame_groups, frame_products, frame_similarity
from accelerate_methods.engine.sequences import assemble
from accelerate_methods.hosts.layouts import video_item
from accelerate_methods.stages.frames import FrameMap, FrameStep, mixed
from tests.conformance import vocabulary
from tests.conformance.adapters import whole_models
from tests.conformance.adapters.holitom import answered, llm_merge

PARAMETERS = {"retain_ratio": "retention_ratio", "prune_layers": "layers", "prune_ratio_r": "r"}


def segment(inputs, params, context):
    similar = frame_similarity(frame_products(inputs["features"].float())).tolist()
    return {"groups": torch.tensor(frame_groups(similar, params["tau"], params["max_window"], params["ema"]))}


def compress_frames(inputs, params, context):
    features, attention = inputs["features"].float(), inputs["attention"].float()
    method = vocabulary.method_of(context, params, layers=(0,))
    received = attention if attention.dim() == 2 else attention.mean((1, 2))
    step = FrameStep(0, 1, features, 0, lambda: received)
    merge = method.encode_frames(step)
    groups = merge.info["groups"]
    if not params["last_layer"]:
        similar = frame_similarity(frame_products(features)).tolist()
        groups = frame_groups(similar, method.tau, method.max_window, method.ema)
    return {
        "features": mixed(features, merge.mixing),
        "attention": mixed(attention, merge.mixing),
        "mixing": merge.mixing,
        "groups": torch.tensor(groups),
    }


def spatial_select(inputs, params, context):
    features, attention = inputs["features"].float(), inputs["attention"].float()
    grid = params["newline"] == "grid_official"
    newline = inputs["newline"].float() if grid else features.new_zeros(features.shape[-1])
    own = {"grid_newlines": "as_released"} if grid else {}
    method = vocabulary.method_of(context, params | {"newline": None}, **own)
    item = video_item(features, newline, "grid" if grid else "one_token", "spatial_unpad")
    groups = [tuple(group) for group in inputs["groups"].tolist()]
    # which frames have gone into which does not matter here, but how many there were
    item.frames = FrameMap(torch.ones(len(features), params["initial_frames"]), {"groups": groups})
    item.signals = {ATTENTION: attention}
    compressed = method.compress(item)
    sequence = assemble(item, compressed)
    index = torch.full((item.length,), -1)
    index[item.positions.flatten()] = torch.arange(item.num_tokens)
    count = len(sequence.tokens) - (not grid)  # the case leaves out the newline at the end
    return {
        "tokens": sequence.tokens[:count],
        "index": index[sequence.positions[:count]],
        "ratio": torch.tensor([compressed.info["ratio"]], dtype=torch.float64),
    }


def _enlarged(inputs: dict[str, Tensor], params: dict[str, Any]) -> Tensor:
    factor = params["upsample"]
    return inputs["frames_small"].float().repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def tower(inputs, params, context):
    vision, counts = whole_models.load_tiny(params, context).get_vision_tower(), []
    layers = vision.vision_tower.encoder.layers
    handles = [layer.mlp.register_forward_pre_hook(lambda _, args: counts.append(len(args[0]))) for layer in layers]
    frames = _enlarged(inputs, params)
    encoded = vision.look(frames, method=vocabulary.method_of(context, params), videos=[len(frames)])
    for handle in handles:
        handle.remove()
    return {
        "features": encoded.patches[:, :: params["patch_stride"]],
        "attention": encoded.carried[ATTENTION],
        "groups": torch.tensor(encoded.frames[0].info["groups"]),
        "frames_per_layer": torch.tensor(counts[: vision.num_blocks]),
    }


def e2e(inputs, params, context):
    own = vocabulary.parameters_of("earlytom", params)
    method, item, out = answered(EarlyTom, own, params["inner_k"], params["inner_r"], inputs, params, context)
    compressed = method.compress(item)
    return {
        **out,
        "index": compressed.positions,
        "attention": item.signals[ATTENTION],
        "groups": torch.tensor(compressed.info["groups"]),
        "ratio": torch.tensor([compressed.info["ratio"]], dtype=torch.float64),
    }


ADAPTERS = {
    ("earlytom", "segment"): segment,
    ("earlytom", "compress_frames"): compress_frames,
    ("earlytom", "spatial_select"): spatial_select,
    ("earlytom", "llm_merge"): llm_merge,
    ("earlytom", "tower"): tower,
    ("earlytom", "e2e"): e2e,
}
