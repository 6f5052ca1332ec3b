"""HoliTom: windows, merging around density peaks, a whole video, one merge in the LLM, and whole models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import accelerate_methods
from accelerate_methods.holitom import HoliTom, best_windows, density_merge, static_since, still_counts
from accelerate_methods.stages.prefill import PrefillStep
from tests.conformance import vocabulary
from tests.conformance.adapters import shared, whole_models

PARAMETERS = {"K": "neighbours", "retain_ratio": "retention_ratio", "prune_ratio_r": "r"}


def _said(info: dict[str, Any]) -> dict[str, Tensor]:
    return {
        "windows": torch.tensor(info["windows"]),
        "total_reduced": torch.tensor([info["total_reduced"]]),
        "adjusted_ratio": torch.tensor([info["adjusted_ratio"]], dtype=torch.float64),
    }


def static_windows(inputs, params, context):
    counts = still_counts(static_since(inputs["similarity"].float(), params["tau"]))
    windows, saved = best_windows(counts.tolist(), params["max_window_size"])
    return {"windows": torch.tensor(windows), "total_reduced": torch.tensor([saved])}


def merge(inputs, params, context):
    x = inputs["x"].float()
    sets, size, _ = x.shape
    clusters = params["num_clusters"]
    tokens, peaks, _ = density_merge(x, [clusters] * sets, params["k"], params["beta"], [size] * sets)
    return {"centers": peaks.view(sets, -1) % size, "tokens": tokens.view(sets, clusters, -1)}


def compress(inputs, params, context):
    method = vocabulary.method_of(context, params)
    item = vocabulary.item_of(method, inputs, params)
    return shared.compressed_item(method, item, context) | _said(method.compress(item).info)


class _Recorded(vocabulary.RecordedStep, PrefillStep):
    """With what the loop counts."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.memory, self.cuts = {}, 0


def llm_merge(inputs, params, context):
    hidden = inputs["hidden"].float()
    step = _Recorded(hidden, params["image_start"], params["image_len"], inputs["attn_last"].float())
    selection = vocabulary.method_of(context, params).prefill(step)
    keep = selection.indices[0]
    return {"keep": keep, "hidden": selection.hidden_states[0, keep]}


def answered(kind, own, k, r, inputs, params, context):
    """(method, its item, outputs that the methods with this merge in the LLM share) of a whole model's case.

    Args:
        kind: class of the method; own: its parameters; k, r: of the merge in the LLM, k None: without it.
    """

    class Watched(kind):
        """Remembers which rows went on in the LLM."""

        def prefill(self, step):
            selection = super().prefill(step)
            object.__setattr__(self, "kept", selection.indices[0])
            return selection

    # as released, layer k - 1 looks ahead
    inner = {"inner": False} if k is None else {"k": k, "r": r, "causal_score_layer": False}
    method = Watched(**own, **inner)
    question = whole_models.ask(inputs, params, context, method=method)
    model = question.model
    with accelerate_methods.accelerate(model, method):
        (item,) = question.items()
        out = whole_models.answer(question)
        with accelerate_methods.record() as requests:
            generated = model.generate(
                question.ids, **question.media, do_sample=False, max_new_tokens=question.steps, eos_token_id=None,
                pad_token_id=0, return_dict_in_generate=True,
            )  # fmt: skip
    cache, layers = generated.past_key_values, range(model.config.num_hidden_layers)
    out |= {"llm_keep": method.kept} if method.inner else {}
    out["tokens_per_layer"] = torch.tensor(requests[0].layer_lengths(0))
    out["kv_len_end"] = torch.tensor([cache.get_seq_length(index) for index in layers])
    return method, item, out


def e2e(inputs, params, context):
    own = vocabulary.parameters_of("holitom", params)
    method, item, out = answered(HoliTom, own, params["holitom_k"], params["holitom_r"], inputs, params, context)
    return {**out, **_said(method.compress(item).info), "attention": item.signals["received_attention"]}


ADAPTERS = {
    ("holitom", "static_windows"): static_windows,
    ("holitom", "density_merge"): merge,
    ("holitom", "compress"): compress,
    ("holitom", "llm_merge"): llm_merge,
    ("holitom", "e2e"): e2e,
}
