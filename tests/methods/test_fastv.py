"""FastV: selection on hand-computed scores, and the method in the decoder loop and the LLaVA models."""

import dataclasses
import itertools

import pytest
import torch
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

import accelerate_methods
from accelerate_methods import MethodError, accelerate, record
from accelerate_methods.engine.loop import run_decoder
from accelerate_methods.engine.prompt import PromptLayout
from accelerate_methods.fastv import FastV, keep_best
from accelerate_methods.ops.select import right_aligned_indices
from accelerate_methods.registry.pipeline import Pipeline, resolve
from accelerate_methods.stages.prefill import VisualSpan
from llava.mm_utils import get_anyres_image_grid_shape

IMAGE = -200
OV, V15, V16 = "tiny-llava-onevision", "tiny-llava-1.5", "tiny-llava-1.6"
LAYERS, LENGTH = 4, 30
pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def model():
    """A tiny random Qwen2, 4 heads on 2, whose attention is uneven enough for clear ranks."""
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return Qwen2ForCausalLM(config).eval()


def prompt(length=LENGTH, seed=0):
    return torch.randn(1, length, 32, generator=torch.Generator().manual_seed(seed))


def layout_of(length, *spans):
    """One [(start, length), ...] of images per sample."""
    visual = torch.zeros(len(spans), length, dtype=torch.bool)
    for row, sample in zip(visual, spans, strict=True):
        for start, count in sample:
            row[start : start + count] = True
    items = [[VisualSpan(s, n, "image", n, item=item) for item, (s, n) in enumerate(sample)] for sample in spans]
    return PromptLayout(visual, [length] * len(spans), items)


def run(model, method, embeds, layout, **kwargs):
    return run_decoder(model.model, Pipeline((method,)), inputs_embeds=embeds, layout=layout, **kwargs)


def eager_scores(model, embeds, k):
    """[L] the definition, from transformers' own attention weights."""
    eager = Qwen2ForCausalLM(model.config.__class__(**model.config.to_dict()))
    eager.config._attn_implementation = "eager"
    eager.load_state_dict(model.state_dict())
    weights = eager.eval().model(inputs_embeds=embeds, output_attentions=True).attentions[k - 1]
    return weights[0, :, -1].mean(0)


def expected_rows(scores, rows, count):
    """All rows but the visual ones ``rows``, and of these the ``count`` best."""
    best = sorted(rows, key=lambda i: (-scores[i].item(), i))[:count]
    return sorted(set(range(len(scores))) - set(rows) | set(best))


# -- parameters --------------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers():
    method = accelerate_methods.get("fastv")
    assert (method.k, method.r, method.seed) == (2, 0.5, 0) and method.stages == ("prefill",)


@pytest.mark.parametrize(
    ("given", "total", "kept"),
    [
        ({"r": 0.5}, 576, 288), ({"r": 0.75}, 576, 144), ({"r": 0.9}, 576, 58), ({"r": 0.5}, 5, 2), ({"r": 0.5}, 7, 4),
        ({"r": 0.5}, 1, 0), ({"r": 0.0}, 9, 9), ({"r": 1.0}, 9, 0), ({"r": 0.3}, 0, 0),
        ({"retention_ratio": 0.1}, 576, 58), ({"retention_ratio": 0.1}, 5, 1), ({"retention_ratio": 1.0}, 5, 5),
        ({"retention_ratio": 0.1}, 0, 0),
        ({"tokens_per_image": 72}, 576, 72), ({"tokens_per_image": 72}, 10, 10), ({"tokens_per_image": 0}, 10, 0),
    ],
)  # fmt: skip
def test_keep_count(given, total, kept):
    assert accelerate_methods.get("fastv", **given).keep_count(total) == kept


@pytest.mark.parametrize(
    "wrong",
    [
        {"k": -1}, {"k": 1.5}, {"r": 1.1}, {"r": -0.1}, {"r": float("nan")}, {"r": "half"}, {"r": None},
        {"r": 0.5, "retention_ratio": 0.5}, {"retention_ratio": 0.5, "tokens_per_image": 3}, {"retention_ratio": 0},
        {"tokens_per_image": -1}, {"tokens_per_image": 2.5}, {"seed": "a"},
    ],
)  # fmt: skip
def test_refused(wrong):
    with pytest.raises(MethodError, match="fastv"):
        accelerate_methods.get("fastv", **wrong)


def test_a_given_budget_replaces_the_default():
    assert accelerate_methods.get("fastv", retention_ratio=0.2).r is None
    method = resolve({"method": "fastv", "retention_ratio": 0.5}, tokens_per_image=7).methods[0]
    assert (method.r, method.retention_ratio, method.tokens_per_image) == (None, None, 7)


