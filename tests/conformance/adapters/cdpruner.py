"""CDPruner: relevance and diverse subsets, the text tower's rows, whole models with the recorded text tower."""

from __future__ import annotations

from pathlib import Path

import torch

import accelerate_methods
from accelerate_methods.cdpruner import diverse_tokens, scaled, similarity
from accelerate_methods.hosts.text_tower import TextTower, text_chunks
from accelerate_methods.ops.dpp import greedy_map
from tests.conformance.adapters import whole_models
from tests.support.clip_checkpoints import clip_folder, text_parts


def select(inputs, params, context):
    relevance = scaled(-similarity(inputs["image_embeds"].float(), inputs["text_embeds"].float()))
    return {
        "relevance": relevance,
        "index": diverse_tokens(inputs["features"].float(), relevance, params["num_tokens"]),
    }


def dpp_map(inputs, params, context):
    return {"index": greedy_map(inputs["kernel"].float()[None], params["num_tokens"])[0].sort().values}


def chunks(inputs, params, context):
    ids, mask, position = text_chunks(inputs["input_ids"], params["max_position_embeddings"], params["pad_id"])
    return {"input_ids": ids, "attention_mask": mask, "pool_position": position}


def e2e(inputs, params, context):
    """The recorded question is given as ids: the text tower has a tokenizer that always says these."""
    model = whole_models.load_tiny(params, context)
    if params["crops"] > 1:  # the release takes this one resolution, whatever the checkpoint says
        model.config.image_grid_pinpoints = [[672, 672]]
    text_weights = context.checkpoint(Path(params["text_weights"]).name)
    folder = str(clip_folder(context.checkpoint(params["checkpoint"]), text_weights))
    method = accelerate_methods.get("cdpruner", visual_token_num=params["num_tokens"], text_tower=folder)
    question = whole_models.ask(inputs, params, context, model=model, method=method)
    question.media["questions"] = ["as recorded"]
    config, weights = text_parts(text_weights)
    tower = TextTower.built("clip", config, weights, lambda text: inputs["text_ids"][0].tolist())
    recorded = tower.on_device(torch.device("cpu"), torch.float32)
    with accelerate_methods.accelerate(model, method):
        model.acceleration._text = recorded
        (item,) = question.items()
        patches, text = item.views.signal("image_embeds"), recorded.embed("as recorded")
        relevance = scaled(-similarity(patches, text))
        tokens = model.project(item.views.features)
        out = whole_models.answer(question)
    return out | {
        "relevance": relevance,
        "index": diverse_tokens(tokens, relevance, params["num_tokens"]),
        "image_embeds_row0": patches[:, 0],
        "text_embeds": text,
    }


ADAPTERS = {
    ("cdpruner", "select"): select,
    ("cdpruner", "dpp_map"): dpp_map,
    ("cdpruner", "text_chunks"): chunks,
    ("cdpruner", "e2e"): e2e,
}
