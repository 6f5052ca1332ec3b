"""FastV: how many stay, and the decoder loop in every variant of the official release (docs/methods/fastv.md)."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import accelerate_methods
from accelerate_methods.engine.loop import run_decoder
from accelerate_methods.engine.prompt import PromptLayout
from accelerate_methods.engine.recording import RequestRecord
from accelerate_methods.fastv import FastV, last_token_scores
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.stages.prefill import VisualSpan
from tests.conformance import vocabulary
from tests.conformance.adapters import shared, whole_models
from tests.conformance.runner import OWN_GOLDEN

_ARCHITECTURES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}


def keep_count(inputs, params, context):
    pairs = zip(inputs["image_len"].tolist(), inputs["prune_ratio_r"].tolist(), strict=True)
    return {"keep": torch.tensor([FastV(r=r).keep_count(n) for n, r in pairs])}


def select(inputs, params, context):
    step = vocabulary.prefill_step(inputs, params)
    return shared.prefill(inputs, params, context) | {"scores": last_token_scores(step)[0, step.visual[0]]}


def llm(inputs, params, context):
    """A decoder of the case's weights, driven by the loop directly."""
    if "weights_from" in params:
        inputs = _stored(params["weights_from"].split(" ")[0], context) | inputs
    model = _causal_lm(inputs, params)
    span = VisualSpan(params["image_start"], params["image_len"], "image", params["image_len"])
    return _run(model, inputs["inputs_embeds"].float()[None], span, params)


def e2e(inputs, params, context):
    """The whole model: what is spliced, the loop as in ``llm``, and the same ids from the model's own ``generate``."""
    question = whole_models.ask(inputs, params, context, method=_method(params))
    model = question.model
    with accelerate_methods.accelerate(model, question.method):
        spliced = question.splice()
        out = _run(model, spliced.inputs_embeds, spliced.spans[0][0], params)
        if params["variant"] == "drop_static_cache":
            own = whole_models.answer(question)
            if not torch.equal(own["gen_ids"], out["gen_ids"]):
                raise AssertionError(f"generate gives {own['gen_ids'].tolist()}, the loop {out['gen_ids']}")
            torch.testing.assert_close(own["gen_logits"], out["gen_logits"], atol=1e-4, rtol=1e-4)
    out["inputs_embeds"] = spliced.inputs_embeds[0]
    return out


def _method(params: dict[str, Any]) -> FastV:
    if "fastv_r" in params:
        return FastV(k=params["layer_k"], r=params["fastv_r"])
    return FastV(k=params["layer_k"], r=None, tokens_per_image=params["keep"])


def _stored(name: str, context: Any) -> dict[str, Tensor]:
    """Inputs that another file holds."""
    places = [base / context.method / name for base in (context.root, OWN_GOLDEN)]
    path = next((p for p in places if p.exists()), None)
    if path is None:
        raise FileNotFoundError(f"{name} is in none of {', '.join(str(p.parent) for p in places)}")
    return {key[3:]: value for key, value in load_file(path).items() if key.startswith("in.")}


def _causal_lm(inputs: dict[str, Tensor], params: dict[str, Any]) -> Any:
    config_class, model_class = _ARCHITECTURES[params["arch"]]
    config = config_class(
        vocab_size=params["vocab"],
        hidden_size=params["hidden_size"],
        intermediate_size=params["intermediate_size"],
        num_hidden_layers=params["num_layers"],
        num_attention_heads=params["num_heads"],
        num_key_value_heads=params["num_kv_heads"],
        rms_norm_eps=params["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": params["rope_theta"]},
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"
    model = model_class(config).eval()
    model.load_state_dict({key[2:]: value.float() for key, value in inputs.items() if key.startswith("w.")})
    return model


def _run(model: Any, embeds: Tensor, span: VisualSpan, params: dict[str, Any]) -> dict[str, Tensor]:
    """Greedy decoding of ``embeds`` [1, L, D] in the case's variant."""
    variant, pipeline = params["variant"], Pipeline((_method(params),))
    if variant == "drop_static_cache":
        return _with_cache(model, pipeline, embeds, span, params["new_tokens"])
    if variant == "drop_rerank_nocache":
        return _without_cache(model, pipeline, embeds, span, params["new_tokens"])
    raise NotImplementedError(
        f"fastv variant {variant}: the loop drops tokens at prefill and has no keys of dropped tokens to bring back"
    )


def _layout(length: int, span: VisualSpan) -> PromptLayout:
    rows = torch.arange(length)[None]
    return PromptLayout((rows >= span.start) & (rows < span.end), [length], [[span]])


def _prefill(model: Any, pipeline: Pipeline, embeds: Tensor, span: VisualSpan, cache: DynamicCache | None) -> Any:
    """The loop's output for a prompt, its logits [1, V], the rows that the last layer had, and tokens per layer."""
    request = RequestRecord()
    out = run_decoder(
        model.model,
        pipeline,
        inputs_embeds=embeds,
        past_key_values=cache,
        use_cache=cache is not None,
        layout=_layout(embeds.shape[1], span),
        request=request,
    )
    kept = torch.arange(embeds.shape[1]) if out.kept is None else out.kept[0]
    tokens = torch.tensor([int(lengths[0]) for lengths in request.layer_tokens])
    return out, model.lm_head(out.last_hidden_state[:, -1]), kept, tokens


def _lengths(cache: DynamicCache, layers: int) -> Tensor:
    return torch.tensor([cache.get_seq_length(i) for i in range(layers)])


def _with_cache(model: Any, pipeline: Pipeline, embeds: Tensor, span: VisualSpan, steps: int) -> dict[str, Tensor]:
    cache, layers = DynamicCache(config=model.config), len(model.model.layers)
    out, first, kept, tokens = _prefill(model, pipeline, embeds, span, cache)
    at_prefill, logits = _lengths(cache, layers), [first]
    for _ in range(steps - 1):
        newest = model.model.embed_tokens(logits[-1].argmax(-1))[None]
        step = run_decoder(model.model, pipeline, inputs_embeds=newest, past_key_values=cache, use_cache=True)
        logits.append(model.lm_head(step.last_hidden_state[:, -1]))
    return {
        "kept_index": kept,
        "prefill_logits": first[0],
        "gen_ids": torch.cat(logits).argmax(-1),
        "gen_logits": torch.cat(logits),
        "hidden": out.last_hidden_state[0],
        "tokens_per_layer": tokens,
        "kv_len_prefill": at_prefill,
        "kv_len_end": _lengths(cache, layers),
    }


def _without_cache(model: Any, pipeline: Pipeline, embeds: Tensor, span: VisualSpan, steps: int) -> dict[str, Tensor]:
    """Every step runs the whole sequence and drops tokens by the row of the newest one."""
    runs = []
    for _ in range(steps):
        runs.append(_prefill(model, pipeline, embeds, span, None))
        embeds = torch.cat([embeds, model.model.embed_tokens(runs[-1][1].argmax(-1))[None]], 1)
    out, first, kept, tokens = runs[0]
    logits = torch.cat([run[1] for run in runs])
    images = [run[2][(run[2] >= span.start) & (run[2] < span.end)] for run in runs]
    return {
        "kept_index": kept,
        "prefill_logits": first[0],
        "gen_ids": logits.argmax(-1),
        "gen_logits": logits,
        "hidden": out.last_hidden_state[0],
        "tokens_per_layer": tokens,
        "kept_image_per_step": torch.stack(images),
    }


ADAPTERS = {
    ("fastv", "keep_count"): keep_count,
    ("fastv", "select"): select,
    ("fastv", "llm"): llm,
    ("fastv", "e2e"): e2e,
}
