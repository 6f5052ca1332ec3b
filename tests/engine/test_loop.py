"""The decoder loop against transformers' own forward and against references that know no cache."""

import dataclasses

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
    StaticCache,
)

from accelerate_methods.engine.loop import run_decoder
from accelerate_methods.engine.prompt import PromptLayout
from accelerate_methods.registry.pipeline import Pipeline, resolve
from accelerate_methods.stages.decode import DecodeMethod
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.prefill import PrefillMethod, Selection, VisualSpan

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mistral_window": (MistralConfig, MistralForCausalLM, {"sliding_window": 8}),
    # other names and shapes: final_layernorm, parallel residual, half of a head rotated; one qkv_proj; per-head norms
    "phi": (PhiConfig, PhiForCausalLM, {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}),
    "phi_norms": (PhiConfig, PhiForCausalLM, {"qk_layernorm": True}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}),
    "stablelm": (StableLmConfig, StableLmForCausalLM, {"qk_layernorm": True}),
}
LAYERS, VISUAL = 4, range(3, 13)  # ten visual tokens in a prompt of 18
_models = {}


def make(kind, attention="sdpa"):
    """A tiny random model, GQA 4 heads on 2."""
    if (kind, attention) not in _models:
        config_class, model_class, extra = KINDS[kind]
        torch.manual_seed(1)
        config = config_class(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0, **extra
        )  # fmt: skip
        config._attn_implementation = attention
        _models[kind, attention] = model_class(config).eval()
    return _models[kind, attention]


def prompt(batch=1, length=18, seed=0, width=32):
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))


def layout_of(batch, length, spans=None, lengths=None, modality="image"):
    visual = torch.zeros(batch, length, dtype=torch.bool)
    spans_of = []
    for row, span in enumerate(spans or [VISUAL] * batch):
        visual[row, list(span)] = True
        spans_of.append([VisualSpan(span[0], len(span), modality, len(span))] if len(span) else [])
    return PromptLayout(visual, lengths or [length] * batch, spans_of)


