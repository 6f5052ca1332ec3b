"""DART: counts, the order of a set, pivots and what they take."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from accelerate_methods import MethodError, get
from accelerate_methods.dart import DART, find_pivots, retained, set_order
from tests.support.prompts import LAYERS, by_layers, decoder, make_prompts, run

pytestmark = pytest.mark.usefixtures("no_grad")


# -- how many ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "total", "tail", "images", "takes"),
    [
        ({"max_num": 128}, 576, 40, 4, [16] * 8),
        ({"max_num": 64}, 576, 40, 4, [8] * 8),
        ({"max_num": 320}, 2880, 40, 4, [40] * 8),
        ({"max_num": 128}, 100, 40, 4, [12] * 8),  # all stay
        ({"max_num": 574}, 576, 40, 4, [71] * 8),  # more than there are beside the pivots
        ({"max_num": 0}, 576, 40, 4, [0] * 8),
        ({"max_num": 128}, 576, 2, 4, [21] * 6),  # less text than text pivots
        ({"max_num": 128}, 576, 0, 4, [32] * 4),
        ({"reduction_ratio": 0.778}, 576, 40, 4, [15] * 8),
        ({"reduction_ratio": 0.0}, 20, 40, 4, [2] * 8),
        ({"reduction_ratio": 0.001}, 576, 40, 4, [71] * 8),
        ({"reduction_ratio": 1.0}, 576, 40, 4, [0] * 8),
        ({"retention_ratio": 0.25}, 576, 40, 4, [18] * 4 + [17] * 4),
        ({"retention_ratio": 0.01}, 100, 40, 1, [0] * 5),
        ({"retention_ratio": 1.0}, 7, 40, 4, [1, 1, 1, 0, 0, 0, 0, 0]),
        ({"tokens_per_image": 128}, 576, 40, 4, [16] * 4 + [15] * 4),
        ({"tokens_per_image": 128}, 3, 40, 3, [0] * 7),
        ({}, 0, 40, 0, []),
    ],
)
def test_what_each_pivot_takes(given, total, tail, images, takes):
    method = get("dart", **given)
    found = method.plan(total, 1, tail)
    everything = method.max_num is not None and method.max_num >= total > 0
    if everything:
        assert found[0] + sum(found[1]) == total
    else:
        assert found == (images, takes)


def test_numbers_count_for_each_image_and_shares_exactly():
    assert get("dart").plan(1152, 2, 40) == (4, [32] * 8)
    for total in (1, 5, 9, 100, 577):
        for ratio in (0.05, 0.3, 0.9, 1.0):
            images, takes = get("dart", retention_ratio=ratio).plan(total, 1, 3)
            assert images + sum(takes) == max(1, round(total * ratio))


@pytest.mark.parametrize("wrong", [{"k": 0}, {"pivot_image_token": 0}, {"max_num": -1}, {"reduction_ratio": 1.5}])
def test_refused(wrong):
    with pytest.raises(MethodError, match="dart"):
        get("dart", **wrong)


def test_names_of_the_release_are_understood():
    method = get("dart", pruned_layer=5, max_num_trunction=64)
    assert (method.k, method.max_num) == (5, 64)
    with pytest.raises(MethodError, match=r"k=5 is outside the allowed range \[0, 3\]"):
        method.prefill_layers(4)


# -- the order of a set ------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(values=st.lists(st.integers(0, 20_000), max_size=24, unique=True), stride=st.sampled_from([1, 8, 32, 1000]))
def test_order_is_that_of_the_interpreter(values, stride):
    values = [value * stride for value in values]
    found = set_order(torch.tensor(values, dtype=torch.long))
    assert found.tolist() == list(set(values))


# -- which -------------------------------------------------------------------------------------------------------------


def test_pivots_are_the_largest_and_text_ones_stand_behind_the_image():
    sizes = torch.tensor([9.0, 9, 1, 5, 3, 5, 2, 4, 4, 8])
    visual = torch.tensor([False, False, True, True, True, True, False, False, False, False])
    images, texts = find_pivots(sizes, visual, 3, tail=3, texts=2)
    assert images.tolist() == [3, 5, 4] and texts.tolist() == [9, 7]
    assert find_pivots(sizes, visual, 1, tail=0, texts=0)[1].tolist() == []


def test_pivots_compete_in_turn():
    """Two pivots look the same way: the second gets what the first has left."""
    states = torch.tensor([[1.0, 0], [1, 0.1], [-1, 0.1], [-1, 0.5], [0, 1], [1, 0]])
    visual = torch.tensor([True, True, True, True, True, False])
    kept = retained(states, visual, torch.tensor([0]), torch.tensor([5]), [1, 1])
    assert kept.nonzero().flatten().tolist() == [0, 2, 3]
    kept = retained(states, visual, torch.tensor([0]), torch.tensor([5]), [1, 0])
    assert kept.nonzero().flatten().tolist() == [0, 2]


def by_definition(model, asked, method, before, hidden, positions):
    """Rows that go on, one pivot after the other, in lists and sets."""
    layer = model.model.layers[method.k - 1]
    keys = layer.self_attn.k_proj(layer.input_layernorm(before)).unflatten(-1, (2, -1)).transpose(1, 2)
    keys = apply_rotary_pos_emb(keys, keys, *model.model.rotary_emb(before, positions[None]))[1]
    sizes, states = keys.abs().sum((1, 3))[0], model.model.norm(hidden)[0]
    block = asked.layout.blocks()[0]
    candidates, length = block.nonzero().flatten().tolist(), len(block)
    images = sorted(candidates, key=lambda row: -sizes[row])[: method.pivot_image_token]
    behind = range(max(candidates) + 1, length)
    texts = sorted(behind, key=lambda row: -sizes[row])[: method.pivot_text_token]
    count = method.max_num // (len(images) + len(texts))
    kept, free = set(images), [row for row in candidates if row not in images]
    for pivot in set(images + texts):
        alike = torch.cosine_similarity(states[pivot][None], states[free])
        taken = [free[i] for i in alike.topk(count, largest=False).indices]
        kept |= set(taken)
        free = [row for row in free if row not in taken]
    return torch.tensor(sorted(kept | set(range(length)) - set(candidates)))


@pytest.mark.parametrize("params", [{}, {"k": 1}, {"pivot_image_token": 2, "pivot_text_token": 6}, {"max_num": 9}])
def test_equals_the_definition(params):
    asked = make_prompts([[("image", 28, True), ("video", 20, False)]], 7, "random", 0)
    method = DART(**{"max_num": 24, **params})

    def choose(layer, hidden, before, positions):
        if layer != method.k:
            return None
        return by_definition(decoder(), asked, method, before, hidden, positions)

    kept, states = by_layers(decoder(), asked.embeds[0][None], choose)
    out, request, cache = run(method, asked)
    assert torch.equal(out.kept[0], kept)
    torch.testing.assert_close(out.last_hidden_state, states, atol=2e-5, rtol=2e-5)
    lengths = [asked.lengths[0]] * method.k + [len(kept)] * (LAYERS - method.k)
    assert request.layer_lengths(0) == [cache.get_seq_length(i) for i in range(LAYERS)] == lengths
    assert int(cache.accelerate_state.next_position) == asked.lengths[0], "positions are those of the whole prompt"


def test_places_are_counted_without_padding():
    """The turn of the pivots depends on where they stand, which padding must not move."""
    samples = [[("image", 90, False)], [("image", 40, True)], [("video", 50, False)]]
    asked, method = make_prompts(samples, 9, "random", 2), DART(max_num=24)
    out, _, _ = run(method, asked)
    for row, length in enumerate(asked.lengths):
        alone, _, _ = run(method, asked.sample(row))
        valid = out.kept_valid[row] if out.kept_valid is not None else slice(None)
        assert torch.equal(out.kept[row][valid] - (max(asked.lengths) - length), alone.kept[0])


def test_composes_with_a_method_that_drops_tokens_before():
    asked = make_prompts([[("image", 40, False)], [("image", 25, True)], []], 3, "random", 1)
    _, request, _ = run(DART(k=3, max_num=None, retention_ratio=0.5), asked, get("fastv", k=1, r=0.5))
    text = [n - block for n, block in zip(asked.lengths, (40, 26, 0), strict=True)]
    assert [request.layer_lengths(row) for row in range(3)] == [
        [t + n for n in left] for t, left in zip(text, ([40, 20, 20, 10], [26, 13, 13, 6], [0] * 4), strict=True)
    ]
