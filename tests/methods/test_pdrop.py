"""PyramidDrop: counts, and ranking by the layer to come with positions counted anew."""

import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from accelerate_methods import MethodError, accelerate, get, record
from accelerate_methods.pdrop import PyramidDrop
from accelerate_methods.stages.prefill import VisualSpan
from tests.methods.test_every_method import BATCH, OV, answer, assert_close
from tests.support.prompts import LAYERS, by_layers, decoder, make_prompts, run

pytestmark = pytest.mark.usefixtures("no_grad")


def spans(*lengths):
    return [VisualSpan(0, n, "image", n, item=i) for i, n in enumerate(lengths)]


# -- parameters --------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_every_official_script():
    method = get("pdrop")
    assert method.prefill_layers(32) == (8, 16, 24) and method.image_token_ratio_list == (0.5, 0.25, 0.125)
    assert [method.keep_count(spans(576), stage) for stage in range(3)] == [288, 144, 72]


@pytest.mark.parametrize(
    ("given", "lengths", "kept"),
    [
        ({"image_token_ratio_list": (0.7, 0.29, 0.0)}, (576,), [403, 167, 0]),
        ({"image_token_ratio_list": (0.29, 0.29, 0.29)}, (100,), [28, 28, 28]),  # the product is 28.999...
        ({"retention_ratio": 0.125}, (576,), [288, 144, 72]),
        ({"retention_ratio": 0.001}, (10,), [1, 1, 1]),
        ({"retention_ratio": 1.0}, (10,), [10, 10, 10]),
        ({"tokens_per_image": 72}, (576,), [288, 144, 72]),
        ({"tokens_per_image": 72}, (576, 576), [576, 288, 144]),
        ({"tokens_per_image": 72}, (30,), [30, 30, 30]),
        ({"tokens_per_image": 72}, (), [0, 0, 0]),
        ({"retention_ratio": 0.5}, (), [0, 0, 0]),
    ],
)
def test_counts_are_shares_of_the_whole(given, lengths, kept):
    assert [get("pdrop", **given).keep_count(spans(*lengths), stage) for stage in range(3)] == kept


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"layer_list": (8, 16)}, "2 layers in layer_list need as many shares in image_token_ratio_list, got 3"),
        ({"layer_list": (16, 8, 24)}, r"layer_list \[16, 8, 24\] must rise"),
        ({"layer_list": (0, 8, 24)}, r"layer_list=0 is outside the allowed range \[1, inf\)"),
        ({"image_token_ratio_list": (0.2, 0.5, 0.1)}, "must not rise: shares are of all visual tokens"),
        ({"image_token_ratio_list": (1.5, 0.5, 0.1)}, r"outside the allowed range \[0, 1\]"),
        ({"retention_ratio": 0.5, "tokens_per_image": 3}, "pdrop"),
    ],
)
def test_what_is_refused(params, says):
    with pytest.raises(MethodError, match=says):
        get("pdrop", **params)


def test_a_layer_that_does_not_exist_is_refused():
    with pytest.raises(MethodError, match=r"layer_list=24 is outside the allowed range \[0, 23\]"):
        PyramidDrop(layer_list=(8, 16, 24)).prefill_layers(24)


@pytest.mark.parametrize(
    ("layers", "wanted"), [(25, (8, 16, 24)), (24, (6, 12, 18)), (6, (1, 3, 4)), (5, (1, 2, 3)), (4, (1, 2, 3))]
)
def test_the_released_layers_stand_as_deep_in_a_shallower_decoder(layers, wanted):
    assert PyramidDrop().prefill_layers(layers) == wanted


def test_a_decoder_with_fewer_layers_than_stages_is_refused():
    with pytest.raises(MethodError, match="the decoder has 3 layers"):
        PyramidDrop().prefill_layers(3)


# -- in a decoder ------------------------------------------------------------------------------------------------------


