"""StreamingLLM: what is evicted, attention over places in the cache, and a text-only decoder through score and chat."""

from __future__ import annotations

import contextlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from accelerate_methods.engine.cache import keep_on
from accelerate_methods.engine.cache_state import CacheState, LayerCache
from accelerate_methods.engine.eviction import Evictions, remaining
from accelerate_methods.engine.layers import DecoderLayers, LayerInput, rotated
from accelerate_methods.engine.loop import run_decoder
from accelerate_methods.engine.recording import RequestRecord
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.stages.decode import EvictMethod, EvictStep, Kept
from accelerate_methods.streamingllm import StreamingLLM


def _method(params: dict[str, Any], **more: Any) -> StreamingLLM:
    own = {key: params[key] for key in ("start_size", "recent_size", "pos_shift", "policy") if key in params}
    return StreamingLLM(**own, **more)


def _step(when: str, call: str, entries: int, coming: int = 0) -> EvictStep:
    return EvictStep(when, call, [0], entries, torch.zeros(1, entries, dtype=torch.bool), coming=coming)


def _cut(inputs: dict[str, Tensor], kept: Kept | None) -> dict[str, Tensor]:
    if kept is None:
        return inputs | {"kept": torch.arange(inputs["keys"].shape[-2])}
    cut = {name: remaining(inputs[name].flatten(0, -4), kept) for name in ("keys", "values")}
    return {name: part.view(*inputs[name].shape[:-2], *part.shape[-2:]) for name, part in cut.items()} | {
        "kept": kept.indices
    }


def evict(inputs, params, context):
    entries, mode = inputs["keys"].shape[-2], params["mode"]
    if mode == "range":
        return _cut(inputs, _step("after", "step", entries).ends(params["start"], entries - params["end"]))
    if mode == "after":
        return _cut(inputs, _method(params).evict(_step("after", "step", entries)))
    method = _method(params, policy="for_space")
    return _cut(inputs, method.evict(_step("before", "turn", entries, params["num_coming"])))


def prefill_budget(inputs, params, context):
    method = StreamingLLM(
        start_size=None, recent_size=None, budget=params["budget"], window_fraction=params["window_fraction"]
    )
    return _cut(inputs, method.evict(_step("after", "prompt", inputs["keys"].shape[-2])))


def stream(inputs, params, context):
    method, held, states, numbers = _method(params), torch.zeros(0, dtype=torch.long), [], 0
    for added, room in inputs["blocks"].tolist():
        if len(held):
            held = _after(held, method.evict(_step("before", "turn", len(held), room)))
        held = torch.cat([held, torch.arange(numbers, numbers + added)])
        numbers += added
        held = _after(held, method.evict(_step("after", "turn", len(held))))
        states.append(held)
    width = context.expected["kept"][1]
    return {
        "kept": torch.stack([nn.functional.pad(s, (0, width - len(s)), value=-1) for s in states]),
        "lengths": torch.tensor([len(s) for s in states]),
    }


def _after(held: Tensor, kept: Kept | None) -> Tensor:
    return held if kept is None else held[kept.indices]


# -- attention ---------------------------------------------------------------------------------------------------------

_FIRST, _GAP = 3, 9  # entries that are cached in front of those that go, and how many go


class _Gap(EvictMethod):
    """Drops what stands between the first entries and the others."""

    name, acts_on_text, cache_positions = "gap", True, "cache"

    def evict(self, step: EvictStep) -> Kept | None:
        if step.when == "after" or step.entries < _FIRST + _GAP:
            return None
        return step.ends(_FIRST, step.entries - _FIRST - _GAP)


def shifted_attention(inputs, params, context):
    """The cached keys stand with a gap between them, which an eviction closes."""
    layers, attention = _one_layer(inputs, params)
    past, new = params["past_length"], params["query_length"]
    cache, hidden = DynamicCache(config=layers.config), inputs["hidden"]
    positions = torch.arange(new)[None]
    if past:
        _filled(cache, layers, inputs)
        evictions = Evictions(_Gap(), layers, cache, new, None, False)
        evictions.before()
        positions = evictions.positions(hidden.device)
    rope = layers.rotary(hidden, positions)
    mask = torch.arange(past + new) <= torch.arange(past, past + new)[:, None]
    with cache.accelerate_state.used() if past else contextlib.nullcontext():
        output, _ = attention(hidden, attention_mask=mask[None, None], position_embeddings=rope, past_key_values=cache)
    keys, given = cache.layers[0].keys, LayerInput(hidden, rope, cache.layers[0].keys)
    back = layers.rotary(hidden, -torch.arange(past + new)[None] - (positions[:, :1] - past))
    return {
        "output": output,
        "attention": layers.attention(0, given, torch.arange(new), None, rotary=True, causal=True),
        "keys": rotated(keys, *back),
        "values": cache.layers[0].values,
    }


