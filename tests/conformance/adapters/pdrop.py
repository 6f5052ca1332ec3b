"""PyramidDrop: counts, one stage on given weights, and whole models."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import accelerate_methods
from accelerate_methods import record
from accelerate_methods.engine.loop import run_decoder
from accelerate_methods.engine.prompt import PromptLayout
from accelerate_methods.pdrop import PyramidDrop
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.stages.prefill import VisualSpan
from tests.conformance.adapters import whole_models


def keep_count(inputs, params, context):
    rows = zip(inputs["n_tokens"].tolist(), inputs["ratio"].tolist(), strict=True)
    return {
        "keep": torch.tensor([
            PyramidDrop(layer_list=(1,), image_token_ratio_list=(ratio,)).keep_count([_span(0, n)], 0)
            for n, ratio in rows
        ])
    }  # fmt: skip


def _span(start: int, length: int) -> VisualSpan:
    return VisualSpan(start, length, "image", length)


class _Midway(PyramidDrop):
    """One stage of a prompt that had more tokens before, and what goes into the layer behind it."""

    def prefill_layers(self, num_layers):
        return num_layers - 1, num_layers

    def prefill(self, step):
        if step.layer == step.num_layers:
            self.seen.update(hidden=step.hidden_states, position_ids=step.position_ids)
            return None
        full = zip(step.spans, self.seen["full"], strict=True)
        step.spans = [[dataclasses.replace(span, length=n) for span in spans] for spans, n in full]
        step.cuts = 1  # so that what is left is counted
        return super().prefill(step)


def rank_and_drop(inputs, params, context):
    """In a decoder whose layers change nothing: the last one has the weights that rank."""
    stage, hidden = params["stage"], inputs["hidden"]
    batch, length = hidden.shape[:2]
    mask = inputs.get("attention_mask", torch.ones(batch, length)).long()
    lengths = mask.sum(1).tolist()
    counts = [int(n * params["ratio_list"][stage]) for n in params["image_tokens_full"]]
    pads = [length - n for n in lengths]  # ours stand in front
    embeds, positions = (
        torch.stack([part.roll(pad, 0) for part, pad in zip(inputs[name], pads, strict=True)])
        for name in ("hidden", "position_ids")
    )
    places = zip(params["image_start"], counts, pads, strict=True)
    spans = [[_span(start + pad, count)] for start, count, pad in places]
    visual = torch.zeros(batch, length, dtype=torch.bool)
    for row, (span,) in zip(visual, spans, strict=True):
        row[span.start : span.end] = True
    method = _Midway(layer_list=tuple(range(1, stage + 2)), image_token_ratio_list=params["ratio_list"][1 : stage + 2])
    object.__setattr__(method, "seen", {"full": params["image_tokens_full"]})
    out = run_decoder(
        _idle(inputs, params, stage + 2),
        Pipeline((method,)),
        inputs_embeds=embeds,
        attention_mask=torch.stack([row.roll(pad) for row, pad in zip(mask, pads, strict=True)]),
        position_ids=positions,
        layout=PromptLayout(visual, lengths, spans),
    )
    valid = torch.ones_like(out.kept, dtype=torch.bool) if out.kept_valid is None else out.kept_valid
    real = valid.sum(1).tolist()
    longest = out.kept.shape[1]
    back = [
        {name: method.seen[name][row, longest - n :] for name in ("hidden", "position_ids")}
        for row, n in enumerate(real)
    ]
    found = {
        name: nn.utils.rnn.pad_sequence([row[name] for row in back], batch_first=True)
        for name in ("hidden", "position_ids")
    }
    kept = [rows[ok] for rows, ok in zip(out.kept, valid, strict=True)]
    images = [rows[visual[row, rows]] - pads[row] for row, rows in enumerate(kept)]
    return {
        **found,
        "n_keep": torch.tensor([len(rows) for rows in images]),
        "attention_mask": torch.stack([(torch.arange(longest) < n).to(torch.uint8) for n in real]),
        **{f"keep_index_{row}": rows for row, rows in enumerate(images)},
    }


def _idle(inputs: dict[str, Tensor], params: dict[str, Any], layers: int) -> LlamaModel:
    width = inputs["norm_weight"].shape[0]
    config = LlamaConfig(
        vocab_size=8, hidden_size=width, intermediate_size=width, num_hidden_layers=layers,
        num_attention_heads=params["num_heads"], num_key_value_heads=params["num_kv_heads"],
        rms_norm_eps=params["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": params["rope_theta"]},
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    model = LlamaModel(config).eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        layer.input_layernorm.weight.copy_(inputs["norm_weight"])
        layer.self_attn.q_proj.weight.copy_(inputs["q_weight"])
        layer.self_attn.k_proj.weight.copy_(inputs["k_weight"])
    return model


class _Watched(PyramidDrop):
    """Remembers which visual rows of the prompt each stage leaves."""

    def prefill(self, step):
        selection = super().prefill(step)
        rows = selection.indices if step.rows is None else step.rows.gather(1, selection.indices)
        visual = step.block.gather(1, selection.indices)
        self.taken.append([row[ok] for row, ok in zip(rows, visual, strict=True)])
        return selection


def e2e(inputs, params, context):
    method = _Watched(layer_list=params["layer_list"], image_token_ratio_list=params["ratio_list"])
    object.__setattr__(method, "taken", [])
    question = whole_models.ask(inputs, params, context, method=method)
    model = question.model
    with accelerate_methods.accelerate(model, method), record() as requests:
        prefill = model(input_ids=question.ids, use_cache=True, **question.media)
    stages = method.taken[:]
    out = {} if params.get("prefill_only") else whole_models.answered(question)
    (text,) = {int((row >= 0).sum()) for row in question.ids}
    cached = [prefill.past_key_values.get_seq_length(layer) for layer in range(model.config.num_hidden_layers)]
    return {
        **out,
        "last_logits": prefill.logits[:, -1],
        "kv_length_per_layer": torch.tensor(cached),
        "n_visual_per_layer": torch.tensor([n - text for n in requests[0].layer_lengths(0)]),
        **{
            f"kept_original_position_s{number}_b{row}": rows
            for number, stage in enumerate(stages)
            for row, rows in enumerate(stage)
        },
    }


ADAPTERS = {
    ("pdrop", "keep_count"): keep_count,
    ("pdrop", "rank_and_drop"): rank_and_drop,
    ("pdrop", "e2e"): e2e,
}