def attention_to_come(model, layer, hidden, positions):
    """[L] of the last row in a layer that has not run, mean over heads, from whole projections."""
    attention, states = model.model.layers[layer].self_attn, model.model.layers[layer].input_layernorm(hidden)
    query, key = (
        part(states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for part in (attention.q_proj, attention.k_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *model.model.rotary_emb(hidden, positions[None]))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    weights = (query[:, :, -1:] @ key.transpose(2, 3) * attention.scaling).softmax(-1)
    return weights[0, :, 0].mean(0)


@pytest.mark.parametrize("items", [[("image", 40, False)], [("image", 18, True), ("video", 20, False)]])
def test_ranks_by_the_layer_to_come_on_new_positions(items):
    asked, layers, ratios = make_prompts([items], 3, "random", 0), (1, 3), (0.5, 0.2)
    visual = asked.layout.blocks()[0]
    total, left = int(visual.sum()), [visual]

    def choose(layer, hidden, before, positions):
        if layer not in layers:
            return None
        scores = attention_to_come(decoder(), layer, hidden, positions)
        count = int(total * ratios[layers.index(layer)])
        candidates = left[-1].nonzero().flatten()
        best = candidates[scores[candidates].topk(count).indices]
        rows = torch.cat([(~left[-1]).nonzero().flatten(), best]).sort().values
        left.append(left[-1][rows])
        return rows

    kept, states = by_layers(decoder(), asked.embeds[0][None], choose, compact=True)
    out, request, cache = run(PyramidDrop(layer_list=layers, image_token_ratio_list=ratios), asked)
    assert torch.equal(out.kept[0], kept)
    torch.testing.assert_close(out.last_hidden_state, states, atol=2e-5, rtol=2e-5)
    text = asked.lengths[0] - total
    lengths = [text + total, *[text + int(total * ratios[0])] * 2, text + int(total * ratios[1])]
    assert request.layer_lengths(0) == [cache.get_seq_length(i) for i in range(LAYERS)] == lengths
    # a new token stands behind what each layer has cached
    state = cache.accelerate_state
    shifts = [0 if known.shift is None else int(known.shift) for known in state.layers]
    assert [int(state.next_position) - shift for shift in shifts] == lengths


def test_all_visual_tokens_may_go():
    asked = make_prompts([[("image", 9, True)]], 2, "random", 0)
    out, _, _ = run(PyramidDrop(layer_list=(1, 2), image_token_ratio_list=(0.1, 0.0)), asked)
    assert out.kept[0].tolist() == [0, 11, 12, 13]


def test_shares_are_of_the_prompt_where_another_method_has_dropped_tokens():
    asked = make_prompts([[("image", 40, False)], [("image", 25, True)], []], 3, "random", 1)
    method = PyramidDrop(layer_list=(1, 3), image_token_ratio_list=(0.75, 0.3))
    _, request, _ = run(method, asked, get("fastv", k=2, r=0.5))
    text = [n - block for n, block in zip(asked.lengths, (40, 26, 0), strict=True)]
    assert [request.layer_lengths(row) for row in range(3)] == [
        [t + n for n in counts] for t, counts in zip(text, ([40, 30, 15, 12], [26, 19, 10, 7], [0] * 4), strict=True)
    ]
    _, request, _ = run(method, asked, get("fastv", k=2, r=0.9))  # fewer are left than the share
    assert request.layer_lengths(0) == [text[0] + n for n in (40, 30, 3, 3)]


@pytest.mark.parametrize("first", ["visionzip", "fastervlm", "uniform"])
def test_behind_a_method_that_compresses_shares_are_of_what_it_has_left(first, tiny):
    model, questions = tiny(OV), BATCH[OV]
    methods = [get(first, retention_ratio=0.4), get("pdrop", layer_list=(2, 4), image_token_ratio_list=(0.5, 0.2))]
    with accelerate(model, methods), record() as requests:
        together, alone = answer(model, *questions), [answer(model, question) for question in questions]
    for row, (question, one) in enumerate(zip(questions, alone, strict=True)):
        assert_close((together[0][row], together[1][row]), (one[0][0], one[1][0]), 1e-4)
        rows = sum(len(item.positions) for item in requests[0].samples[row].items)
        left = [question.text + n for n in (rows, int(rows * 0.5), int(rows * 0.2))]
        assert requests[0].layer_lengths(row) == [n for n in left for _ in range(2)]
