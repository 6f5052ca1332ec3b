"""Adapters for DyCoke's contracts (specs/dycoke.md section 9)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import accelerate_methods
from accelerate_methods.dycoke import DyCoke
from accelerate_methods.engine.sequences import assemble
from accelerate_methods.stages.compress import VisualItem
from llava.model.checkpoint import load_config
from llava.model.language_model.llava_qwen import LlavaQwenForCausalLM

_NAMES = {"merging_ratio": "k", "prune_ratio": "p", "layer": "l", "similarity_threshold": "threshold"}


def _method(params: dict[str, Any], **fixed: Any) -> DyCoke:
    given = {ours: params[theirs] for theirs, ours in _NAMES.items() if params.get(theirs) is not None}
    return accelerate_methods.get("dycoke", **given, **fixed)


def ttm(inputs, params, context):
    features = inputs["features"].float().view(params["num_frames"], params["tokens_per_frame"], -1)
    index = torch.arange(features.shape[0] * features.shape[1])
    item = VisualItem("video", features, index.view(features.shape[:2]), len(index))
    compressed = _method(params).compress(item)
    sequence = assemble(item, compressed)
    return {
        "indices": sequence.positions,
        "tokens": sequence.tokens,
        "tokens_per_frame": torch.tensor(compressed.info["tokens_per_frame"]),
    }


def dp(inputs, params, context):
    method, memory = _method(params), {}
    attention, first, steps = inputs["attention"].float(), params["first_kv_length"], params["num_steps"]
    start = params["visual_start"]
    visual = torch.zeros(1, attention.shape[-1], dtype=torch.bool)
    visual[:, start : start + params["visual_length"] + 1] = True  # the last visual token is not part of B
    masks, similarity = [], []
    for t in range(steps):
        row = attention[t, :, : first + t]
        step = SimpleNamespace(
            visual=visual[:, : first + t], valid=None, memory=memory, attention=lambda row=row: row[None]
        )
        masks.append(_keep(method.decode(step), first + t))
        similarity.append(memory["dycoke.similarity"])
    return _decode_outputs(masks, similarity, attention.shape[-1], method.threshold, "")


def _keep(mask: Tensor | None, length: int) -> Tensor:
    """[S] from what decode returns for one sample."""
    return torch.ones(length, dtype=torch.bool) if mask is None else mask[0]


def _decode_outputs(
    masks: list[Tensor], similarity: list[Tensor], width: int, threshold: float, prefix: str
) -> dict[str, Tensor]:
    similar = torch.cat(similarity)
    return {
        f"{prefix}keep_mask": torch.stack([nn.functional.pad(m, (0, width - len(m))) for m in masks]),
        f"{prefix}pruned": similar < threshold,
        f"{prefix}similarity": similar,
        "num_keys": torch.stack([m.sum() for m in masks]),
    }


def e2e(inputs, params, context):
    """The whole model, loaded without the tokenizer's vocabulary cut, as the official run did."""
    folder = context.checkpoint(params["checkpoint"])
    config = load_config(LlavaQwenForCausalLM.config_class, folder)
    for key, value in (params.get("config_overrides") or {}).items():
        setattr(config, key, value)
    model = LlavaQwenForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation=params.get("attn_implementation", "sdpa")
    ).eval()
    for layer in model.model.layers:
        query = layer.self_attn.q_proj
        query.weight.mul_(params.get("query_scale", 1.0))
        query.bias.mul_(params.get("query_scale", 1.0))
    factor, modalities = params["upsample"], params.get("modalities", ["video"])
    frames = inputs["frames_lowres"].float().repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    ids, steps = inputs["input_ids"], params["max_new_tokens"]
    method = _method(params)
    stop = {} if params.get("stop_on_eos") else {"eos_token_id": None}
    with accelerate_methods.accelerate(model, method), _decisions() as decided, _key_counts(model) as keys:
        embeds = model.prepare_multimodal(ids, None, None, [frames], modalities).inputs_embeds
        prefill = model(input_ids=ids, images=[frames], modalities=modalities).logits[0, -1]
        keys.clear()
        generated = model.generate(
            ids, images=[frames], modalities=modalities, do_sample=False, max_new_tokens=steps, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True, **stop,
        )  # fmt: skip
    done, length = len(generated.logits), embeds.shape[1]
    if not decided:  # layer >= number of layers
        decided = [(None, torch.zeros(1))] * (done - 1)
    masks = [_keep(mask, length + t + 1) for t, (mask, _) in enumerate(decided)]
    decode = _decode_outputs(masks, [s for _, s in decided], length + steps - 1, method.threshold, "decode_")
    if method.l >= len(model.model.layers):
        decode["decode_pruned"] = torch.zeros(len(masks))
    return decode | {
        "inputs_embeds": embeds[0],
        "prefill_logits": prefill,
        "step_logits": torch.cat(generated.logits),
        "generated_ids": generated.sequences[0],
        "keys_per_layer": torch.tensor(keys).view(done, -1),
    }


@contextlib.contextmanager
def _decisions() -> Iterator[list[tuple[Tensor | None, Tensor]]]:
    """Collects what every decode step decided and its similarity to the step before."""
    seen: list[tuple[Tensor | None, Tensor]] = []
    original = DyCoke.decode

    def decode(self, step):
        keep = original(self, step)
        seen.append((keep, step.memory["dycoke.similarity"]))
        return keep

    with mock.patch.object(DyCoke, "decode", decode):
        yield seen


@contextlib.contextmanager
def _key_counts(model: Any) -> Iterator[list[int]]:
    """Collects how many keys the attention of every decoder layer really gets, call by call."""
    seen: list[int] = []
    inside = [False]
    original = nn.functional.scaled_dot_product_attention

    def attention(query, key, *args, **kwargs):
        if inside[0]:
            seen.append(key.shape[2])
        return original(query, key, *args, **kwargs)

    def enter(*_):
        inside[0] = True

    def leave(*_):
        inside[0] = False

    hooks = []
    for layer in model.model.layers:
        hooks.append(layer.self_attn.register_forward_pre_hook(enter))
        hooks.append(layer.self_attn.register_forward_hook(leave))
    try:
        with mock.patch.object(nn.functional, "scaled_dot_product_attention", attention):
            yield seen
    finally:
        for hook in hooks:
            hook.remove()


ADAPTERS = {("dycoke", "ttm"): ttm, ("dycoke", "dp"): dp, ("dycoke", "e2e"): e2e}
