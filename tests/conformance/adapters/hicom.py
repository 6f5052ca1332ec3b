"""HICom: its two branches alone, and whole models with images, tiles and videos."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava.model.architectures import architecture_of
from llava.model.architectures.hicom.compressors import GlobalCompressor, LocalCompressor
from llava.model.architectures.hicom.grammar import Global, Local, mode_of
from llava.model.checkpoint import load_config, read_config

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


@lru_cache(maxsize=2)
def load(folder: Path, keys: tuple[tuple[str, Any], ...]) -> Any:
    """The checkpoint in float32 with ``keys`` in its config."""
    model_class = architecture_of(read_config(folder))
    config = load_config(model_class.config_class, folder)
    for key, value in keys:
        setattr(config, key, value)
    return model_class.from_pretrained(folder, config=config, dtype=torch.float32, attn_implementation="sdpa").eval()


#: of the config, where a case says something else
_KEYS = ("image_aspect_ratio", "image_grid_pinpoints", "mm_projector_type", "use_guide", "mm_newline_position")


def _pixels(inputs: dict[str, Tensor]) -> Tensor:
    repeat = 384 // inputs["coarse"].shape[-1]
    return inputs["coarse"].float().repeat_interleave(repeat, 2).repeat_interleave(repeat, 3)


@torch.no_grad()
def e2e(inputs, params, context):
    folder = context.checkpoint(params["checkpoint"])
    pinpoints = params.get("image_grid_pinpoints")
    keys = {key: params[key] for key in _KEYS if params.get(key) is not None}
    if isinstance(pinpoints, list):
        keys["image_grid_pinpoints"] = str(pinpoints)
    model, ids, pixels = load(folder, tuple(keys.items())), inputs["input_ids"], _pixels(inputs)
    tower, size = model.get_vision_tower(), params.get("image_size")
    asked = {"images": [(pixels, size, params["modal"])], "guided_input": inputs.get("guide_ids")}
    spliced = model.prepare_multimodal(ids, None, None, **asked)
    logits = model(input_ids=ids, **asked).logits[:, -1]
    generated = model.generate(ids, **asked, do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0)
    features, embeds = tower.see(pixels[:1])
    out = {
        "inputs_embeds": spliced.inputs_embeds,
        "prefill_logits": logits,
        "greedy_ids": generated,
        "frames_feature_f0_every9": features[0].flatten(0, 1)[::9],
        "n_visual": torch.tensor(spliced.spans[0][0].length),
    }
    if embeds is not None:
        words = model.get_model().mm_projector.reads_words
        guide = tower.read(inputs["guide_ids"], words)
        out["frames_embed_f0_every9"] = embeds[0].flatten(0, 1)[::9]
        out["guide_embed"] = guide if words else guide[:, 0]
    return out


ADAPTERS = {
    ("hicom", "local_compress"): local_compress,
    ("hicom", "global_compress"): global_compress,
    ("hicom", "e2e"): e2e,
}
