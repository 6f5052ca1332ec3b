"""PruMerge and PruMerge+: how many outliers there are, which tokens are chosen, and what they take in."""

from __future__ import annotations

import math

import torch

import accelerate_methods
from accelerate_methods.ops.neighbours import above_whisker
from accelerate_methods.prumerge import CLS, KEYS, outlier_ratio
from accelerate_methods.stages.views import Views
from tests.conformance import vocabulary
from tests.conformance.adapters import whole_models


def ratio(inputs, params, context):
    scores = inputs["cls_attn"]
    share = outlier_ratio(scores)
    count = above_whisker(scores.flatten()).sum()
    return {"ratio": torch.tensor(share, dtype=torch.float64), "count": count,
            "n_top": torch.tensor(int(scores.shape[1] * share))}  # fmt: skip


def compress(inputs, params, context):
    """Attention from the recorded query and keys, then the method on the views."""
    keys, width = inputs["keys"], inputs["keys"].shape[2]
    scores = (inputs["q_cls"][:, None] @ keys.mT * width**-0.5).softmax(-1)[:, 0, 1:]
    side = math.isqrt(scores.shape[1])
    views = Views(inputs["features"], (side, side), signals={CLS: scores, KEYS: keys[:, 1:]})
    method = vocabulary.method_of(context, params)
    tokens = method.compress_views(views).tokens.view(len(scores), -1, width)
    return {"cls_attn": scores, "idx": method._chosen(scores, **_twice(method)), "tokens": tokens}


def _twice(method):
    return {"twice": True} if method.name == "prumerge_plus" else {}


def e2e(inputs, params, context):
    question = whole_models.ask(inputs, params, context)
    method = question.method
    with accelerate_methods.accelerate(question.model, method):
        scores = [item.views.signal(CLS) for item in question.items()]
        out = whole_models.answer(question)
    return out | {"idx": torch.cat([method._chosen(score, **_twice(method)) for score in scores])}


ADAPTERS = {
    ("prumerge", "outlier_ratio"): ratio,
    ("prumerge", "compress"): compress,
    ("prumerge", "e2e"): e2e,
}
