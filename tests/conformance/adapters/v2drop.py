"""V2Drop: counts, one stage on given states, and whole models: LLaVA-1.5, and the Qwen text model with M-RoPE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

import accelerate_methods
from accelerate_methods import record
from accelerate_methods.stages.prefill import PrefillStep, VisualSpan
from accelerate_methods.v2drop import V2Drop, variation
from tests.conformance import vocabulary
from tests.conformance.adapters import whole_models


def keep_count(inputs, params, context):
    rows = zip(inputs["n_tokens"].tolist(), inputs["keep_ratio"].tolist(), strict=True)
    counts = [
        V2Drop(layer_list=(1,), keep_ratio_list=(ratio,)).keep_count(n, [VisualSpan(0, n, "image", n)], 0)
        for n, ratio in rows
    ]
    return {"keep": torch.tensor(counts)}


class _Recorded(vocabulary.RecordedStep, PrefillStep):
    """The step before a layer of the list, with what entered the layer before it."""

    def __init__(self, inputs: dict[str, Tensor], params: dict[str, Any]):
        hidden = inputs["hidden"]
        super().__init__(hidden, params["image_start"], params["image_len"], torch.zeros(1, len(hidden)))
        self.layer, self.num_layers, self.cuts, self.memory = params["layer"], params["layer"] + 1, 0, {}
        self.before = inputs["prev_hidden"][None]

    def entered(self) -> Tensor:
        return self.before


def select(inputs, params, context):
    method = V2Drop(layer_list=(params["layer"],), keep_ratio_list=(params["keep_ratio"],), metric=params["metric"])
    step = _Recorded(inputs, params)
    kept = vocabulary.rows_that_go_on(step, method.prefill(step))
    scores = variation(step.before, step.hidden_states, params["metric"])[step.visual]
    return {
        "scores": -scores if params["metric"] == "cosine" else scores,
        "keep_index": kept,
        "position_ids": inputs["position_ids"][..., kept],
        "hidden": step.hidden_states[0, kept],
    }


class _Watched(V2Drop):
    """Remembers the scores of all candidates and the visual rows of the prompt that go on, stage by stage."""

    def prefill(self, step):
        scores = variation(step.entered(), step.hidden_states)[step.block]
        selection = super().prefill(step)
        rows = selection.indices if step.rows is None else step.rows.gather(1, selection.indices)
        self.seen.append((rows[step.block.gather(1, selection.indices)], scores))
        return selection


def _watched(params: dict[str, Any], layers: int) -> _Watched:
    """The release ignores layers that the decoder lacks; ours refuses them, so they are left out here."""
    pairs = zip(params["layer_list"], params["keep_ratio_list"], strict=True)
    listed, ratios = zip(*((layer, ratio) for layer, ratio in pairs if layer < layers), strict=True)
    method = _Watched(layer_list=listed, keep_ratio_list=ratios)
    object.__setattr__(method, "seen", [])
    return method


def _asked(model: Any, decoder: Any, method: _Watched, steps: int, asked: dict[str, Any]) -> dict[str, Any]:
    """Prefill by itself, then greedy decoding; positions are those for which rotary tables are made."""
    layers, positions = decoder.config.num_hidden_layers, []
    with torch.no_grad(), accelerate_methods.accelerate(model, method):
        with record() as requests:
            prefill = model(**asked, use_cache=True)
        seen = method.seen[:]
        hook = decoder.rotary_emb.register_forward_hook(lambda module, args, out: positions.append(args[1]))
        generated = model.generate(
            **asked, do_sample=False, max_new_tokens=steps, eos_token_id=None, pad_token_id=0,
            return_dict_in_generate=True,
        )  # fmt: skip
        hook.remove()
    prompts = (prefill.past_key_values, generated.past_key_values)
    at_first, at_last = ([cache.get_seq_length(layer) for layer in range(layers)] for cache in prompts)
    decoded = torch.stack([at.flatten() for at in positions if at.shape[-1] == 1])
    return {
        "tokens_per_layer": torch.tensor(requests[0].layer_lengths(0)),
        "kv_len_prefill": torch.tensor(at_first),
        "kv_len_end": torch.tensor(at_last),
        "decode_positions": decoded.squeeze(1),
        "decode_position_ids": decoded,
        "prefill_logits": prefill.logits[0, -1],
        "gen_ids": generated.sequences[0, -steps:],
        **{f"keep_s{number}": rows for number, (rows, _) in enumerate(seen)},
        **{f"scores_s{number}": scores for number, (_, scores) in enumerate(seen)},
    }


def e2e(inputs, params, context):
    model = whole_models.load_tiny(params, context)
    method = _watched(params, model.config.num_hidden_layers)
    question = whole_models.ask(inputs, params, context, method=method, model=model)
    return _asked(model, model.model, method, question.steps, {"input_ids": question.ids, **question.media})


def e2e_qwen(inputs, params, context):
    path = str(context.checkpoint(params["checkpoint"]))
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    decoder, ids = model.model.language_model, inputs["input_ids"]
    video = params["modality"] == "video"
    token = model.config.video_token_id if video else model.config.image_token_id
    asked = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos" if video else "pixel_values": inputs["pixel_u8"].float() / 127.5 - 1,
        "video_grid_thw" if video else "image_grid_thw": inputs["grid_thw"],
        "mm_token_type_ids": (ids == token).long() * (1 + video),
    }
    if video:
        asked["second_per_grid_ts"] = torch.tensor([params["second_per_grid"]])
    method = _watched(params, decoder.config.num_hidden_layers)
    out = _asked(model, decoder, method, params["new_tokens"], asked)
    return {**out, "decode_position_ids": out["decode_position_ids"][:, -3:]}


ADAPTERS = {
    ("v2drop", "keep_count"): keep_count,
    ("v2drop", "select"): select,
    ("v2drop", "e2e"): e2e,
    ("v2drop", "e2e_qwen"): e2e_qwen,
}