def test_layer_out_of_range(tiny):
    with pytest.raises(MethodError, match=r"k=6 is outside the allowed range \[0, 5\]"):
        accelerate(tiny(V15), "fastv", k=6)
    assert FastV(k=3).prefill_layers(4) == (3,)


# -- selection ---------------------------------------------------------------------------------------------------------


def test_best_visual_rows_in_their_order():
    #                   text  text  v    v    v    v    text
    scores = torch.tensor([[9.0, 0.0, 0.1, 0.4, 0.2, 0.3, 0.0]])
    block = torch.tensor([[False, False, True, True, True, True, False]])
    assert keep_best(scores, block, [2])[0].nonzero().flatten().tolist() == [0, 1, 3, 5, 6]
    assert keep_best(scores, block, [0])[0].nonzero().flatten().tolist() == [0, 1, 6]


def test_ties_go_to_the_lower_row():
    block = torch.ones(1, 6, dtype=torch.bool)
    assert keep_best(torch.zeros(1, 6), block, [3])[0].nonzero().flatten().tolist() == [0, 1, 2]


def test_each_sample_has_its_own_scores_and_count():
    scores = torch.tensor([[0.0, 3.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 5.0, 0.0]])
    block = torch.tensor([[False, True, True, True, False], [False, False, False, True, False]])
    assert keep_best(scores, block, [1, 1]).tolist() == [[True, True, False, False, True], [True] * 5]


def test_right_aligned_indices():
    mask = torch.tensor([[True, False, True, False], [False, True, False, False]])
    indices, valid = right_aligned_indices(mask, [2, 1])
    assert indices[0].tolist() == [0, 2] and indices[1, 1] == 1 and valid.tolist() == [[True, True], [False, True]]
    assert right_aligned_indices(mask[:1], [2])[1] is None


# -- in the decoder loop -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_equals_the_definition(model, k, use_cache):
    embeds, rows = prompt(), range(5, 25)
    out = run(model, FastV(k=k), embeds, layout_of(LENGTH, [(5, 20)]), use_cache=use_cache)
    assert out.kept[0].tolist() == expected_rows(eager_scores(model, embeds, k), rows, 10)


def test_several_images_compete_and_text_between_them_stays(model):
    embeds, rows = prompt(seed=4), [*range(2, 10), *range(13, 25)]
    layout = layout_of(LENGTH, [(2, 8), (13, 12)])
    kept = run(model, FastV(r=0.7), embeds, layout).kept[0].tolist()
    assert kept == expected_rows(eager_scores(model, embeds, 2), rows, 6)
    assert {10, 11, 12} <= set(kept)


def test_a_count_per_image_counts_an_item_with_text_inside_once(model):
    layout = layout_of(LENGTH, [(2, 8), (13, 12)])
    method = FastV(retention_ratio=None, r=None, tokens_per_image=5)
    assert run(model, method, prompt(seed=4), layout).kept.shape[1] == LENGTH - 20 + 10
    layout.spans[0][:] = [dataclasses.replace(span, item=0) for span in layout.spans[0]]
    assert run(model, method, prompt(seed=4), layout).kept.shape[1] == LENGTH - 20 + 5


def test_padding_is_left_behind(model):
    """A text-only prompt does not keep the batch at the width of a pruned neighbour."""
    embeds, mask = torch.cat([prompt(), prompt(seed=1)]), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, : LENGTH - 8] = 0
    layout = layout_of(LENGTH, [(5, 20)], [])
    layout.lengths = [LENGTH, 8]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = run(model, FastV(r=0.5), embeds, layout, attention_mask=mask, position_ids=positions)
    assert out.kept.shape == (2, LENGTH - 10) and out.kept_valid.sum(1).tolist() == [LENGTH - 10, 8]


def test_newlines_are_candidates(model):
    layout = layout_of(LENGTH, [(5, 20)])
    layout.visual[0, 24] = False  # a newline closes the block
    method, embeds = FastV(r=1.0), prompt()
    kept = run(model, method, embeds, layout).kept[0].tolist()
    assert kept == [*range(5), *range(25, LENGTH)]


@pytest.mark.parametrize("full", [{"r": 0.0}, {"r": None, "tokens_per_image": 20}])
def test_nothing_to_drop_leaves_the_prompt_alone(model, full):
    out = run(model, FastV(**full), prompt(), layout_of(LENGTH, [(5, 20)]))
    assert out.kept is None
    torch.testing.assert_close(out.last_hidden_state, model.model(inputs_embeds=prompt()).last_hidden_state)


def test_everything_visual_dropped_still_answers(model):
    out = run(model, FastV(r=1.0, k=1), prompt(), layout_of(LENGTH, [(0, LENGTH - 1)]))
    assert out.kept.tolist() == [[LENGTH - 1]] and torch.isfinite(out.last_hidden_state).all()


