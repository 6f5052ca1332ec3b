"""PruneVid: its steps one by one, the second stage on recorded attention, whole models (docs/methods/prunevid.md)."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import accelerate_methods
from accelerate_methods.engine.loop import run_decoder
from accelerate_methods.engine.prompt import PromptLayout
from accelerate_methods.ops.density import dpc_knn
from accelerate_methods.ops.segment import refine_runs, run_lengths
from accelerate_methods.prunevid import (
    Group,
    PruneVid,
    best_per_group,
    frame_scenes,
    group_sizes,
    question_scores,
    static_similarity,
)
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.stages.prefill import VisualSpan
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from tests.conformance import vocabulary
from tests.conformance.adapters import shared, whole_models
from tests.conformance.vocabulary import RecordedStep

PARAMETERS = {"temporal_segment_ratio": "gamma", "cluster_ratio": "beta"}
_SIZES = ("static_sizes", "dynamic_sizes", "window_sizes")


def clusters(inputs, params, context):
    x = inputs["x"].float()
    batch = x if x.dim() == 3 else x[None]
    labels = dpc_knn(batch, params["num_clusters"], params["k"])[0]
    return {"labels": labels.view(x.shape[:-1])}


def refine_segments(inputs, params, context):
    rows = [refine_runs(row) for row in inputs["labels"].tolist()]
    lengths = [run_lengths(row) for row in rows]
    most = max(map(len, lengths))
    return {
        "refined": torch.tensor(rows),
        "segment_lengths": torch.tensor([sizes + [0] * (most - len(sizes)) for sizes in lengths]),
    }


def temporal_segmentation(inputs, params, context):
    labels, scenes = frame_scenes(inputs["frames"].float(), params["temporal_segment_ratio"], params["k"])
    return {
        "labels": torch.tensor(labels),
        "refined": torch.tensor(scenes),
        "segment_lengths": torch.tensor(run_lengths(scenes)),
    }


def static_split(inputs, params, context):
    segment = inputs["segment"].float()
    similarity, means = static_similarity(segment, [segment.shape[0]])
    mask = similarity[0] > params["tau"]
    return {
        "similarity": similarity[0],
        "static_mask": mask,
        "static_tokens": means[0, mask],
        "dynamic_tokens": segment[:, ~mask],
    }


def selection_scores(inputs, params, context):
    """The case holds the states after the norm and bare projections: the attention is computed here, not by a layer."""
    hidden = inputs["hidden"].float()
    heads, dim = params["num_heads"], inputs["q_proj"].shape[0] // params["num_heads"]
    length = hidden.shape[0]
    query = (hidden @ inputs["q_proj"].float().T).view(length, heads, dim).transpose(0, 1)
    key = (hidden @ inputs["k_proj"].float().T).view(length, params["num_kv_heads"], dim).transpose(0, 1)
    key = key.repeat_interleave(heads // params["num_kv_heads"], 0)
    weights = (query @ key.transpose(1, 2) * dim**-0.5).softmax(-1)
    start, end = params["img_start"], params["img_end_inclusive"] + 1
    step = RecordedStep(hidden, start, end - start, weights)
    return {"scores": question_scores(step, [end])[0, start:end]}


def llm_select(inputs, params, context):
    """Question rows directly after the visual tokens, as the recorded weights have them."""
    weights = inputs["text_to_image"].float()
    heads, rows, visual = weights.shape
    length = visual + rows
    full = torch.zeros(heads, length, length)
    full[:, visual:, :visual] = weights
    step = RecordedStep(torch.zeros(length, 1), 0, visual, full)
    scores = question_scores(step, [visual])
    groups, start = [], 0
    for size in group_sizes({name: inputs[name].tolist() for name in _SIZES}):
        groups.append(Group(start, size, size, int(size * params["alpha"])))
        start += size
    keep = best_per_group(scores, step.visual, [groups])
    return {"scores": scores[0, :visual], "keep": keep[0, :visual].nonzero().flatten()}


# -- whole models ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Recorded(PruneVid):
    """PruneVid that notes what its second stage saw and said."""

    seen: list = dataclasses.field(default_factory=list, compare=False)

    def prefill(self, step):
        chosen = super().prefill(step)
        span = step.spans[0][0]
        rows = slice(span.start, span.start + span.num_content)
        indices = torch.arange(step.visual.shape[1])[None] if chosen is None else chosen.indices
        self.seen.append(
            {
                "keep": indices[0][step.visual[0, indices[0]]] - span.start,
                "scores": question_scores(step, [rows.stop])[0, rows],
                "position_ids_after_prune": step.position_ids[0, indices[0]],
            }
        )
        return chosen


def _recorded(params: dict[str, Any]) -> _Recorded:
    return _Recorded(**vocabulary.parameters_of("prunevid", params))


def _language_model(params: dict[str, Any], weights: dict[str, Tensor]) -> LlamaForCausalLM:
    config = LlamaConfig(**params["text_config"])
    model = LlamaForCausalLM(config).eval()
    prefix = "language_model."
    model.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    return model


def _pllava_weights(params: dict[str, Any], context: Any) -> dict[str, Tensor]:
    weights = load_file(context.checkpoint(Path(params["checkpoint"]).name))
    return {name: value.float() for name, value in weights.items()}


def e2e_llm(inputs, params, context):
    model = _language_model(params, _pllava_weights(params, context))
    embeds = inputs["inputs_embeds"].float()[None]
    length, start, count = embeds.shape[1], params["img_start"], params["num_visual"]
    info = {name: inputs[name].tolist() for name in _SIZES}
    visual = torch.zeros(1, length, dtype=torch.bool)
    visual[:, start : start + count] = True
    layout = PromptLayout(visual, [length], [[VisualSpan(start, count, "video", count, info)]])
    method = _recorded(params)
    pipeline = Pipeline((method,))
    cache, positions, generated = DynamicCache(config=model.config), [], []
    out = run_decoder(model.model, pipeline, inputs_embeds=embeds, past_key_values=cache, use_cache=True, layout=layout)
    lengths = [cache.get_seq_length(i) for i in range(model.config.num_hidden_layers)]
    logits = model.lm_head(out.last_hidden_state)[0, -1]
    first = logits
    for step in range(params["max_new_tokens"]):
        if step:
            positions.append(int(cache.accelerate_state.next_position))
            embedded = model.model.embed_tokens(generated[-1][None, None])
            out = run_decoder(model.model, pipeline, inputs_embeds=embedded, past_key_values=cache, use_cache=True)
            logits = model.lm_head(out.last_hidden_state)[0, -1]
        generated.append(logits.argmax())
    return method.seen[0] | {
        "kv_len_per_layer": torch.tensor(lengths),
        "logits_last": first,
        "decode_position_ids": torch.tensor(positions),
        "generated_ids": torch.stack(generated),
    }


def _pllava(params: dict[str, Any], context: Any) -> LlavaLlamaForCausalLM:
    """PLLaVA as a LLaVA-1.5 with video pooling: CLIP tower, two-layer projector, no newlines."""
    vision, pooling = params["vision_config"], params["pooling"]
    side = vision["image_size"] // vision["patch_size"]
    assert side == 2 * pooling[1] == 2 * pooling[2], "video_item pools by a stride of two"
    config = LlavaConfig(
        **params["text_config"], mm_hidden_size=vision["hidden_size"], mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=params["vision_feature_layer"], mm_vision_select_feature="patch",
        mm_patch_merge_type="flat", mm_spatial_pool_mode="average",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        tower = {"model_type": "clip_vision_model", **vision}
        (Path(folder) / "config.json").write_text(json.dumps(tower), encoding="utf-8")
        config.mm_vision_tower = folder
        model = LlavaLlamaForCausalLM(config).eval()
    renamed = {}
    for name, value in _pllava_weights(params, context).items():
        name = name.replace("language_model.", "").replace(
            "vision_tower.vision_model.", "model.vision_tower.vision_tower."
        )
        name = name.replace("multi_modal_projector.linear_1", "model.mm_projector.0")
        renamed[name.replace("multi_modal_projector.linear_2", "model.mm_projector.2")] = value
    model.load_state_dict(renamed)
    return model


def e2e(inputs, params, context):
    onevision = params.get("model") == "llava_onevision"
    model = (whole_models.load_whole_vocabulary if onevision else _pllava)(params, context)
    method, positions = _recorded(params), []
    question = whole_models.ask(inputs, params, context, model=model, method=method, modality="video")
    rotary = model.get_model().rotary_emb
    with accelerate_methods.accelerate(model, method):
        span = question.splice().spans[0][0]
        hook = rotary.register_forward_pre_hook(lambda module, args: positions.append(args[1]))
        try:
            out = whole_models.answer(question)
        finally:
            hook.remove()
    layers = range(model.config.num_hidden_layers)
    seen = method.seen[0]
    kept = torch.tensor([len(seen["keep"]) if i > params["selected_layer"] else span.num_content for i in layers])
    steps = [p.flatten() for p in positions if p.numel() == 1]
    return out | seen | {name: torch.tensor(span.info[name]) for name in _SIZES} | {
        "visual_tokens": out["inputs_embeds"][0, span.start : span.start + span.num_content],
        "visual_tokens_per_layer": kept,
        "decode_position_ids": torch.cat(steps),
    }  # fmt: skip


ADAPTERS = {
    ("prunevid", "dpc_knn"): clusters,
    ("prunevid", "refine_segments"): refine_segments,
    ("prunevid", "temporal_segmentation"): temporal_segmentation,
    ("prunevid", "static_split"): static_split,
    ("prunevid", "spatial_merge"): shared.compress,
    ("prunevid", "selection_scores"): selection_scores,
    ("prunevid", "llm_select"): llm_select,
    ("prunevid", "e2e_llm"): e2e_llm,
    ("prunevid", "e2e"): e2e,
}
