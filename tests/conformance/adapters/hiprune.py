"""HiPrune: scores of two encoder layers, which tokens they keep, and whole models; LLaVA and Qwen2.5-VL."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

import accelerate_methods
from accelerate_methods.engine.encoder_attention import received_attention
from accelerate_methods.engine.sequences import assemble_views
from accelerate_methods.hiprune import (
    DEEP,
    anchor_count,
    rank_of_objects,
    registers_as_released,
    with_registers,
)
from accelerate_methods.hosts.native import qwen_vl
from accelerate_methods.ops.select import by_score, mask_to_indices
from accelerate_methods.stages.views import Views, view_selection
from tests.conformance import vocabulary
from tests.conformance.adapters import whole_models
from tests.conformance.adapters.visionzip import encoder_layer


def scores(inputs, params, context):
    layer = encoder_layer(inputs, params["heads"])
    return {"score": received_attention(layer, inputs["x"].float())[:, 1:]}


def counts(inputs, params, context):
    each = inputs["retention"] // inputs["crops"]
    anchors = [anchor_count(count, alpha) for count, alpha in zip(each.tolist(), params["alpha"], strict=True)]
    return {"per_crop": each, "anchors": torch.tensor(anchors)}


def _objects(middle, count, params, grid):
    anchors = by_score(middle)[:, : anchor_count(count, params["alpha"])]
    rank = rank_of_objects(anchors, grid, inside=False)
    return anchors, rank, 5 * anchors.shape[1]


def select(inputs, params, context):
    """The selection itself: it also serves budgets at which the method would leave everything as it is."""
    middle, deep = inputs["object_score"], inputs["deep_score"]
    views, size = middle.shape
    each, grid = params["retention"] // views, (size // params["width"], params["width"])
    anchors, rank, taken = _objects(middle, each, params, grid)
    index = with_registers(deep, rank, taken, min(each, size))
    method = vocabulary.method_of(context, params)
    signals = {method.object_signal: middle, DEEP: deep}
    compressed = method.compress_views(Views(torch.zeros(views, size, 1), grid, signals=signals))
    assert (each >= size) if compressed is None else torch.equal(compressed.patch, index.flatten())
    mask = torch.zeros(views, size, dtype=torch.uint8).scatter_(1, index, 1)
    return {"index": index, "anchor": anchors, "object_mask": (rank < taken).to(torch.uint8), "mask": mask}


def assemble(inputs, params, context):
    features, mask = inputs["features"].float(), inputs["mask"].bool()
    side = params["side"]
    views = Views(features, (side, side), tiles=(params["grid_w"], params["grid_h"]))
    kept = mask_to_indices(mask, int(mask[0].sum()))
    item = SimpleNamespace(newlines=None, length=features.shape[0] * features.shape[1], modality="image")
    return {"tokens": assemble_views(item, views, view_selection(views, kept), lambda tokens: tokens).tokens}


def e2e(inputs, params, context):
    model = whole_models.load_tiny(params, context)
    question = whole_models.ask(inputs, params, context, model=model)
    method = question.method
    with accelerate_methods.accelerate(model, method):
        (views,) = [item.views for item in question.items()]
        compressed = method.compress_views(views)
        out = whole_models.answer(question)
    return out | {
        "object_score": views.signal(method.object_signal),
        "deep_score": views.signal(DEEP),
        "index": compressed.patch.view(views.num_views, -1),
        "anchor": compressed.info["anchor"],
    }


def qwen_received(inputs: dict[str, Tensor], unit: int) -> Tensor:
    """[P / unit] mean of a merge unit's rows over heads, summed over the queries of the rows' segment, in block order.

    The layer's softmax runs inside each of the recorded ``segments``.
    """
    rows = inputs["segments"].diff().tolist()
    parts = (inputs[name].float().transpose(0, 1).split(rows) for name in ("query", "key"))  # [P, H, d]
    return torch.cat([
        qwen_vl.received_attention(query[None], key[None], unit)[0] * len(query)
        for query, key in zip(*parts, strict=True)
    ])  # fmt: skip


def qwen_scores(inputs, params, context):
    received = qwen_received(inputs, params["merge"] ** 2)
    return {"score": torch.empty_like(received).scatter_(0, inputs["window_index"], received)}


def qwen_select(inputs, params, context):
    middle, deep = inputs["object_score"][None], inputs["deep_score"][None]
    count = round(params["retention_ratio"] * middle.shape[1])
    anchors, rank, taken = _objects(middle, count, params, (params["height"], params["width"]))
    return {
        "anchor": anchors[0],
        "object_index": (rank[0] < taken).nonzero().squeeze(1),
        "index_released": registers_as_released(deep, rank < taken, count)[0].nonzero().squeeze(1),
        "index_exact": with_registers(deep, rank, taken, count)[0],
    }


def e2e_qwen(inputs, params, context):
    """What enters the decoder is read where the loop is called."""
    path = str(context.checkpoint(params["checkpoint"]))
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    small = inputs["patches_small"].float().view(-1, 3, 2, 2, 2)
    pixels = small.repeat_interleave(2, 3).repeat_interleave(2, 4).flatten(1)
    ids = inputs["input_ids"][None]
    image = model.config.image_token_id
    asked = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "image_grid_thw": inputs["image_grid_thw"][None],
        "mm_token_type_ids": (ids == image).long(),
    }
    method, seen = vocabulary.method_of(context, params), {}
    with torch.no_grad(), accelerate_methods.accelerate(model, method):
        state = model.acceleration
        run, compress = state._run, state._sequence
        state._run = lambda asked, embeds, **more: seen.setdefault("run", (embeds, more)) and run(asked, embeds, **more)
        state._sequence = lambda item: seen.setdefault("item", item) and compress(item)
        logits = model(**asked).logits[0, -1]
        (embeds, more), item = seen["run"], seen["item"]
        delta = model.model.rope_deltas.view(-1)
        generated = model.generate(
            **asked, do_sample=False, max_new_tokens=params["max_new_tokens"], eos_token_id=None, pad_token_id=0
        )
        kept = method.compress(item).positions
    rows = torch.arange(ids.shape[1])
    visual = ids[0] == image
    keep = rows[~visual | torch.isin(rows, rows[visual][kept])]
    patches = item.num_tokens * model.config.vision_config.spatial_merge_size**2
    return {
        "object_score": item.signal(method.object_signal)[0] * patches,
        "deep_score": item.signal(DEEP)[0] * patches,
        "index": kept,
        "keep": keep,
        "visual_tokens": embeds[0, torch.isin(keep, rows[visual])],
        "position_ids": more["position_ids"][-3:, 0],
        "rope_delta": delta,
        "logits": logits,
        "generated": generated[0, ids.shape[1] :],
    }


PARAMETERS = {"retention": "tokens_per_image"}
ADAPTERS = {
    ("hiprune", "scores"): scores,
    ("hiprune", "counts"): counts,
    ("hiprune", "select"): select,
    ("hiprune", "assemble"): assemble,
    ("hiprune", "e2e"): e2e,
    ("hiprune", "qwen_scores"): qwen_scores,
    ("hiprune", "qwen_select"): qwen_select,
    ("hiprune", "e2e_qwen"): e2e_qwen,
}
