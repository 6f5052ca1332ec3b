"""PruMerge+: as PruMerge, and the form with a budget for an encoder without a CLS token."""

from __future__ import annotations

from accelerate_methods.ops.neighbours import fold_into
from accelerate_methods.prumerge_plus import budgeted_choice
from tests.conformance.adapters import prumerge


def siglip_budget(inputs, params, context):
    """The benchmark's budget counts the chosen tokens; the one for the rest comes on top."""
    keys, features = inputs["keys"], inputs["features"]
    scores = (inputs["q"] @ keys.mT * keys.shape[2] ** -0.5).softmax(-1).mean(1)
    chosen = budgeted_choice(scores, max(int(params["budget"] * scores.shape[1]), 1))
    folded = fold_into(features, keys, scores, chosen)
    return {"received_attn": scores, "idx": chosen, "tokens": folded.tokens}


ADAPTERS = {
    ("prumerge_plus", "compress"): prumerge.compress,
    ("prumerge_plus", "siglip_budget"): siglip_budget,
    ("prumerge_plus", "e2e"): prumerge.e2e,
}
