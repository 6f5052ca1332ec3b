"""FasterVLM: the encoder's attention, and what is left of anyres images in the official layouts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

import accelerate_methods
from accelerate_methods.engine.encoder_attention import cls_attention
from accelerate_methods.engine.sequences import VisualSequence, assemble_views
from accelerate_methods.hosts.layouts import flat_item, image_item
from accelerate_methods.ops.select import top_indices
from accelerate_methods.stages.compress import VisualItem
from accelerate_methods.stages.views import Views, view_selection
from tests.conformance import vocabulary
from tests.conformance.adapters import shared, whole_models
from tests.conformance.adapters.whole_models import load_tiny


def select(inputs, params, context):
    method = vocabulary.method_of(context, params)
    scores = vocabulary.signals_of(method, inputs)["cls_attention"]
    return shared.compress(inputs, params, context) | {"scores": scores}


def vision(inputs, params, context):
    """Layers up to the selected one, the attention recomputed from the input of the last of them."""
    config = CLIPVisionConfig(
        hidden_size=params["hidden"],
        num_attention_heads=params["heads"],
        num_hidden_layers=params["layers"],
        image_size=params["image"],
        patch_size=params["patch"],
        intermediate_size=params["intermediate"],
        hidden_act=params["act"],
        layer_norm_eps=params["ln_eps"],
    )
    model = CLIPVisionModel(config).eval()
    prefix = "w.vision_model."
    model.load_state_dict({k.removeprefix(prefix): v.float() for k, v in inputs.items() if k.startswith(prefix)})
    hidden = model.pre_layrnorm(model.embeddings(inputs["pixel_values"].float()))
    select_layer = params["select_layer"]
    last = select_layer + params["layers"] if select_layer < 0 else select_layer - 1
    for layer in model.encoder.layers[: last + 1]:
        before, hidden = hidden, layer(hidden, attention_mask=None)
    return {"features": hidden[:, 1:], "cls_attn": cls_attention(model.encoder.layers[last], before)}


def assemble(inputs, params, context):
    attention, features = inputs["cls_attn"].float(), inputs["features"].float()
    merge = "spatial_unpad" if params["merge"] == "spatial_unpad" else "spatial"
    method = accelerate_methods.get("fastervlm", tokens_per_view=params["keep"], merge=merge)
    tokens, sources, start = [], [], 0
    for index, count in enumerate(params["crops_per_image"]):
        views = Views(
            features=features[start : start + count],
            grid=(params["grid"], params["grid"]),
            tiles=tuple(params["grids_wh"][index]) if count > 1 else None,
            signals={"cls_attention": attention[start : start + count].mean(1)},
        )
        item = _layout(views, inputs.get("image_newline"), params, index)
        compressed = method.compress_views(views)
        if compressed is None:  # T = N: the contract still wants the official layout
            newlines = "checkpoint" if merge == "spatial_unpad" else "none"
            every = top_indices(views.signal("cls_attention"), views.tokens_per_view)
            compressed = view_selection(views, every, newlines)
        sequence = assemble_views(item, views, compressed, lambda t: t)
        tokens.append(sequence.tokens)
        source = _source_index(sequence, item)
        sources.append(torch.where(source >= 0, source + start * views.tokens_per_view, source))
        start += count
    return {
        "tokens": torch.cat(tokens),
        "tokens_per_image": torch.tensor([len(t) for t in tokens]),
        "source_index": torch.cat(sources),
    }


def _layout(views: Views, newline: Tensor | None, params: dict[str, Any], index: int) -> VisualItem:
    """The image's uncompressed layout; the grid is the one recorded, whatever rule chose it."""
    if params["merge"] == "flat_single":
        return flat_item(views.features, views.tokens_per_view)
    columns, rows = params["grids_wh"][index]
    config = SimpleNamespace(
        mm_patch_merge_type=params["merge"],
        image_aspect_ratio="anyres",
        image_grid_pinpoints=[[columns * params["crop_size"], rows * params["crop_size"]]],
    )
    size = tuple(params["image_sizes_wh"][index])
    newline = None if newline is None else newline.float()
    return image_item(views.features, newline, size, params["crop_size"], config)


def _source_index(sequence: VisualSequence, item: VisualItem) -> Tensor:
    """For each output row view*P + patch, -1 for newlines."""
    owner = sequence.owner.flatten()
    origin = torch.arange(len(owner)) if sequence.owner.shape[0] > 1 or item.source is None else item.source
    source = torch.full((len(sequence.tokens),), -1)
    source[owner[owner >= 0]] = origin[owner >= 0]
    return source


def e2e(inputs, params, context):
    model, named = load_tiny(params, context), params["merge"]
    merge = "spatial_unpad" if named.startswith("spatial_unpad") else "spatial"
    method = accelerate_methods.get("fastervlm", tokens_per_view=params["keep"], merge=merge)
    if named.startswith("spatial"):
        columns, rows = params["grid_wh"]
        side = model.get_vision_tower().image_size
        model.config.image_grid_pinpoints = [[columns * side, rows * side]]
        params = params | {"image_sizes": [params["image_size_wh"]]}
    question = whole_models.ask(inputs, params, context, model=model, method=method)
    with accelerate_methods.accelerate(model, method):
        scores = torch.cat([item.views.signal("cls_attention") for item in question.items()])
        out = whole_models.answer(question)
    return out | {"kept_index": top_indices(scores, params["keep"]), "scores": scores}


ADAPTERS = {
    ("fastervlm", "select"): select,
    ("fastervlm", "vision"): vision,
    ("fastervlm", "assemble"): assemble,
    ("fastervlm", "e2e"): e2e,
}
