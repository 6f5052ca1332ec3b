"""DyCoke: the similarity that decides, and whole models with the keys that every layer sees."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import accelerate_methods
from accelerate_methods.dycoke import DyCoke
from tests.conformance import vocabulary
from tests.conformance.adapters import shared, whole_models

PARAMETERS = {"merging_ratio": "k", "prune_ratio": "p", "layer": "l", "similarity_threshold": "threshold"}


def dp(inputs, params, context):
    method, masks, similarity = vocabulary.method_of(context, params), [], []
    # the last visual token is not part of the recorded block
    for step in vocabulary.decode_steps(inputs, params | {"visual_length": params["visual_length"] + 1}):
        masks.append(method.decode(step))
        similarity.append(step.memory["dycoke.similarity"])
    return shared.visible_keys(masks, params["first_kv_length"], inputs["attention"].shape[-1]) | {
        "pruned": torch.cat(similarity) < method.threshold,
        "similarity": torch.cat(similarity),
    }


def e2e(inputs, params, context):
    model = whole_models.load_whole_vocabulary(params, context)
    for layer in model.model.layers:
        query = layer.self_attn.q_proj
        query.weight.mul_(params.get("query_scale", 1.0))
        query.bias.mul_(params.get("query_scale", 1.0))
    question = whole_models.ask(inputs, params, context, model=model)
    method, layers, steps = question.method, len(model.model.layers), question.steps
    with accelerate_methods.accelerate(model, method), _decisions() as decided, _key_counts(model) as keys:
        out = whole_models.answer(question, stop=bool(params.get("stop_on_eos")))
    done, length = len(out["step_logits"]), out["inputs_embeds"].shape[0]
    if not decided:  # layer >= number of layers
        decided = [(None, torch.zeros(1))] * (done - 1)
    similarity = torch.cat([s for _, s in decided])
    pruned = torch.zeros(len(decided)) if method.l >= layers else similarity < method.threshold
    visible = shared.visible_keys([mask for mask, _ in decided], length + 1, length + steps - 1)
    return out | {
        "decode_keep_mask": visible["keep_mask"],
        "num_keys": visible["num_keys"],
        "decode_pruned": pruned,
        "decode_similarity": similarity,
        "keys_per_layer": torch.tensor(keys).view(-1, layers)[-done:],
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


ADAPTERS = {("dycoke", "ttm"): shared.compress, ("dycoke", "dp"): dp, ("dycoke", "e2e"): e2e}