def thinned(visual):
    """Every second visual token stays."""
    rank = visual.long().cumsum(1) - 1
    return ~visual | (rank % 2 == 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thin(PrefillMethod):
    name = "thin"
    layers: tuple = (2,)
    positions_rule: str = "original"
    trim: bool = False
    merge: bool = False

    def prefill_layers(self, num_layers):
        return self.layers

    def prefill(self, step):
        keep = thinned(step.visual) if step.valid is None else thinned(step.visual) & step.valid
        states = merged(step.hidden_states, step.visual) if self.merge else None
        return Selection.from_mask(keep, hidden_states=states, trim_cache=self.trim, positions=self.positions_rule)


def merged(hidden, visual):
    return torch.where(visual[..., None], (hidden + hidden.roll(-1, 1)) / 2, hidden)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThinVideo(Thin):
    modalities = frozenset({"video"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hide(DecodeMethod):
    """In step s hide every third visual key, beginning with the (s mod 3)-th; in every fourth step none."""

    name = "hide"
    layer: int = 2

    def decode_layer(self, num_layers):
        return self.layer

    def decode(self, step):
        s = step.memory["step"] = step.memory.get("step", -1) + 1
        return hidden_keys(step.visual, s)


def hidden_keys(visual, s):
    rank = visual.long().cumsum(1) - 1
    return None if s % 4 == 3 else ~(visual & (rank % 3 == s % 3))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spy(PrefillMethod):
    """Records attention rows and changes nothing."""

    name = "spy"
    layer: int = 2
    rows: tuple = (5, 17)
    seen: list = dataclasses.field(default_factory=list)
    rotary: bool = True
    causal: bool = True

    def prefill_layers(self, num_layers):
        return (self.layer,)

    def prefill(self, step):
        self.seen.append((step.attention(torch.tensor(self.rows), rotary=self.rotary, causal=self.causal), step))


def pipe(*methods):
    return Pipeline(tuple(methods))


def logits_of(model, output):
    return model.lm_head(output.last_hidden_state)


def greedy(model, pipeline, embeds, layout, steps, mask=None, positions=None):
    """Ids and logits of a cached greedy run through the loop."""
    cache, ids, logits = DynamicCache(config=model.config), [], []
    out = run_decoder(
        model.model, pipeline, inputs_embeds=embeds, attention_mask=mask, position_ids=positions,
        past_key_values=cache, use_cache=True, layout=layout,
    )  # fmt: skip
    for _ in range(steps):
        logits.append(logits_of(model, out)[:, -1])
        ids.append(logits[-1].argmax(-1))
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], 1)
        step = model.model.embed_tokens(ids[-1][:, None])
        out = run_decoder(
            model.model, pipeline, inputs_embeds=step, attention_mask=mask, past_key_values=cache, use_cache=True
        )
    return torch.stack(ids, 1), torch.stack(logits, 1), cache


def layers_run(model, hidden, positions, layers, allowed=None):
    """Run some layers without any cache; ``allowed`` [L, L] says who sees whom (default causal)."""
    decoder, length = model.model, hidden.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    allowed = causal if allowed is None else allowed & causal
    mask = torch.zeros(1, 1, length, length).masked_fill(~allowed, torch.finfo(torch.float32).min)
    rope = decoder.rotary_emb(hidden, positions)
    for layer in decoder.layers[layers]:
        out = layer(hidden, attention_mask=mask, position_embeddings=rope, past_key_values=None)
        hidden = out[0] if isinstance(out, tuple) else out
    return hidden


def thin_reference(model, embeds, visual, method, steps):
    """Greedy without cache: every step runs all layers on everything, cutting what prefill cut."""
    length, ids, logits = embeds.shape[1], [], []
    for _ in range(steps):
        hidden, alive = embeds, torch.arange(embeds.shape[1])
        positions, seen, begin = alive[None], visual, 0
        for stop in (*method.layers, LAYERS):
            allowed = None
            if method.trim:  # generated rows do not see what later layers will drop
                final, mask = torch.arange(hidden.shape[1]), seen
                for _ in [k for k in method.layers if k >= stop]:
                    keep = thinned(mask[None])[0]
                    final, mask = final[keep], mask[keep]
                allowed = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool)
                new_rows = alive >= length
                visible = torch.zeros(hidden.shape[1], dtype=torch.bool)
                visible[final] = True
                allowed[new_rows] = visible
            hidden = layers_run(model, hidden, positions, slice(begin, stop), allowed)
            if stop < LAYERS:
                keep = thinned(seen[None])[0]
                if method.merge:
                    prompt_part = merged(hidden[:, alive < length], seen[None, alive < length])
                    hidden = torch.cat([prompt_part, hidden[:, alive >= length]], 1)
                hidden, alive, seen = hidden[:, keep], alive[keep], seen[keep]
                compact = method.positions_rule == "compact"
                positions = torch.arange(len(alive))[None] if compact else positions[:, keep]
            begin = stop
        logits.append(model.lm_head(model.model.norm(hidden))[:, -1])
        ids.append(logits[-1].argmax(-1))
        embeds = torch.cat([embeds, model.model.embed_tokens(ids[-1][:, None])], 1)
        visual = torch.cat([visual, visual.new_zeros(1)])
    return torch.stack(ids, 1), torch.stack(logits, 1)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def assert_close(got, expected, tolerance=2e-5):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


