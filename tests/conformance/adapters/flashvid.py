"""FlashVID: its steps one by one (docs/methods/flashvid.md), and whole models with the attention that it read."""

from __future__ import annotations

from types import SimpleNamespace

import torch

import accelerate_methods
from accelerate_methods.flashvid import FlashVID, candidates, grow_trees
from accelerate_methods.hosts.native.qwen_vl import received_attention
from accelerate_methods.ops.density import dpc_knn
from accelerate_methods.ops.select import mask_to_indices
from accelerate_methods.stages.prefill import VisualSpan
from tests.conformance import vocabulary
from tests.conformance.adapters import qwen_models, whole_models


def budget(inputs, params, context):
    columns = (inputs[name].tolist() for name in ("num_tokens", "retention_ratio", "expansion", "alpha"))
    found = [
        FlashVID(retention_ratio=ratio, expansion=expansion, alpha=alpha).budgets(count)
        for count, ratio, expansion, alpha in zip(*columns, strict=True)
    ]
    salient, merged = torch.tensor(found).unbind(1)
    return {"per_frame": salient + merged, "salient": salient, "merged": merged}


def dyseg(inputs, params, context):
    return {"segment_lengths": torch.tensor(_method(context, params).segments(inputs["frame_features"].float()))}


def adts(inputs, params, context):
    features = inputs["features"].float()
    method = FlashVID(token_selection_method=params["method"])
    mask = method.salient(features, features.mean(1), inputs["attention"], [len(features)], params["num"])
    return {"index": mask_to_indices(mask, params["num"])}


def tstm(inputs, params, context):
    features, available = inputs["features"].float(), inputs["available"]
    frames, per_frame = available.shape
    kept = int((~available).sum()) // frames
    budget = (kept, params["lower_bound"] // frames - kept)
    trees = grow_trees(features, ~available, [frames], budget, params["threshold"])
    return {"tokens": trees.values, "index": trees.roots % per_frame, "count": torch.tensor(trees.counts)}


def clusters(inputs, params, context):
    labels, centres = dpc_knn(inputs["x"].float(), params["num_clusters"], params["k"])
    return {"labels": labels, "centers": centres}


class _Recorded(vocabulary.RecordedStep):
    """A step whose visual rows are given as a mask."""

    def __init__(self, weights, visual):
        super().__init__(torch.zeros(len(visual), 1), 0, 0, weights)
        self.visual = self.block = visual[None]
        count = int(visual.sum())
        self.spans = [[VisualSpan(0, count, "video", count)]]


def llm_prune(inputs, params, context):
    step = _Recorded(inputs["attn_last"], inputs["visual_mask"])
    return {"keep": vocabulary.rows_that_go_on(step, _method(context, params).prefill(step))}


def qwen_vision_attention(inputs, params, context):
    frames, unit = params["grid_thw"][0], params["merge"] ** 2
    query, key = (inputs[name].transpose(0, 1).unflatten(0, (frames, -1)) for name in ("query", "key"))
    attention = received_attention(query, key, unit)
    if "window_index" not in inputs:
        return {"attention": attention}
    back = torch.argsort(inputs["window_index"])
    return {"attention": attention.flatten()[back].view(attention.shape)}


def _method(context, params):
    return vocabulary.method_of(context, params)


def e2e(inputs, params, context):
    question = whole_models.ask(inputs, params, context)
    method, seen = question.method, SimpleNamespace(kept=None)

    class Watched(FlashVID):
        def prefill(self, step):
            chosen = super().prefill(step)
            seen.kept, seen.visual = (None if chosen is None else chosen.indices[0]), candidates(step)[0][0]
            return chosen

    question.method = Watched(**{name: getattr(method, name) for name in method.parameters()})
    out = whole_models.answered(question)
    with accelerate_methods.accelerate(question.model, question.method):
        (item,) = question.items()
        generated = question.model.generate(
            question.ids, **question.media, do_sample=False, max_new_tokens=question.steps, eos_token_id=None,
            return_dict_in_generate=True,
        )  # fmt: skip
    positions = method.compress(item).positions
    frame = positions // item.frame_rows if item.layout == "frame" else torch.zeros_like(positions)
    cache, layers = generated.past_key_values, range(question.model.config.num_hidden_layers)
    rows = out["kv_len_prefill"]
    return out | {
        "index": (positions - frame).sort().values,
        "attention": item.signal("received_attention"),
        "llm_keep": seen.kept,
        "tokens_per_layer": rows,
        "kv_len_end": torch.tensor([cache.get_seq_length(layer) for layer in layers]),
    }


def e2e_qwen(inputs, params, context):
    out, item, _ = qwen_models.answered(inputs, params, context, _method(context, params))
    length, left = len(out["keep"]), len(out["llm_keep"])
    before = params["pruning_layer"]
    layers = len(out["kv_len_end"])
    return out | {
        "attention": item.signal("received_attention"),
        "tokens_per_layer": torch.tensor([length if layer < before else left for layer in range(layers)]),
    }


ADAPTERS = {
    ("flashvid", "budget"): budget,
    ("flashvid", "dyseg"): dyseg,
    ("flashvid", "adts"): adts,
    ("flashvid", "tstm"): tstm,
    ("flashvid", "dpc_knn"): clusters,
    ("flashvid", "llm_prune"): llm_prune,
    ("flashvid", "qwen_vision_attention"): qwen_vision_attention,
    ("flashvid", "e2e"): e2e,
    ("flashvid", "e2e_qwen"): e2e_qwen,
}
