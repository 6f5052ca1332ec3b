"""VisPruner: which tokens of every view stay, and which of them for their attention."""

from __future__ import annotations

from accelerate_methods.ops.select import by_score
from accelerate_methods.vispruner import important_count
from tests.conformance import vocabulary
from tests.conformance.adapters import shared


def select(inputs, params, context):
    method = vocabulary.method_of(context, params)
    scores = vocabulary.signals_of(method, inputs)["cls_attention"]
    important = important_count(params["keep"], method.important_ratio)
    best = by_score(scores)[:, :important].sort(1).values
    return shared.compress(inputs, params, context) | {"important_index": best}


ADAPTERS = {("vispruner", "select"): select}