# -- nothing dropped ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(kind, attention):
    model, embeds = make(kind, attention), prompt(2)
    pipeline = resolve("random_prefill", retention_ratio=1.0, layer=1)
    mask = torch.ones(2, 18, dtype=torch.long)
    mask[0, :4] = 0
    for attention_mask in (None, mask):
        ours, theirs = DynamicCache(config=model.config), DynamicCache(config=model.config)
        out = run_decoder(
            model.model, pipeline, inputs_embeds=embeds, attention_mask=attention_mask, past_key_values=ours,
            use_cache=True, layout=layout_of(2, 18, [range(5, 12), VISUAL]),
        )  # fmt: skip
        expected = model.model(
            inputs_embeds=embeds, attention_mask=attention_mask, past_key_values=theirs, use_cache=True
        )
        assert_close(out.last_hidden_state[:, 4:], expected.last_hidden_state[:, 4:])
        for new in (1, 1, 3, 1):  # decode steps, a later turn of three tokens, and decoding again
            step = prompt(2, new, seed=new)
            if attention_mask is not None:
                attention_mask = torch.cat([attention_mask, attention_mask.new_ones(2, new)], 1)
            out = run_decoder(
                model.model, pipeline, inputs_embeds=step, attention_mask=attention_mask, past_key_values=ours
            )
            expected = model.model(inputs_embeds=step, attention_mask=attention_mask, past_key_values=theirs)
            assert_close(out.last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("kind", KINDS)
def test_text_only_and_single_token_bypass(kind):
    model, pipeline = make(kind), pipe(Thin(), Hide())
    for length in (1, 7):
        embeds = prompt(1, length)
        out = run_decoder(model.model, pipeline, inputs_embeds=embeds, use_cache=True, layout=None)
        dense = model.model(inputs_embeds=embeds, use_cache=True)
        assert torch.equal(out.last_hidden_state, dense.last_hidden_state)
        step = prompt(1, 1, seed=9)
        out = run_decoder(model.model, pipeline, inputs_embeds=step, past_key_values=out.past_key_values)
        assert_close(out.last_hidden_state, model.model(inputs_embeds=step, past_key_values=dense.past_key_values)[0])


def test_bfloat16():
    model = make("llama")
    half = LlamaForCausalLM(model.config).eval()
    half.load_state_dict(model.state_dict())
    half = half.to(torch.bfloat16)
    out = run_decoder(
        half.model, pipe(Thin()), inputs_embeds=prompt().bfloat16(), use_cache=True, layout=layout_of(1, 18)
    )
    assert out.last_hidden_state.dtype == torch.bfloat16
    dense = half.model(inputs_embeds=prompt().bfloat16())[0]
    full = resolve("random_prefill", retention_ratio=1.0)
    out = run_decoder(half.model, full, inputs_embeds=prompt().bfloat16(), layout=layout_of(1, 18))
    assert torch.equal(out.last_hidden_state, dense)


# -- prefill methods ---------------------------------------------------------------------------------------------------

CUTS = {
    "original": Thin(),
    "compact": Thin(positions_rule="compact"),
    "layer 0": Thin(layers=(0,)),
    "last layer": Thin(layers=(3,), positions_rule="compact"),
    "several": Thin(layers=(1, 3)),
    "several compact": Thin(layers=(1, 2, 3), positions_rule="compact"),
    "trimmed": Thin(trim=True),
    "trimmed several": Thin(layers=(1, 3), trim=True),
    "merging": Thin(merge=True),
    "merging several": Thin(layers=(0, 2), merge=True, positions_rule="compact"),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CUTS)
def test_cut_equals_cacheless_reference(name, attention):
    method = CUTS[name]
    for kind in ("llama", "qwen3") if attention == "sdpa" else ("mistral",):
        model, layout = make(kind, attention), layout_of(1, 18)
        ids, logits, cache = greedy(model, pipe(method), prompt(), layout, 6)
        expected_ids, expected = thin_reference(model, prompt(), layout.visual[0], method, 6)
        assert_close(logits, expected, 1e-4)
        assert torch.equal(ids, expected_ids)
        lengths = [cache.get_seq_length(i) for i in range(LAYERS)]
        assert (len(set(lengths)) == 1) == (method.trim or (method.layers[0] == 0 and len(method.layers) == 1))


@pytest.mark.parametrize("name", CUTS)
def test_left_padded_batch_equals_single(name):
    method, model = CUTS[name], make("qwen2")
    lengths, spans = [18, 13, 9], [VISUAL, range(4, 9), range(2, 2)]  # the last sample has no image
    singles = [prompt(1, n, seed=n) for n in lengths]
    embeds = torch.cat([torch.cat([torch.zeros(1, 18 - n, 32), e], 1) for n, e in zip(lengths, singles, strict=True)])
    mask = torch.tensor([[0] * (18 - n) + [1] * n for n in lengths])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    shifted = [[p + 18 - n for p in s] for n, s in zip(lengths, spans, strict=True)]
    layout = layout_of(3, 18, shifted, lengths)
    ids, logits, _ = greedy(model, pipe(method), embeds, layout, 5, mask, positions)
    for row, (n, e) in enumerate(zip(lengths, singles, strict=True)):
        single = layout_of(1, n, [spans[row]])
        one_ids, one_logits, _ = greedy(model, pipe(method), e, single, 5)
        assert_close(logits[row], one_logits[0], 1e-4)
        assert torch.equal(ids[row], one_ids[0])


def test_random_prefill_equals_manual_cut():
    model, layout = make("llama"), layout_of(1, 18)
    pipeline = resolve("random_prefill", retention_ratio=0.3, layer=2, seed=5)
    out = run_decoder(model.model, pipeline, inputs_embeds=prompt(), layout=layout)
    assert out.kept.shape == (1, 8 + 3)
    hidden = layers_run(model, prompt(), torch.arange(18)[None], slice(0, 2))[:, out.kept[0]]
    hidden = layers_run(model, hidden, out.kept, slice(2, LAYERS))
    assert_close(out.last_hidden_state, model.model.norm(hidden))
    other = run_decoder(model.model, resolve("random_prefill", seed=6), inputs_embeds=prompt(), layout=layout)
    assert not torch.equal(other.kept, out.kept[:, : other.kept.shape[1]])


def test_no_cache_needed():
    model, layout = make("llama"), layout_of(1, 18)
    with_cache = run_decoder(model.model, pipe(Thin()), inputs_embeds=prompt(), layout=layout, use_cache=True)
    without = run_decoder(model.model, pipe(Thin()), inputs_embeds=prompt(), layout=layout, use_cache=False)
    assert without.past_key_values is None
    assert_close(without.last_hidden_state, with_cache.last_hidden_state)


@pytest.mark.parametrize("name", ["original", "compact", "trimmed", "several compact"])
def test_later_turn(name):
    """A question of several tokens on top of a cut cache, itself padded on the left, then decoding."""
    model, method = make("qwen2"), CUTS[name]
    pipeline, layout = pipe(method), layout_of(1, 18)
    turn = prompt(1, 4, seed=3)

    def run(batch, mask=None, turn_mask=None, turn=turn):
        cache = DynamicCache(config=model.config)
        embeds = prompt().expand(batch, -1, -1)
        run_decoder(
            model.model,
            pipeline,
            inputs_embeds=embeds,
            past_key_values=cache,
            layout=layout_of(batch, 18),
            use_cache=True,
        )
        out = run_decoder(
            model.model, pipeline, inputs_embeds=turn, past_key_values=cache, attention_mask=turn_mask,
            position_ids=None if turn_mask is None else 18 + (turn_mask[:, 18:].cumsum(1) - 1).clamp(min=0),
        )  # fmt: skip
        mask = None if turn_mask is None else torch.cat([turn_mask, turn_mask.new_ones(batch, 1)], 1)
        last = run_decoder(
            model.model, pipeline, inputs_embeds=prompt(1, 1, 8).expand(batch, -1, -1), past_key_values=cache,
            attention_mask=mask,
        )  # fmt: skip
        return out.last_hidden_state[:, -1], last.last_hidden_state[:, -1]

    # one by one equals in one go
    cache = DynamicCache(config=model.config)
    run_decoder(model.model, pipeline, inputs_embeds=prompt(), past_key_values=cache, layout=layout, use_cache=True)
    for i in range(4):
        single = run_decoder(model.model, pipeline, inputs_embeds=turn[:, i : i + 1], past_key_values=cache)
    end = run_decoder(model.model, pipeline, inputs_embeds=prompt(1, 1, 8), past_key_values=cache)
    out, last = run(1)
    assert_close(out, single.last_hidden_state[:, -1])
    assert_close(last, end.last_hidden_state[:, -1])
    # a batch whose second row has a shorter turn
    padded = torch.cat([turn, torch.cat([torch.zeros(1, 2, 32), turn[:, :2]], 1)])
    turn_mask = torch.ones(2, 22, dtype=torch.long)
    turn_mask[1, 18:20] = 0
    both, both_last = run(2, turn_mask=turn_mask, turn=padded)
    short, _ = run(1, turn=turn[:, :2])
    assert_close(both[0], out[0])
    assert_close(both[1], short[0])
    assert_close(both_last[0], last[0])


def test_labels_follow_the_kept_rows():
    model, layout = make("llama"), layout_of(2, 18, [VISUAL, range(0)])
    out = run_decoder(model.model, pipe(Thin()), inputs_embeds=prompt(2), layout=layout)
    labels = torch.arange(36).view(2, 18)
    kept = out.labels(labels)
    assert kept.shape == out.last_hidden_state.shape[:2]
    assert kept[1].tolist() == list(range(18, 36))
    assert kept[0].tolist() == [-100] * 5 + [0, 1, 2, 3, 5, 7, 9, 11, 13, 14, 15, 16, 17]


# -- attention rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mistral_window"])
def test_attention_rows_equal_eager_weights(kind, use_cache):
    spy, mask = Spy(), torch.ones(2, 18, dtype=torch.long)
    mask[0, :3] = 0
    layout = layout_of(2, 18, [range(5, 12), VISUAL])
    run_decoder(
        make(kind).model, pipe(spy), inputs_embeds=prompt(2), attention_mask=mask, layout=layout, use_cache=use_cache
    )
    eager = make(kind, "eager")
    weights = eager.model(inputs_embeds=prompt(2), attention_mask=mask, output_attentions=True).attentions[1]
    rows, _ = spy.seen[0]
    assert rows.shape == (2, 4, 2, 18)
    assert_close(rows, weights[:, :, [5, 17]])


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize(("rotary", "causal"), [(False, False), (False, True), (True, False)])
def test_attention_rows_without_position_or_mask(kind, rotary, causal):
    model, spy = make(kind), Spy(rotary=rotary, causal=causal, rows=(2, 9, 17))
    run_decoder(model.model, pipe(spy), inputs_embeds=prompt(), layout=layout_of(1, 18), use_cache=True)
    hidden = layers_run(model, prompt(), torch.arange(18)[None], slice(0, 1))
    layer = model.model.layers[1]
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    heads = {}
    for name in ("q", "k"):
        states = getattr(attention, f"{name}_proj")(normed).view(1, 18, -1, attention.head_dim)
        if hasattr(attention, f"{name}_norm"):
            states = getattr(attention, f"{name}_norm")(states)
        states = states.transpose(1, 2)
        if rotary:
            cos, sin = (part[:, None] for part in model.model.rotary_emb(hidden, torch.arange(18)[None]))
            first, second = states.chunk(2, -1)
            states = states * cos + torch.cat([-second, first], -1) * sin
        heads[name] = states
    scores = heads["q"] @ heads["k"].repeat_interleave(2, 1).transpose(2, 3) * attention.head_dim**-0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(18, 18, dtype=torch.bool).tril(), -torch.inf)
    assert_close(spy.seen[0][0], scores.softmax(-1)[:, :, [2, 9, 17]])


