"""VisionZip: which tokens dominate, which are merged into which, and where they stand in every official layout."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import accelerate_methods
from accelerate_methods.engine.encoder_attention import cls_attention, encoder_signals, mean_keys, received_attention
from accelerate_methods.engine.sequences import assemble as lay_out
from accelerate_methods.engine.sequences import assemble_views
from accelerate_methods.hosts.layouts import pool_2d, video_item
from accelerate_methods.ops.select import by_score
from accelerate_methods.stages.compress import VisualItem
from accelerate_methods.stages.views import Views
from accelerate_methods.visionzip import VisionZip, Zipped, zip_tokens, zipped_views
from tests.conformance.adapters import whole_models


def encoder_layer(inputs: dict[str, Tensor], heads: int) -> SimpleNamespace:
    """An encoder layer of the case's weights, whose input is normed already."""

    def linear(name: str) -> nn.Linear:
        module = nn.Linear(inputs[f"{name}_weight"].shape[1], inputs[f"{name}_weight"].shape[0])
        module.load_state_dict({"weight": inputs[f"{name}_weight"].float(), "bias": inputs[f"{name}_bias"].float()})
        return module

    width = inputs["x"].shape[-1] // heads
    attention = SimpleNamespace(
        q_proj=linear("q"), k_proj=linear("k"), num_heads=heads, head_dim=width, scale=width**-0.5
    )
    return SimpleNamespace(layer_norm1=nn.Identity(), self_attn=attention)


def scores(inputs, params, context):
    layer, x = encoder_layer(inputs, params["heads"]), inputs["x"].float()
    signal = encoder_signals(layer, x, {"cls_attention"}, special=1)["cls_attention"]
    return {"cls_attn": cls_attention(layer, x), "keys": mean_keys(layer, x), "score": signal * params["heads"]}


def siglip_scores(inputs, params, context):
    layer, x = encoder_layer(inputs, params["heads"]), inputs["x"].float()
    return {"received_attn": received_attention(layer, x), "keys": mean_keys(layer, x)}


def compress(inputs, params, context):
    """The selection itself: it also serves budgets at which the method would leave everything as it is."""
    hidden, keys, ranking = inputs["hidden"].float(), inputs["keys"].float(), inputs["cls_attn"].float().sum(1)
    dominant = params["dominant"] - 1
    zipped = zip_tokens(hidden[:, 1:], ranking, keys[:, 1:], dominant, params["contextual"])
    cls = torch.zeros(len(hidden), 1, dtype=torch.long)
    members = (zipped.slot >= 0).scatter(1, zipped.targets, False)
    everywhere = (torch.arange(members.shape[1]) + 1).expand_as(members)
    return {
        "tokens": zipped_views(hidden[:, :1], zipped).tokens.view(len(hidden), -1, hidden.shape[-1]),
        "keep_idx": torch.cat([cls, zipped.dominant + 1], dim=1),
        "keep_idx_by_score": torch.cat([cls, by_score(ranking)[:, :dominant] + 1], dim=1),
        "target_idx": zipped.targets + 1,
        "merged_idx": everywhere[members].view(len(hidden), -1),
        "assign": zipped.slot[members].view(len(hidden), -1),
    }


def anyres_restore(inputs, params, context):
    tokens, kept = inputs["crop_tokens"].float(), inputs["keep_idx"].sort(1).values - 1
    crops, side = len(tokens), params["side"]
    dominant = kept.shape[1]
    zipped = Zipped(
        kept=tokens[:, 1:dominant],
        merged=tokens[:, dominant:],
        dominant=kept[:, 1:],
        targets=torch.zeros(crops, tokens.shape[1] - dominant, dtype=torch.long),
        slot=torch.full((crops, side * side), -1),
    )
    compressed = zipped_views(tokens[:, :1], zipped)
    # crops are the views after the base, which the case leaves out
    compressed = dataclasses.replace(compressed, view=compressed.view + 1)
    views = Views(
        features=torch.zeros(crops + 1, side * side, 1),
        grid=(side, side),
        tiles=(params["grid_w"], params["grid_h"]),
    )
    item = VisualItem("image", views.features, torch.zeros(0), 0)
    return {"tokens": assemble_views(item, views, compressed, lambda t: t).tokens}


