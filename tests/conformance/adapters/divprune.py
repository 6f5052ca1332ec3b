"""DivPrune: the order of the picks, and what is left of the language model's input embeddings."""

from __future__ import annotations

import torch

from accelerate_methods.divprune import keep_count
from accelerate_methods.ops.diversity import farthest_first
from accelerate_methods.stages.compress import VisualItem
from tests.conformance import vocabulary
from tests.conformance.adapters import whole_models


def counts(inputs, params, context):
    pairs = zip(inputs["n_tokens"].tolist(), inputs["ratio"].tolist(), strict=True)
    return {"keep": torch.tensor([keep_count(total, ratio) for total, ratio in pairs])}


def _compressed(features, params, context):
    positions = torch.arange(len(features))
    item = VisualItem("image", features[None], positions[None], len(features))
    return vocabulary.method_of(context, params).compress(item)


def select(inputs, params, context):
    features = inputs["features"]
    compressed = _compressed(features, params, context)
    kept = compressed.positions
    # keeping everything is no matter of an order: then the picks are those of the function
    order = compressed.info.get("order")
    order = farthest_first(features, len(kept)) if order is None else order
    unit = torch.nn.functional.normalize(features, dim=1)
    distance = 1 - unit[order] @ unit[order].T
    nearest = [distance[step, :step].min() for step in range(1, len(order))]
    first = (1 - unit[order[0]] @ unit.T).sort().values[1]
    return {"order": order, "kept": kept, "min_dist_at_pick": torch.stack([first, *nearest])}


def compress(inputs, params, context):
    embeds, start = inputs["inputs_embeds"][0], params["v_start"]
    end = start + params["n_visual"]
    compressed = _compressed(embeds[start:end], params, context)
    rows = torch.cat([torch.arange(start), compressed.positions + start, torch.arange(end, len(embeds))])
    out = torch.cat([embeds[:start], compressed.tokens, embeds[end:]])
    return {"inputs_embeds": out[None], "keep_index": rows}


def e2e(inputs, params, context):
    question = whole_models.ask(inputs, params, context)
    out = whole_models.answered(question)
    (item,) = question.items()
    kept = question.method.compress(item).positions
    start, text = params["v_start"], inputs["input_ids"].shape[1] - 1
    rows = [torch.arange(start), kept + start, torch.arange(start, text) + item.length]
    layers = question.model.config.num_hidden_layers
    return out | {"keep_index": torch.cat(rows), "n_visual_per_layer": torch.full((layers,), len(kept))}


ADAPTERS = {
    ("divprune", "keep_count"): counts,
    ("divprune", "select"): select,
    ("divprune", "compress"): compress,
    ("divprune", "e2e"): e2e,
}