def test_cut_after_the_last_layer_leaves_logits_and_shortens_every_cache():
    model, layout = make("llama"), layout_of(1, 18)
    cache = DynamicCache(config=model.config)
    out = run_decoder(
        model.model, pipe(Thin(layers=(LAYERS,), trim=True)), inputs_embeds=prompt(), layout=layout,
        past_key_values=cache, use_cache=True,
    )  # fmt: skip
    plain = model.model(inputs_embeds=prompt())
    kept = thinned(layout.visual)[0]
    assert torch.allclose(out.last_hidden_state, plain.last_hidden_state[:, kept], atol=1e-5)
    assert [cache.get_seq_length(i) for i in range(LAYERS)] == [int(kept.sum())] * LAYERS
    # a decode step goes on from the uncut length and sees the shortened caches
    step = run_decoder(
        model.model, pipe(Thin(layers=(LAYERS,), trim=True)), inputs_embeds=prompt(1, 1, 5), past_key_values=cache
    )
    assert step.last_hidden_state.shape == (1, 1, 32) and cache.accelerate_state.next_position.item() == 19


def test_items_of_other_modalities_are_text_to_a_method():
    model, method = make("llama"), ThinVideo()
    image = run_decoder(model.model, pipe(method), inputs_embeds=prompt(), layout=layout_of(1, 18))
    plain = model.model(inputs_embeds=prompt())
    assert torch.allclose(image.last_hidden_state, plain.last_hidden_state, atol=1e-5)
    video = run_decoder(model.model, pipe(method), inputs_embeds=prompt(), layout=layout_of(1, 18, modality="video"))
    assert video.last_hidden_state.shape[1] == 13
    both = layout_of(1, 18, [range(3, 9)])
    both.spans[0].append(VisualSpan(10, 4, "video", 4))
    both.visual[0, 10:14] = True
    out = run_decoder(model.model, pipe(method), inputs_embeds=prompt(), layout=both)
    assert out.kept[0].tolist() == [*range(11), 12, *range(14, 18)]


