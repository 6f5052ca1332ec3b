"""EarlyTom: groups of frames, one merge, the choice in each frame, one merge in the LLM, a tower and whole models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import accelerate_methods
from accelerate_methods.earlytom import ATTENTION, EarlyTom, frame_groups, frame_products, frame_similarity
from accelerate_methods.engine.sequences import assemble
from accelerate_methods.hosts.layouts import video_item
from accelerate_methods.stages.frames import FrameMap, FrameStep, mixed
from tests.conformance import vocabulary
from tests.conformance.adapters import whole_models
from tests.conformance.adapters.holitom import llm_merge

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


class _Watched(EarlyTom):
    """Remembers which rows went on in the LLM."""

    def prefill(self, step):
        selection = super().prefill(step)
        object.__setattr__(self, "kept", selection.indices[0])
        return selection


def e2e(inputs, params, context):
    own = vocabulary.parameters_of("earlytom", params)
    if params["inner_k"] is None:
        own["inner"] = False
    else:  # as released, layer k - 1 looks ahead
        own |= {"k": params["inner_k"], "r": params["inner_r"], "causal_score_layer": False}
    method = _Watched(**own)
    question = whole_models.ask(inputs, params, context, method=method)
    model = question.model
    with accelerate_methods.accelerate(model, method):
        (item,) = question.items()
        out = whole_models.answer(question)
        with accelerate_methods.record() as requests:
            generated = model.generate(
                question.ids, **question.media, do_sample=False, max_new_tokens=question.steps, eos_token_id=None,
                pad_token_id=0, return_dict_in_generate=True,
            )  # fmt: skip
    compressed = method.compress(item)
    info, cache = compressed.info, generated.past_key_values
    more = {"llm_keep": method.kept} if method.inner else {}
    return {
        **out,
        **more,
        "index": compressed.positions,
        "attention": item.signals[ATTENTION],
        "groups": torch.tensor(info["groups"]),
        "ratio": torch.tensor([info["ratio"]], dtype=torch.float64),
        "tokens_per_layer": torch.tensor(requests[0].layer_lengths(0)),
        "kv_len_end": torch.tensor([cache.get_seq_length(n) for n in range(model.config.num_hidden_layers)]),
    }


ADAPTERS = {
    ("earlytom", "segment"): segment,
    ("earlytom", "compress_frames"): compress_frames,
    ("earlytom", "spatial_select"): spatial_select,
    ("earlytom", "llm_merge"): llm_merge,
    ("earlytom", "tower"): tower,
    ("earlytom", "e2e"): e2e,
}