def siglip_video(inputs, params, context):
    def pooled(values: Tensor) -> Tensor:
        return values.float() if params["pool_mode"] == "none" else pool_2d(values.float(), params["pool_mode"])

    features, position = pooled(inputs["features"]), params["newline_position"]
    newline = inputs["image_newline"].float() if "image_newline" in inputs else torch.zeros(features.shape[-1])
    item = video_item(features, newline, position, "spatial_unpad")
    item.signals = {
        "received_attention": pooled(inputs["received_attn"][..., None])[..., 0],
        "key_states": pooled(inputs["keys"]),
    }
    order = {"grid_order": params["grid_order"]} if "grid_order" in params else {}
    method = accelerate_methods.get("visionzip", dominant=params["dominant"], contextual=params["contextual"], **order)
    sequence = lay_out(item, method.compress(item))
    tokens = sequence.tokens
    if position != "grid":
        tokens = tokens[sequence.is_content].view(len(features), -1, features.shape[-1])
    zipped = _zipped(item, method)
    return {"tokens": tokens, "keep_idx": zipped.dominant, "target_idx": zipped.targets}


def _zipped(item: VisualItem, method: VisionZip) -> Zipped:
    ranking, keys = item.signal("cls_attention", "received_attention"), item.signal("key_states")
    return zip_tokens(item.features, ranking, keys, method.dominant, method.contextual)


def qwen_vl_prune(inputs, params, context):
    """Tokens of the language model's input in their original order, contextual ones at their target's place."""
    embeds, start, count = inputs["inputs_embeds"].float(), params["vision_start"], params["vision_tokens"]
    dominant = int(params["dominant_ratio"] * count)
    contextual = max(1, int(params["contextual_ratio"] * count))
    visual = embeds[:, start : start + count]
    ranking, keys = inputs["received_attn"].float()[None], inputs["keys"].float()[None]
    zipped = zip_tokens(visual, ranking, keys, dominant, contextual)
    places = torch.cat([zipped.dominant, zipped.targets], dim=1)[0]
    order = places.argsort()
    tokens = torch.cat([zipped.kept, zipped.merged], dim=1)[:, order]
    after = torch.arange(start + count, embeds.shape[1])
    kept = torch.cat([torch.arange(start), places[order] + start, after])
    out = torch.cat([embeds[:, :start], tokens, embeds[:, start + count :]], dim=1)
    return {"inputs_embeds": out, "kept_positions": kept, "n_kept": torch.tensor(len(kept))}


def e2e(inputs, params, context):
    question = whole_models.ask(inputs, params, context)
    method = question.method
    with accelerate_methods.accelerate(question.model, method):
        kept = []
        for views in (item.views for item in question.items()):
            ranking, keys = views.signal("cls_attention"), views.signal("key_states")
            zipped = zip_tokens(views.features, ranking, keys, method.dominant - 1, method.contextual)
            kept.append(nn.functional.pad(zipped.dominant + 1, (1, 0)))
        out = whole_models.answer(question)
    return out | {"keep_idx": torch.cat(kept)}


def e2e_siglip_video(inputs, params, context):
    question = whole_models.ask(inputs, params, context)
    with accelerate_methods.accelerate(question.model, question.method):
        zipped = _zipped(question.items()[0], question.method)
        out = whole_models.answer(question)
    return out | {"keep_idx": zipped.dominant, "target_idx": zipped.targets}


ADAPTERS = {
    ("visionzip", "scores"): scores,
    ("visionzip", "compress"): compress,
    ("visionzip", "anyres_restore"): anyres_restore,
    ("visionzip", "siglip_scores"): siglip_scores,
    ("visionzip", "siglip_video"): siglip_video,
    ("visionzip", "qwen_vl_prune"): qwen_vl_prune,
    ("visionzip", "e2e"): e2e,
    ("visionzip", "e2e_siglip_video"): e2e_siglip_video,
}