def test_step_tells_positions_and_spans():
    spy, layout = Spy(), layout_of(1, 18)
    layout.spans = [[VisualSpan(3, 10, "video", 9, {"segments": [3]})]]
    layout.visual[0, 12] = False  # a newline ends the block
    run_decoder(make("llama").model, pipe(spy), inputs_embeds=prompt(), layout=layout)
    step = spy.seen[0][1]
    assert step.spans == layout.spans and step.position_ids.tolist() == [list(range(18))] and step.rows is None
    assert torch.equal(step.visual, layout.visual)
    assert step.block[0].nonzero().flatten().tolist() == list(VISUAL)
    assert (step.layer, step.num_layers) == (2, LAYERS)


def test_no_attention_before_layer_0():
    with pytest.raises(MethodError, match="layer 0"):
        run_decoder(make("llama").model, pipe(Spy(layer=0)), inputs_embeds=prompt(), layout=layout_of(1, 18))


# -- decode methods ----------------------------------------------------------------------------------------------------


def hide_reference(model, embeds, visual, layer, steps):
    """Greedy without cache: generated rows do not see the keys hidden in their step, from ``layer`` on."""
    length, ids, logits = embeds.shape[1], [], []
    for _ in range(steps):
        total = embeds.shape[1]
        allowed = torch.ones(total, total, dtype=torch.bool)
        for row in range(length, total):
            keep = hidden_keys(visual[None], row - length)
            if keep is not None:
                allowed[row] = keep[0]
        positions = torch.arange(total)[None]
        hidden = layers_run(model, embeds, positions, slice(0, layer))
        hidden = layers_run(model, hidden, positions, slice(layer, LAYERS), allowed)
        logits.append(model.lm_head(model.model.norm(hidden))[:, -1])
        ids.append(logits[-1].argmax(-1))
        embeds = torch.cat([embeds, model.model.embed_tokens(ids[-1][:, None])], 1)
        visual = torch.cat([visual, visual.new_zeros(1)])
    return torch.stack(ids, 1), torch.stack(logits, 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [1, 3])
