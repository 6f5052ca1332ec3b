"""FrameFusion: the budget, one merge call, one prune call, and whole models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import accelerate_methods
from accelerate_methods.framefusion import FrameFusion, _Sample, neighbour_similarity, pruning_ratio
from accelerate_methods.stages.prefill import RowPlaces
from tests.conformance import vocabulary
from tests.conformance.adapters import whole_models


def _method(params: dict[str, Any]) -> FrameFusion:
    names = ("cost", "similarity_lower_bound", "ratio_lower_bound", "num_layers")
    return FrameFusion(**{name: params[name] for name in names if name in params})


def ratio(inputs, params, context):
    rows = zip(inputs["sparsity"].tolist(), inputs["length"].tolist(), inputs["cost"].tolist(), strict=True)
    found = [pruning_ratio(list[:length], cost, params["num_layers"]) for list, length, cost in rows]
    return {"ratio": torch.tensor(found, dtype=torch.float64)}


class _Recorded(vocabulary.RecordedStep):
    """A call in the middle of a prompt."""

    def __init__(self, hidden: Tensor, kinds: Tensor, weights: Tensor, sample: _Sample, inside: bool):
        start = int((kinds >= 0).long().argmax())
        super().__init__(hidden, start, int((kinds >= 0).sum()), weights)
        self.kinds, self.inside, self.cuts, self.num_layers = kinds, inside, 1, 28
        sample.count, sample.real = int((kinds >= 0).sum()), len(kinds)
        self.memory = {"samples": [sample], "cuts": 1}

    def where(self) -> RowPlaces:
        item = torch.where(self.kinds >= 0, 0, -1)[None]
        return RowPlaces(item, item, self.kinds[None])


def merge_step(inputs, params, context):
    sample = _Sample(sparsity=list(params["sparsity_list"]))
    hidden, kinds = inputs["hidden"].float(), inputs["patch_type"]
    step = _Recorded(hidden, kinds, torch.zeros(1, len(hidden)), sample, False)
    selection = _method(params).prefill(step)
    keep = vocabulary.rows_that_go_on(step, selection)
    states = step.hidden_states if selection is None else selection.hidden_states
    return {
        "hidden": states[0, keep],
        "keep": keep,
        "patch_type": kinds[keep],
        "above_ratio": torch.tensor([_above(step, params)], dtype=torch.float64),
        "finish_merging": torch.tensor([not sample.merges]),
        "finish_pruning": torch.tensor([not sample.merges and not sample.prunes]),
    }


def _above(step: _Recorded, params: dict[str, Any]) -> float:
    """Share of the tokens that are similar enough to be merged."""
    similarity, _ = neighbour_similarity(step.hidden_states, step.kinds[None])
    return float((similarity >= params["similarity_lower_bound"]).sum() / (step.kinds >= 0).sum())


def prune_step(inputs, params, context):
    weights = inputs["attn_last"].float()
    length = weights.shape[1]
    count = params["image_len_original"] - (params["original_length"] - length)
    kinds = torch.full((length,), -1)
    kinds[params["image_start"] : params["image_start"] + count] = torch.arange(count)
    sample = _Sample(sparsity=list(params["sparsity_list"]), merges=False, prunes=True)
    step = _Recorded(torch.zeros(length, 1), kinds, weights, sample, True)
    keep = vocabulary.rows_that_go_on(step, _method(params).prefill(step))
    share = pruning_ratio(params["sparsity_list"], params["cost"], params["num_layers"])
    return {"keep": keep, "ratio": torch.tensor([share], dtype=torch.float64)}


class _Watched(FrameFusion):
    """Remembers the calls of a prompt."""

    def prefill(self, step):
        selection = super().prefill(step)
        (sample,) = step.memory["samples"]
        rows = step.rows if step.rows is not None else torch.arange(step.block.shape[1])[None]
        rows = rows if selection is None else rows.gather(1, selection.indices)
        if not self.calls:
            states = step.hidden_states if selection is None else selection.hidden_states
            object.__setattr__(self, "first_states", states)
        self.calls.append((rows.shape[1], not sample.merges, not sample.merges and not sample.prunes, rows[0]))
        object.__setattr__(self, "sparsity", sample.sparsity)
        return selection


def e2e(inputs, params, context):
    names = ("cost", "similarity_lower_bound", "ratio_lower_bound", "num_layers")
    method = _Watched(**{name: params[name] for name in names})
    object.__setattr__(method, "calls", [])
    question = whole_models.ask(inputs, params, context, method=method)
    out = whole_models.answered(question)
    calls = method.calls[: question.model.config.num_hidden_layers + 1]
    spliced = question.splice()
    with accelerate_methods.accelerate(question.model, method):
        generated = question.model.generate(
            question.ids, **question.media, do_sample=False, max_new_tokens=question.steps, eos_token_id=None,
            return_dict_in_generate=True,
        )  # fmt: skip
    cache, length = generated.past_key_values, spliced.inputs_embeds.shape[1]
    layers = question.model.config.num_hidden_layers
    return {
        **out,
        # the release changes what it was given in place: the recording shows it with the means of the first call
        "llm_input": method.first_states[0, :: params["llm_input_stride"]],
        "tokens_after_call": torch.tensor([call[0] for call in calls]),
        "finish_merging": torch.tensor([call[1] for call in calls]),
        "finish_pruning": torch.tensor([call[2] for call in calls]),
        "keep": calls[-1][3],
        "sparsity_list": torch.tensor(method.sparsity, dtype=torch.float64),
        "kv_len_end": torch.tensor([cache.get_seq_length(index) for index in range(layers)]),
        "decode_positions": length + torch.arange(question.steps - 1),
    }


ADAPTERS = {
    ("framefusion", "pruning_ratio"): ratio,
    ("framefusion", "merge_step"): merge_step,
    ("framefusion", "prune_step"): prune_step,
    ("framefusion", "e2e"): e2e,
}