def test_text_alone_is_untouched(model):
    dense = model.model(inputs_embeds=prompt()).last_hidden_state
    for layout in (None, layout_of(LENGTH, [])):
        out = run(model, FastV(), prompt(), layout)
        assert out.kept is None
        torch.testing.assert_close(out.last_hidden_state, dense)


def test_cache_lengths_and_positions_of_decode_steps(model):
    """Layers below K cache everything; a new token stands behind the whole prompt in every layer."""
    cache, method, layout = DynamicCache(config=model.config), FastV(r=0.75), layout_of(LENGTH, [(5, 20)])
    kept = run(model, method, prompt(), layout, past_key_values=cache, use_cache=True).kept[0]
    new = prompt(1, seed=9)
    out = run(model, method, new, None, past_key_values=cache)
    assert [cache.get_seq_length(i) for i in range(LAYERS)] == [LENGTH + 1] * 2 + [15 + 1] * 2
    # without a cache: the lower layers on everything, the upper ones on what was kept and the new token
    hidden, positions = torch.cat([prompt(), new], 1), torch.arange(LENGTH + 1)[None]
    for index, layer in enumerate(model.model.layers):
        if index == 2:
            rows = torch.cat([kept, torch.tensor([LENGTH])])
            hidden, positions = hidden[:, rows], positions[:, rows]
        rope, mask = model.model.rotary_emb(hidden, positions), torch.full((hidden.shape[1],) * 2, -torch.inf).triu(1)
        result = layer(hidden, attention_mask=mask[None, None], position_embeddings=rope, past_key_values=None)
        hidden = result[0] if isinstance(result, tuple) else result
    torch.testing.assert_close(out.last_hidden_state[:, -1], model.model.norm(hidden)[:, -1], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("k", [0, 2])
def test_padded_batch_equals_single_prompts(model, k):
    """Other lengths, other images, several, none: each sample gets the tokens that it gets alone."""
    lengths, spans = [30, 22, 26, 12], [[(5, 20)], [(3, 7)], [(2, 6), (10, 9)], []]
    singles = [prompt(n, seed=n) for n in lengths]
    embeds = torch.cat([torch.cat([torch.zeros(1, 30 - n, 32), e], 1) for n, e in zip(lengths, singles, strict=True)])
    mask = torch.tensor([[0] * (30 - n) + [1] * n for n in lengths])
    padded = [[(start + 30 - n, size) for start, size in s] for n, s in zip(lengths, spans, strict=True)]
    layout, method = layout_of(30, *padded), FastV(r=0.6, k=k)
    layout.lengths = lengths
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = run(model, method, embeds, layout, attention_mask=mask, position_ids=positions)
    for row, (n, single) in enumerate(zip(lengths, singles, strict=True)):
        one = run(model, method, single, layout_of(n, spans[row]))
        rows = torch.arange(n) if one.kept is None else one.kept[0]
        valid = out.kept_valid[row]
        assert (out.kept[row][valid] - (30 - n)).tolist() == rows.tolist()
        torch.testing.assert_close(out.last_hidden_state[row][valid], one.last_hidden_state[0], atol=2e-5, rtol=2e-5)


def test_no_device_read(model):
    """The number of rows that go on follows from the prompt alone."""

    class Step:
        rows, valid, lengths = None, None, [LENGTH, LENGTH]
        block = torch.zeros(2, LENGTH, dtype=torch.bool, device="meta")
        spans = layout_of(LENGTH, [(5, 20)], [(3, 9)]).spans

        def attention(self, rows):
            return torch.zeros(2, 4, 1, LENGTH, device="meta")

    selection = FastV().prefill(Step())
    assert selection.indices.shape == selection.valid.shape == (2, LENGTH - 5)


def test_rows_that_went_before_are_not_counted():
    class Step:
        rows, valid, lengths = torch.arange(6)[None], None, [8]  # of a prompt of 8
        block = torch.tensor([[False, True, True, True, True, False]])
        spans = layout_of(8, [(1, 6)]).spans

        def attention(self, rows):
            return torch.tensor([0.0, 4, 1, 3, 2, 0]).expand(1, 2, 1, 6)

    assert FastV().prefill(Step()).indices.tolist() == [[0, 1, 3, 5]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model, dtype):
    half = Qwen2ForCausalLM(model.config).eval().to(dtype)
    half.load_state_dict(model.state_dict())
    out = run(half, FastV(), prompt().to(dtype), layout_of(LENGTH, [(5, 20)]), use_cache=True)
    assert out.last_hidden_state.dtype == dtype and torch.isfinite(out.last_hidden_state).all()
    assert out.kept.shape == (1, LENGTH - 10)
    full = run(model, FastV(), prompt(), layout_of(LENGTH, [(5, 20)])).kept
    assert len(set(out.kept[0].tolist()) & set(full[0].tolist())) >= LENGTH - 10 - 2  # rounding may swap close ranks


# -- K=0 ---------------------------------------------------------------------------------------------------------------


def test_k0_draws_tokens(model):
    layout, state = layout_of(LENGTH, [(5, 20)]), torch.get_rng_state()
    drawn = [run(model, FastV(k=0, seed=s), prompt(), layout) for s in (0, 0, 1)]
    assert torch.equal(state, torch.get_rng_state()), "the global random state was used"
    first, again, other = (out.kept[0].tolist() for out in drawn)
    assert first == again != other and len(first) == LENGTH - 10
    assert {*range(5), *range(25, LENGTH)} <= set(first)
    baseline = run_decoder(
        model.model, resolve("random_prefill", retention_ratio=0.5, layer=0), inputs_embeds=prompt(), layout=layout
    )
    assert baseline.kept[0].tolist() == first


# -- in the models -----------------------------------------------------------------------------------------------------


def pixels(model, count=1, seed=0):
    side = model.get_vision_tower().image_size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 0.5


def answers(model, ids, images, **kwargs):
    return model.generate(
        ids, images=images, do_sample=False, max_new_tokens=5, eos_token_id=None, pad_token_id=0, **kwargs
    )


def test_batch_of_questions_about_images(tiny):
    """Two questions of different length, and one without an image, answered together as alone."""
    model = tiny(V15)
    questions, images = [[1, 5, IMAGE, 7, 8], [1, 6, 9, 11, 12, IMAGE, 7]], pixels(model, 2)
    ids = torch.tensor([[0, 0, *questions[0]], questions[1]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    with accelerate(model, "fastv", r=0.75), record() as requests:
        both = answers(model, ids, images, attention_mask=mask, modalities="image")
        alone = [answers(model, torch.tensor([q]), images[i : i + 1]) for i, q in enumerate(questions)]
        mixed_ids = torch.tensor([[0, 0, *questions[0]], [1, 6, 9, 11, 12, 4, 7]])
        mixed = answers(model, mixed_ids, images[:1], attention_mask=mask, modalities="image")
        text = answers(model, mixed_ids[1:], None)
    dense_text = answers(model, mixed_ids[1:], None)
    assert torch.equal(both, torch.cat(alone))
    assert torch.equal(mixed, torch.cat([alone[0], text])) and torch.equal(text, dense_text)
    layers = model.config.num_hidden_layers
    for sample, words in enumerate((4, 6)):
        assert requests[0].layer_lengths(sample) == [576 + words] * 2 + [144 + words] * (layers - 2)


@pytest.mark.parametrize("size", [(336, 336), (800, 200), (500, 900)])
def test_any_resolution_image(tiny, size):
    model = tiny(V16)
    columns, rows = get_anyres_image_grid_shape(
        size, model.config.image_grid_pinpoints, model.get_vision_tower().image_size
    )
    images = [pixels(model, 1 + columns * rows)]
    ids = torch.tensor([[1, 5, IMAGE, 7, 8]])
    kwargs = {"image_sizes": [size], "modalities": ["image"]}
    dense = model(input_ids=ids, images=images, **kwargs).logits.shape[1]
    with accelerate(model, "fastv", r=0.9), record() as requests:
        logits = model(input_ids=ids, images=images, **kwargs).logits
        assert torch.isfinite(logits).all() and answers(model, ids, images, **kwargs).shape == (1, 5)
    visual = dense - 4
    assert logits.shape[1] == 4 + round(visual * (1 - 0.9))
    assert requests[0].layer_lengths(0)[:3] == [dense, dense, logits.shape[1]]


@pytest.mark.parametrize("first", ["uniform", "fastvid"])
def test_after_a_compress_method(tiny, first):
    """The tokens that a method before the language model has left are the candidates."""
    model = tiny(OV)
    ids, video = torch.tensor([[5, IMAGE, 7, 8]]), [pixels(model, 4)]
    kwargs = {"images": video, "modalities": ["video"]}
    pipeline = f"{first}+fastv"
    with accelerate(model, first, retention_ratio=0.25):
        left = model(input_ids=ids, **kwargs).logits.shape[1] - 3
    with accelerate(model, pipeline, **{f"{first}.retention_ratio": 0.25, "fastv.r": 0.5}), record() as requests:
        assert model(input_ids=ids, **kwargs).logits.shape[1] == 3 + round(left / 2)
        assert answers(model, ids, **kwargs).shape == (1, 5)
    lengths = requests[0].layer_lengths(0)
    assert [n for n, _ in itertools.groupby(lengths)] == [left + 3, 3 + round(left / 2)]
