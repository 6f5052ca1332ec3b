"""HICom: its two branches alone, and whole models with images, tiles and videos."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llava.model.architectures.hicom.compressors import GlobalCompressor, LocalCompressor
from llava.model.architectures.hicom.grammar import Global, Local, mode_of

#: heads of "fine" in cases of the local branch
HEAD_WIDTH = 16


def _filled(module: nn.Module, inputs: dict[str, Tensor]) -> nn.Module:
    weights = {name[2:]: value.float() for name, value in inputs.items() if name.startswith("w.")}
    module.load_state_dict(weights)
    return module.eval()


def _guide(inputs: dict[str, Tensor]) -> Tensor | None:
    guide = inputs.get("guide_embed")
    return None if guide is None else guide.float().view(1, -1, guide.shape[-1])


def _scale(inputs: dict[str, Tensor], params: dict[str, Any]) -> Tensor | None:
    return inputs["logit_scale"].float() if params["use_clip_scale"] else None


@torch.no_grad()
def local_compress(inputs, params, context):
    features, embeds = inputs["frames_feature"].float()[None], inputs.get("frames_embed")
    embeds = None if embeds is None else embeds.float()[None]
    shared = (features if embeds is None else embeds).shape[-1]
    setting = Local(
        params["temporal_kernel"], params["spatial_kernel"], params["adapt"] or "", mode_of(params["use_guide"])
    )
    out = inputs["w.readout.0.weight"].shape[0]
    module = _filled(LocalCompressor(setting, features.shape[-1], shared, out, HEAD_WIDTH), inputs)
    still = params["modal"] == "image"
    return {"tokens": module(features, embeds, _guide(inputs), still, _scale(inputs, params))[0]}


@torch.no_grad()
def global_compress(inputs, params, context):
    features, guide = inputs["frames_feature"].float()[None], _guide(inputs)
    adapt = params["adapt"] or ""
    setting = Global(params["num_queries"], "g" in adapt, mode_of(params["use_guide"]))
    out, text = inputs["w.readout.0.weight"].shape[0], features.shape[-1] if guide is None else guide.shape[-1]
    module = GlobalCompressor(setting, features.shape[-1], text, out, params["head_dim"])
    return {"tokens": _filled(module, inputs)(features, guide, _scale(inputs, params))[0]}


ADAPTERS = {("hicom", "local_compress"): local_compress, ("hicom", "global_compress"): global_compress}
