"""The LLaVA tree without a method: tower, projector, pooling, layouts, splicing, whole models, loading by name."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from accelerate_methods.engine.sequences import uncompressed
from accelerate_methods.hosts.layouts import image_item, pool_2d, video_item
from llava.model.checkpoint import CheckpointError
from llava.model.decoders import check_model_name, named_decoder, official_dispatch
from tests.conformance.adapters.whole_models import load_tiny


def pixels(inputs: dict[str, Tensor]) -> list[Tensor]:
    """[V, 3, S, S] per item from the separable encoding of the golden files."""
    out = []
    while f"pixel_rows{len(out)}" in inputs:
        rows, cols = inputs[f"pixel_rows{len(out)}"].float(), inputs[f"pixel_cols{len(out)}"].float()
        out.append(torch.einsum("vrcy,vrcx->vcyx", rows, cols) / rows.shape[1] ** 0.5 * 0.8)
    return out


def images_argument(inputs: dict[str, Tensor], form: str) -> Any:
    """The ``images`` form that a case asks for."""
    items = pixels(inputs)
    if form == "tensor4":
        return torch.cat(items)
    if form == "tensor5":
        return torch.stack(items)
    if form == "list3":
        return [view for item in items for view in item]
    return items


def vision_tower(inputs, params, context):
    tower = load_tiny(params, context).get_vision_tower()
    return {"features": tower(pixels(inputs)[0])[:, inputs["row_index"]]}


def projector(inputs, params, context):
    return {"projected": load_tiny(params, context).project(inputs["features"].float())}


def pool(inputs, params, context):
    return {"pooled": pool_2d(inputs["features"].float(), params["mode"], params["stride"])}


def video_newline(inputs, params, context):
    newline, position = inputs.get("image_newline"), params["mm_newline_position"]
    item = video_item(inputs["pooled"].float(), newline, position, params["mm_patch_merge_type"])
    return {"tokens": uncompressed(item).tokens}


def spatial_merge(inputs, params, context):
    size = tuple(inputs["image_size"].tolist())
    newline, tower_size = inputs.get("image_newline"), params["tower_image_size"]
    item = image_item(inputs["features"].float(), newline, size, tower_size, SimpleNamespace(**params))
    return {"tokens": uncompressed(item).tokens}


def prepare_multimodal(inputs, params, context):
    model = load_tiny(params, context)
    _, positions, mask, _, embeds, labels = model.prepare_inputs_labels_for_multimodal(
        inputs["input_ids"],
        inputs.get("position_ids"),
        inputs.get("attention_mask"),
        None,
        inputs.get("labels"),
        images_argument(inputs, params["images"]),
        params["modalities"],
        _sizes(inputs, params),
    )
    if (positions is None) != params.get("out_position_ids_is_none", True):
        raise AssertionError("position_ids should be None exactly when the input ones were")
    out = _embedding_outputs(embeds, inputs)
    if positions is not None:
        out["position_ids"] = positions
    if mask is not None:
        out["attention_mask"] = mask
    if labels is not None:
        out["labels"] = labels
    return out


def e2e(inputs, params, context):
    model = load_tiny(params, context)
    shared = {
        "images": images_argument(inputs, params["images"]),
        "image_sizes": _sizes(inputs, params),
        "modalities": params["modalities"],
    }
    ids = inputs["input_ids"]
    _, _, _, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, **shared)
    out = _embedding_outputs(embeds, inputs)
    out["last_logits"] = model(input_ids=ids, **shared).logits[:, -1]
    out["greedy_ids"] = model.generate(
        ids, **shared, do_sample=False, max_new_tokens=params["max_new_tokens"], eos_token_id=None, pad_token_id=0
    )
    out["num_visual_tokens"] = torch.tensor([embeds.shape[1] - int((ids >= 0).sum())])
    if "full_input_ids" in inputs:
        full = model(input_ids=inputs["full_input_ids"], labels=inputs["full_labels"], **shared)
        out["loss"] = full.loss.reshape(1)
    return out


def _embedding_outputs(embeds: Tensor, inputs: dict[str, Tensor]) -> dict[str, Any]:
    length = torch.tensor([embeds.shape[1]])
    return {"proj": embeds @ inputs["probe"], "length": length, "rows": embeds[:, inputs["row_index"]]}


def _sizes(inputs: dict[str, Tensor], params: dict[str, Any]) -> Any:
    return params.get("image_sizes") or (inputs["image_sizes"].tolist() if "image_sizes" in inputs else None)


def load_dispatch(section: list[dict[str, Any]], context: Any) -> Iterator[tuple[str, bool, str]]:
    """What the official loader does by name; and that our name check agrees wherever the official code works."""
    families = {"LlavaLlamaForCausalLM": "llama", "LlavaQwenForCausalLM": "qwen", "LlavaMistralForCausalLM": "mistral"}
    for item in section:
        got = official_dispatch(item["model_name"], item["multimodal"])
        if not item["overwrite_config"]:
            got["override_applied"] = None
        expected = {k: item[k] for k in got}
        label = f"{item['model_name']}/multimodal={item['multimodal']}/override={bool(item['overwrite_config'])}"
        yield label, got == expected, f"got {got}, expected {expected}"
        family = families.get(item["class"])
        if family is not None:
            said = named_decoder(item["model_name"])
            yield f"{label}/family", said in (None, family), f"our check reads {said}, the official class is {family}"
            other = "qwen" if family != "qwen" else "llama"
            if said is not None:
                try:
                    check_model_name(item["model_name"], other, "checkpoint")
                    refused = False
                except CheckpointError:
                    refused = True
                yield f"{label}/contradiction", refused, "a contradicting checkpoint was accepted"


ADAPTERS = {
    ("base", "vision_tower"): vision_tower,
    ("base", "projector"): projector,
    ("base", "pool_2d"): pool,
    ("base", "video_newline"): video_newline,
    ("base", "spatial_merge"): spatial_merge,
    ("base", "prepare_multimodal"): prepare_multimodal,
    ("base", "e2e"): e2e,
}
TEXT_CHECKS = {"load_dispatch": load_dispatch}