def _one_layer(inputs: dict[str, Tensor], params: dict[str, Any]) -> tuple[DecoderLayers, nn.Module]:
    width = inputs["hidden"].shape[-1]
    config = LlamaConfig(
        hidden_size=width, intermediate_size=4, num_hidden_layers=1, num_attention_heads=params["num_heads"],
        num_key_value_heads=params["num_kv_heads"], vocab_size=4,
        rope_parameters={"rope_type": "default", "rope_theta": params["rope_theta"]},
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    decoder = LlamaForCausalLM(config).eval().model
    layer = decoder.layers[0]
    layer.input_layernorm = nn.Identity()
    for name in "qkvo":
        getattr(layer.self_attn, f"{name}_proj").weight.copy_(inputs[f"{name}_weight"])
    return DecoderLayers(decoder), layer.self_attn


def _filled(cache: DynamicCache, layers: DecoderLayers, inputs: dict[str, Tensor]) -> None:
    """Put the case's keys into the cache, others between them."""

    def parted(states: Tensor) -> Tensor:
        between = torch.ones_like(states[:, :, :1]).expand(-1, -1, _GAP, -1)
        return torch.cat([states[:, :, :_FIRST], between, states[:, :, _FIRST:]], dim=2)

    keys, count = parted(inputs["past_keys"]), inputs["past_keys"].shape[2] + _GAP
    rope = layers.rotary(inputs["hidden"], torch.arange(count)[None])
    cache.update(rotated(keys, *rope), parted(inputs["past_values"]), 0)
    state = CacheState(has_visual=False, length=count, name="gap", placed="cache")
    state.layers.append(LayerCache(torch.zeros(1, count, dtype=torch.bool)))
    state.begin(cache, torch.arange(count)[None] + 1, count)
    keep_on(cache, state)


# -- a whole decoder ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _decoder(folder: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


class _Run:
    """A decoder of text under the method, called as often as one likes."""

    def __init__(self, params: dict[str, Any], context: Any, **more: Any):
        self.model = _decoder(context.checkpoint(Path(params["checkpoint"]).name))
        self.pipeline = Pipeline((_method(params, **more),))
        self.cache, self.request = DynamicCache(config=self.model.config), RequestRecord()

    def logits(self, ids: Tensor) -> Tensor:
        """[V] behind the last of ids [q]."""
        out = run_decoder(
            self.model.model, self.pipeline, inputs_embeds=self.model.model.embed_tokens(ids[None]),
            past_key_values=self.cache, use_cache=True, request=self.request,
        )  # fmt: skip
        return self.model.lm_head(out.last_hidden_state[:, -1])[0]

    @property
    def lengths(self) -> list[int]:
        """Entries after each call, the same in all layers."""
        assert all(len(set(cached)) == 1 for cached in self.request.cached)
        return [cached[0] for cached in self.request.cached]


def e2e(inputs, params, context):
    return (chat if params["scenario"] == "chat" else score)(inputs, params, context)


def score(inputs, params, context):
    run, ids = _Run(params, context), inputs["input_ids"][0]
    logits = torch.stack([run.logits(token) for token in ids[:-1, None]])
    keys = torch.cat([layer.keys for layer in run.cache.layers])
    return {
        "nll": nn.functional.cross_entropy(logits, ids[1:], reduction="none"),
        "cache_lengths": torch.tensor(run.lengths),
        "last_logits": logits[-1],
        "last_keys": _as_recorded(run, keys),
        "last_values": torch.cat([layer.values for layer in run.cache.layers]),
    }


def _as_recorded(run: _Run, keys: Tensor) -> Tensor:
    """The official cache holds keys before the rotary embedding, with the position shift off behind it, as entered."""
    if not run.pipeline.decode.pos_shift:
        return keys
    positions = run.cache.accelerate_state.next_position - torch.arange(keys.shape[2], 0, -1)
    return rotated(keys, *DecoderLayers(run.model.model).rotary(keys, -positions))


def chat(inputs, params, context):
    steps = params["max_new_tokens"]
    run, answers, logits, before = _Run(params, context, policy="for_space", reserve=steps), [], [], []
    for prompt in inputs["prompts"]:
        ids = prompt[prompt >= 0]
        said = [run.logits(ids)]
        before.append(run.lengths[-1] - len(ids))
        for _ in range(steps - 1):
            said.append(run.logits(said[-1].argmax()[None]))
        logits.append(torch.stack(said))
        answers.append(logits[-1].argmax(-1))
    return {
        "generated_ids": torch.stack(answers),
        "step_logits": torch.stack(logits),
        "length_before_prompt": torch.tensor(before),
        "length_final": torch.tensor(run.lengths[-1:]),
    }


ADAPTERS = {
    ("streamingllm", stage): adapter
    for stage, adapter in (
        ("evict", evict),
        ("stream", stream),
        ("shifted_attention", shifted_attention),
        ("prefill_budget", prefill_budget),
        ("e2e", e2e),
    )
}
