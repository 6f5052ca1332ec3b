"""SparseVLM: raters, scores, clusters, one pruning step, and whole models of versions 1.5 and 2.0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from accelerate_methods.engine.loop import run_decoder
from accelerate_methods.engine.prompt import PromptLayout
from accelerate_methods.engine.recording import RequestRecord
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.sparsevlm import SparseVLM, _Prompt, cluster_and_merge, select_raters
from accelerate_methods.stages.prefill import VisualSpan
from tests.conformance import vocabulary
from tests.conformance.adapters import whole_models


class _Recorded(vocabulary.RecordedStep):
    """The step behind a pruning layer, whose attention of text rows on visual ones was recorded."""

    def __init__(self, inputs: dict[str, Tensor], params: dict[str, Any], layer: int):
        paid = inputs["attn_text_visual"].float()
        heads, tail, count = paid.shape
        hidden = inputs["hidden"][0] if "hidden" in inputs else torch.zeros(tail + count, 1)
        start = len(hidden) - tail - count
        weights = torch.zeros(heads, len(hidden), len(hidden))
        weights[:, -tail:, start : start + count] = paid
        super().__init__(hidden, start, count, weights, inputs.get("position_ids", [None])[0])
        self.layer, self.num_layers, self.cuts, self.memory = layer, 32, 0, {}
        self.text = ~self.block
        raters = torch.zeros(1, tail, dtype=torch.bool)
        raters[:, inputs["rater_index"]] = True
        self.memory["prompt"] = _Prompt(raters, [tail], [len(hidden) - count], [count])
        if "rope_theta" in params:
            exponent = torch.arange(0, params["head_dim"], 2).double() / params["head_dim"]
            angles = self.position_ids[..., None].double() * params["rope_theta"] ** -exponent
            angles = torch.cat([angles, angles], dim=-1)
            self.rotary = angles.cos().float(), angles.sin().float()


def _stepped(inputs: dict[str, Tensor], params: dict[str, Any], **method: Any) -> dict[str, Any]:
    sparse = _Watched(pruning_layers=(1,), **method)
    step = _Recorded(inputs, params, layer=2)
    selection = sparse.prefill(step)
    prompt, start = step.memory["prompt"], int(step.visual[0].long().argmax())
    count = int(step.visual.sum())
    kept, left = selection.indices[0], prompt.counts[0]
    stay = left if selection.hidden_states is None else sparse.stay
    rows = kept[start : start + stay]
    mask = torch.zeros(count, dtype=torch.uint8).index_fill_(0, rows - start, 1)
    states = step.hidden_states if selection.hidden_states is None else selection.hidden_states
    hidden = states[:, kept]
    positions = torch.arange(len(kept)) if selection.positions == "compact" else step.position_ids[0, kept]
    return {
        "hidden": hidden,
        "position_ids": positions[None],
        "keep_mask": mask,
        "n_visual": torch.tensor(left),
        "text_start": torch.tensor(start + left),
        "merged": hidden[0, start + stay : start + left],
        "score": sparse.scores[0, start : start + count],
        "head_index": sparse.asked,
    }


class _Watched(SparseVLM):
    """Remembers what it saw."""

    def _pruned(self, step, prompt, scores, kept):
        object.__setattr__(self, "stay", kept[0])
        heads = self.heads if self.version == "2.0" else step.num_heads
        # those that were not asked count as nothing: the mean over all is that over the asked ones, but for a factor
        object.__setattr__(self, "scores", scores * step.num_heads / min(heads, step.num_heads))
        return super()._pruned(step, prompt, scores, kept)

    def _paid(self, step, prompt):
        paid = super()._paid(step, prompt)
        total = paid.masked_fill(~step.block[:, None], 0).sum(-1)[0]
        object.__setattr__(self, "asked", total.topk(min(self.heads, len(total))).indices.sort().values)
        return paid


def select(inputs, params, context):
    start, count = params["v_start"], params["n_visual"]
    hidden = inputs["hidden"]
    visual = torch.zeros(hidden.shape[:2], dtype=torch.bool)
    visual[:, start : start + count] = True
    tail = hidden.shape[1] - start - count
    relevance, raters = select_raters(hidden, visual, torch.ones(1, tail, dtype=torch.bool))
    return {"relevance": relevance[0], "rater_index": raters[0].nonzero().squeeze(1)}


def score_and_keep(inputs, params, context):
    out = _stepped(inputs, params, budgets=(params["budget"],), tokens_per_image=None)
    return {name: out[name] for name in ("score", "keep_mask")}


def rank_adaptive_keep(inputs, params, context):
    method = {"version": "1.0", "scale": params["scale"], "bias": params["bias"], "tokens_per_image": None}
    step, count = _Recorded(inputs, params, layer=2), inputs["attn_text_visual"].shape[-1]
    paid = SparseVLM(pruning_layers=(1,), **method)._paid(step, step.memory["prompt"])
    (rank,) = step.memory["prompt"].ranks(step)
    if rank < count:
        out = _stepped(inputs, params, **method)
    else:  # nothing goes
        out = {"score": paid.mean(1)[0, step.visual[0]], "keep_mask": torch.ones(count, dtype=torch.uint8)}
    found = {"rank": torch.tensor(rank), "merge": torch.tensor(int(rank < count))}
    return {"score": out["score"], "keep_mask": out["keep_mask"], **found}


def merge(inputs, params, context):
    return {"merged": cluster_and_merge(inputs["tokens"], params["n_cluster"])[0]}


def prune_step(inputs, params, context):
    return _stepped(inputs, params, budgets=(params["budget"],), version=params["version"], tokens_per_image=None)


class _Stages(_Watched):
    """Remembers score and kept tokens of every stage."""

    def prefill(self, step):
        selection = super().prefill(step)
        if selection is not None:
            number = len(self.seen)
            block = step.block[0]
            kept = torch.zeros(block.shape, dtype=torch.uint8)
            merged = selection.indices[0] if selection.owner is None else selection.indices[0][: self._untouched(step)]
            kept[merged] = 1
            self.seen.append({f"score_s{number}": self.scores[0][block], f"keep_mask_s{number}": kept[block]})
        return selection

    def _untouched(self, step):
        """Rows in front of the merged ones."""
        return step.memory["prompt"].texts[0] - step.memory["prompt"].tails[0] + self.stay


def e2e(inputs, params, context):
    method = _Stages(
        version=params["version"], pruning_layers=params["pruning_layers"], budgets=params["budget"],
        tokens_per_image=None,
    )  # fmt: skip
    object.__setattr__(method, "seen", [])
    if "inputs_embeds" not in inputs:
        question = whole_models.ask(inputs, params, context, method=method)
        own, model, embeds = whole_models.answered(question), question.model, question.splice().inputs_embeds
    else:
        own, model, embeds = {}, _text_model(params, context), inputs["inputs_embeds"].float()
    object.__setattr__(method, "seen", [])
    request = RequestRecord()
    out = _run(model, method, embeds, params, request)
    if own and not torch.equal(own["generated_ids"], out["generated_ids"]):
        found = [part["generated_ids"].tolist() for part in (own, out)]
        raise AssertionError("generate gives {}, the loop {}".format(*found))
    visual = torch.tensor([int(n[0]) - embeds.shape[1] + params["n_visual"] for n in request.layer_tokens])
    return {**out, "n_visual_per_layer": visual, **{k: v for stage in method.seen for k, v in stage.items()}}


def _text_model(params: dict[str, Any], context: Any) -> Any:
    path = context.checkpoint(Path(params["checkpoint"]).name)
    with safe_open(path, framework="pt") as source:
        config = LlamaConfig(**json.loads(source.metadata()["config"]))
        weights = {name: source.get_tensor(name).float() for name in source.keys()}
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(weights)
    return model


def _run(model: Any, method: Any, embeds: Tensor, params: dict[str, Any], request: RequestRecord) -> dict[str, Tensor]:
    """The loop alone, with greedy decoding."""
    length, start, count = embeds.shape[1], params["v_start"], params["n_visual"]
    rows = torch.arange(length)[None]
    span = VisualSpan(start, count, "image", count)
    layout = PromptLayout((rows >= start) & (rows < start + count), [length], [[span]])
    pipeline, cache, ids = Pipeline((method,)), DynamicCache(config=model.config), []
    decoder = model.model
    out = run_decoder(
        decoder, pipeline, inputs_embeds=embeds, past_key_values=cache, use_cache=True, layout=layout, request=request
    )
    lengths = torch.tensor([cache.get_seq_length(i) for i in range(model.config.num_hidden_layers)])
    last = logits = model.lm_head(out.last_hidden_state[:, -1])
    for _ in range(params["max_new_tokens"]):
        ids.append(logits.argmax(-1))
        embedded = decoder.embed_tokens(ids[-1])[None]
        out = run_decoder(decoder, pipeline, inputs_embeds=embedded, past_key_values=cache, use_cache=True)
        logits = model.lm_head(out.last_hidden_state[:, -1])
    return {"last_logits": last[0], "generated_ids": torch.cat(ids), "kv_length_per_layer": lengths}


ADAPTERS = {
    ("sparsevlm", "select_raters"): select,
    ("sparsevlm", "score_and_keep"): score_and_keep,
    ("sparsevlm", "rank_adaptive_keep"): rank_adaptive_keep,
    ("sparsevlm", "cluster_and_merge"): merge,
    ("sparsevlm", "prune_step"): prune_step,
    ("sparsevlm", "e2e"): e2e,
}
