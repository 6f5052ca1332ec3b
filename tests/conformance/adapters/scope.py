"""SCOPE: the order of the picks and what each gains, saliency of CLIP and Qwen2.5-VL, layouts, whole models."""

from __future__ import annotations

from types import SimpleNamespace

import torch

import accelerate_methods
from accelerate_methods.engine.encoder_attention import cls_attention
from accelerate_methods.engine.sequences import assemble_views
from accelerate_methods.scope import salient_coverage
from accelerate_methods.stages.views import Views, view_selection
from tests.conformance import vocabulary
from tests.conformance.adapters import whole_models
from tests.conformance.adapters.hiprune import qwen_received
from tests.conformance.adapters.visionzip import encoder_layer


def select(inputs, params, context):
    """The selection itself: it also serves budgets at which the method would leave everything as it is."""
    features, saliency = inputs["features"].float(), inputs["saliency"]
    count, alpha, combine = params["num_tokens"], params["alpha"], params["combine"]
    order, gain = salient_coverage(features, saliency, count, alpha, combine == "add")
    index, size = order.sort(1).values, features.shape[1]
    method = accelerate_methods.get("scope", tokens_per_view=count, alpha=alpha, combine=combine, heads=1)
    side = int(size**0.5)
    views = Views(features, (side, size // side), signals={"cls_attention": saliency})
    compressed = method.compress_views(views)
    assert (count >= size) if compressed is None else torch.equal(compressed.patch, index.flatten())
    return {"order": order, "index": index, "gain": gain}


def saliency(inputs, params, context):
    layer = encoder_layer(inputs, params["heads"])
    return {"saliency": cls_attention(layer, inputs["x"].float()).sum(1)}


def budget(inputs, params, context):
    """The release keeps nothing where there are fewer tokens than crops; ours one of each."""
    pairs = zip(inputs["num_tokens"].tolist(), inputs["crops"].tolist(), strict=True)
    methods = [(accelerate_methods.get("scope", tokens_per_image=total), crops) for total, crops in pairs]
    each = torch.tensor([method.view_budget(576, crops) for method, crops in methods])
    each[inputs["num_tokens"] < inputs["crops"]] = 0
    return {"per_crop": each, "total": each * inputs["crops"]}


def anyres(inputs, params, context):
    tokens, order, side = inputs["crop_tokens"].float(), inputs["order"], params["side"]
    index = order.sort(1).values
    features = torch.zeros(len(tokens), side * side, tokens.shape[2])
    features.scatter_(1, index[:, :, None].expand_as(tokens), tokens)
    views = Views(features, (side, side), tiles=(params["grid_w"], params["grid_h"]))
    item = SimpleNamespace(newlines=None, length=len(tokens) * side * side, modality="image")
    compressed = view_selection(views, index, newlines="single")
    return {"tokens": assemble_views(item, views, compressed, lambda tokens: tokens).tokens}


def qwen_saliency(inputs, params, context):
    """Each image by itself: the release's sums are our means times what they are means of."""
    unit = params["merge"] ** 2
    received = qwen_received(inputs, unit) * unit
    return {"saliency": torch.empty_like(received).scatter_(0, inputs["window_index"], received)}


def e2e(inputs, params, context):
    model = whole_models.load_tiny(params, context)
    heads = model.get_vision_tower().config.num_attention_heads
    method = vocabulary.method_of(context, params, heads=heads)
    question = whole_models.ask(inputs, params, context, model=model, method=method)
    with accelerate_methods.accelerate(model, method):
        (views,) = [item.views for item in question.items()]
        compressed = method.compress_views(views)
        out = whole_models.answer(question)
    return out | {
        "saliency": views.signal("cls_attention") * heads,
        "order": compressed.info["order"],
        "index": compressed.patch.view(views.num_views, -1),
    }


PARAMETERS = {"num_tokens": "tokens_per_image"}
ADAPTERS = {
    ("scope", "select"): select,
    ("scope", "saliency"): saliency,
    ("scope", "budget"): budget,
    ("scope", "anyres"): anyres,
    ("scope", "qwen_saliency"): qwen_saliency,
    ("scope", "e2e"): e2e,
}