def test_hiding_keys_equals_masked_reference(layer, attention):
    for kind in ("llama", "qwen3"):
        model, layout = make(kind, attention), layout_of(1, 18)
        ids, logits, cache = greedy(model, pipe(Hide(layer=layer)), prompt(), layout, 7)
        expected_ids, expected = hide_reference(model, prompt(), layout.visual[0], layer, 7)
        assert_close(logits, expected, 1e-4)
        assert torch.equal(ids, expected_ids)
        assert {cache.get_seq_length(i) for i in range(LAYERS)} == {18 + 7}, "the cache itself stays whole"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hiding_keys_in_a_padded_batch(attention):
    model = make("llama", attention)
    singles = [prompt(1, 18), prompt(1, 12, seed=4)]
    embeds = torch.cat([singles[0], torch.cat([torch.zeros(1, 6, 32), singles[1]], 1)])
    mask = torch.tensor([[1] * 18, [0] * 6 + [1] * 12])
    layout = layout_of(2, 18, [VISUAL, range(8, 12)], [18, 12])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ids, logits, _ = greedy(model, pipe(Hide()), embeds, layout, 5, mask, positions)
    for row, (single, span) in enumerate(zip(singles, (VISUAL, range(2, 6)), strict=True)):
        one_ids, one, _ = greedy(model, pipe(Hide()), single, layout_of(1, single.shape[1], [span]), 5)
        assert_close(logits[row], one[0], 1e-4)
        assert torch.equal(ids[row], one_ids[0])


