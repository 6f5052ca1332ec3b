"""DART: counts, pivots and selection on given states, and the whole model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import accelerate_methods
from accelerate_methods import record
from accelerate_methods.dart import DART, find_pivots, key_sizes, set_order
from accelerate_methods.stages.prefill import PrefillStep
from tests.conformance import vocabulary
from tests.conformance.adapters import whole_models

#: variants of the release, by the number that they have in the counts' case
_VARIANTS = ("llava", "qwen2_5_vl", "llava_next")
#: text behind the image, where the case does not say how much: more than there are text pivots
_TAIL = 40


def _method(variant: str, value: float, total: int, images: int, texts: int) -> DART:
    """The method with the budget of a variant: ``value`` for ``total`` visual tokens."""
    if variant == "qwen2_5_vl":
        budget: dict[str, Any] = {"reduction_ratio": value}
    else:  # a budget of all tokens is divided all the same in the release for LLaVA-NeXT; ours then drops nothing
        budget = {"max_num": int(min(value, total - images) if variant == "llava_next" else value)}
    return accelerate_methods.get("dart", pivot_image_token=images, pivot_text_token=texts, **budget)


def keep_count(inputs, params, context):
    names = ("image_len", "variant", "value", "pivot_image", "pivot_text")
    plans = [
        _method(_VARIANTS[variant], value, length, images, texts).plan(length, 1, _TAIL)
        for length, variant, value, images, texts in zip(*(inputs[name].tolist() for name in names), strict=True)
    ]
    return {
        "tokens_per_pivot": torch.tensor([takes[-1] for _, takes in plans]),
        "kept": torch.tensor([images + sum(takes) for images, takes in plans]),
    }


class _Recorded(vocabulary.RecordedStep, PrefillStep):
    """The step before layer K."""

    def __init__(self, inputs: dict[str, Tensor], params: dict[str, Any]):
        hidden = inputs["hidden_normed"]
        super().__init__(hidden, params["image_start"], params["image_len"], torch.zeros(1, len(hidden)))
        self.cuts, self.memory, self._keys = 0, {}, inputs["keys"][None]

    def keys(self, **kwargs: Any) -> Tensor:
        return self._keys

    def final_normed(self) -> Tensor:
        return self.hidden_states

    def tails(self) -> list[int]:
        return [self.block.shape[1] - self.spans[0][0].end]


def _pivots(step: Any, method: DART) -> dict[str, Tensor]:
    visual = step.block[0]
    images, takes = method.plan(int(visual.sum()), 1, step.tails()[0])
    pivots = find_pivots(key_sizes(step.keys())[0], visual, images, step.tails()[0], len(takes) - images)
    return {"image_pivots": pivots[0], "text_pivots": pivots[1], "pivot_order": set_order(torch.cat(pivots))}


def select(inputs, params, context):
    value = next(params[name] for name in ("max_num", "retain_next", "reduction_ratio") if name in params)
    pivots = params["pivot_image_token"], params["pivot_text_token"]
    method = _method(params["variant"], value, params["image_len"], *pivots)
    step = _Recorded(inputs, params)
    kept = vocabulary.rows_that_go_on(step, method.prefill(step))
    return {"index": kept[step.visual[0, kept]], **_pivots(step, method)}


class _Watched(DART):
    """Remembers the pivots and which rows go on."""

    def prefill(self, step):
        selection = super().prefill(step)
        self.seen.update(_pivots(step, self), keep=selection.indices[0])
        return selection


def e2e(inputs, params, context):
    method = _Watched(
        k=params["layer_k"], max_num=params["max_num"], pivot_image_token=params["pivot_image_token"],
        pivot_text_token=params["pivot_text_token"],
    )  # fmt: skip
    object.__setattr__(method, "seen", {})
    question, positions = whole_models.ask(inputs, params, context, method=method), []
    model = question.model
    hook = model.model.rotary_emb.register_forward_hook(lambda module, args, out: positions.append(args[1]))
    with record() as requests:
        out = whole_models.answered(question)
    hook.remove()
    decoded = torch.cat([at.flatten() for at in positions if at.shape[-1] == 1])
    return {
        **out,
        **method.seen,
        "tokens_per_layer": torch.tensor(requests[0].layer_lengths(0)),
        "decode_positions": decoded,
    }


ADAPTERS = {
    ("dart", "keep_count"): keep_count,
    ("dart", "select"): select,
    ("dart", "e2e"): e2e,
}
