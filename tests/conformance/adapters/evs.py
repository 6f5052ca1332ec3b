"""EVS: how many tokens stay, which do, and vLLM's position ids."""

from __future__ import annotations

import torch

from accelerate_methods.evs import EVS, vllm_media_positions, vllm_positions
from accelerate_methods.stages.shapes import ItemShape
from tests.conformance.adapters import shared


def _merged(params):
    frames, rows, columns = params["grid_thw"]
    return frames, rows // params["merge"], columns // params["merge"]


def count(inputs, params, context):
    cases = zip(*(inputs[name].tolist() for name in ("num_frames", "tokens_per_frame", "pruning_rate")), strict=True)
    return {"count": torch.tensor([EVS(pruning_rate=q).count(ItemShape(frames, each)) for frames, each, q in cases])}


def retention_mask(inputs, params, context):
    assert inputs["features"].shape[1] == _merged(params)[1] * _merged(params)[2]
    out = shared.compress(inputs, params, context)
    return {**out, "mask": out["mask"].bool()}


def mrope_media(inputs, params, context):
    return {"positions": vllm_media_positions(_merged(params), params["tokens_per_second"] * params["second_per_grid"])}


def mrope_recompute(inputs, params, context):
    media = [inputs[f"media{number}"] for number in range(params["num_media"])]
    positions, delta = vllm_positions(inputs["input_ids"], media, params["vision_start"])
    return {"positions": positions, "delta": torch.tensor([delta])}


ADAPTERS = {
    ("evs", "count"): count,
    ("evs", "retention_mask"): retention_mask,
    ("evs", "mrope_media"): mrope_media,
    ("evs", "mrope_recompute"): mrope_recompute,
}