def test_decode_scores_equal_eager_weights():
    seen = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Look(DecodeMethod):
        def decode_layer(self, num_layers):
            return 2

        def decode(self, step):
            seen.append(step.attention())

    model, eager, layout = make("qwen2"), make("qwen2", "eager"), layout_of(1, 18)
    ids, _, _ = greedy(model, pipe(Look()), prompt(), layout, 3)
    embeds = torch.cat([prompt(), model.model.embed_tokens(ids)], 1)
    weights = eager.model(inputs_embeds=embeds, output_attentions=True).attentions[1]
    for step, rows in enumerate(seen):
        assert_close(rows, weights[:, :, 18 + step, : 19 + step])


def test_decode_scores_across_a_cut_are_refused():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Look(Hide):
        def decode(self, step):
            step.attention()

    with pytest.raises(MethodError, match="across the layer"):
        greedy(make("llama"), pipe(Thin(), Look()), prompt(), layout_of(1, 18), 2)
    greedy(make("llama"), pipe(Thin(layers=(1,)), Look()), prompt(), layout_of(1, 18), 2)


def test_prefill_and_decode_together():
    """A cut at layer 1 and hidden keys from layer 3 on: the hidden ones are counted over what the cut left."""
    model, layout = make("llama"), layout_of(1, 18)
    _, logits, cache = greedy(model, pipe(Thin(layers=(1,)), Hide(layer=3)), prompt(), layout, 4)
    _, plain, _ = greedy(model, pipe(Thin(layers=(1,))), prompt(), layout, 4)
    assert_close(logits[:, 0], plain[:, 0])
    assert not torch.allclose(logits[:, 1], plain[:, 1])
    assert [cache.get_seq_length(i) for i in range(LAYERS)] == [22, 17, 17, 17]


# -- caches ------------------------------------------------------------------------------------------------------------


def test_sliding_window_that_forgot_keys_is_refused():
    model, layout = make("mistral_window"), layout_of(1, 18)
    for method in (Thin(trim=True), Hide(), Spy()):
        with pytest.raises(MethodError, match="sliding window"):
            greedy(model, pipe(method), prompt(), layout, 2)


def test_short_prompt_in_a_sliding_window():
    model, layout = make("mistral_window"), layout_of(1, 5, [range(1, 4)])
    method = Thin(trim=True)
    ids, _, _ = greedy(model, pipe(method), prompt(1, 5), layout, 3)
    assert torch.equal(ids, thin_reference(model, prompt(1, 5), layout.visual[0], method, 3)[0])


def test_static_cache_is_refused():
    model = make("llama")
    cache = StaticCache(config=model.config, max_cache_len=32)
    with pytest.raises(MethodError, match="DynamicCache"):
        run_decoder(model.model, pipe(Thin()), inputs_embeds=prompt(), past_key_values=cache, layout=layout_of(1, 18))


def test_cropped_cache():
    """Assisted decoding takes guessed tokens back."""
    model, layout = make("llama"), layout_of(1, 18)
    results = []
    for guesses in (0, 3):
        cache = DynamicCache(config=model.config)
        run_decoder(
            model.model, pipe(Thin()), inputs_embeds=prompt(), past_key_values=cache, layout=layout, use_cache=True
        )
        if guesses:
            run_decoder(model.model, pipe(Thin()), inputs_embeds=prompt(1, guesses, 5), past_key_values=cache)
            cache.crop(-guesses)
        out = run_decoder(
            model.model, pipe(Thin()), inputs_embeds=prompt(1, 2, 6), past_key_values=cache,
            position_ids=torch.tensor([[18, 19]]),
        )  # fmt: skip
        results.append(out.last_hidden_state)
    assert_close(results[0], results[1])
