"""SparseVLM: budgets, raters, clusters, and the three versions in a decoder."""

from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache

from accelerate_methods import MethodError, get
from accelerate_methods.engine.loop import run_decoder
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.sparsevlm import SparseVLM, cluster_and_merge, published_budgets, rotary_decay, select_raters
from accelerate_methods.stages.prefill import VisualSpan
from tests.support.prompts import LAYERS, decoder, make_prompts


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# -- budgets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "tokens", "expected"),
    [
        ("1.5", 192, (300, 200, 110)),
        ("1.5", 64, (66, 30, 17)),
        ("2.0", 128, (238, 108, 60)),
        ("1.5", 32, (33, 15, 8.5)),  # half of 64
        ("1.5", 576, (576, 576, 576)),
        ("1.5", 9999, (576, 576, 576)),
    ],
)
def test_published_rows_and_what_lies_between(version, tokens, expected):
    assert published_budgets(tokens, version) == pytest.approx(expected)


def test_budgets_rise_with_what_is_asked():
    for version in ("1.5", "2.0"):
        rows = [published_budgets(tokens, version) for tokens in range(0, 577, 4)]
        means = [4 * first + 9 * second + 17 * third for first, second, third in rows]
        assert all(a < b for a, b in pairwise(means))


def test_budgets_follow_the_number_of_tokens_and_of_images():
    one, anyres = VisualSpan(0, 576, "image", 576), VisualSpan(0, 2880, "image", 2880)
    other = VisualSpan(600, 576, "image", 576, item=1)
    method = SparseVLM(tokens_per_image=192)
    assert [method.keep_count([one], stage) for stage in range(3)] == [300, 200, 110]
    assert [method.keep_count([one, other], stage) for stage in range(3)] == [600, 400, 220]
    assert [SparseVLM(tokens_per_image=640).keep_count([anyres], s) for s in range(3)] == [
        round(5 * b) for b in published_budgets(128, "1.5")
    ]
    assert SparseVLM(tokens_per_image=None, budgets=(5, 4, 3)).keep_count([one, other], 1) == 8


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"version": "1.0", "tokens_per_image": 100}, "scale and bias, or tokens_per_image out of 192, 128, 64"),
        ({"scale": 1.0, "bias": 0.0, "tokens_per_image": None}, "belong to version 1.0, not 1.5"),
        ({"pruning_layers": [2, 6]}, "2 pruning_layers need as many budgets"),
        ({"pruning_layers": [6, 2, 15]}, "must rise"),
        ({"version": "1.0", "scale": 1.0, "tokens_per_image": None}, "belong together"),
        ({"version": "3.0"}, "1.5"),
    ],
)
def test_what_is_refused(params, says):
    with pytest.raises(MethodError, match=says):
        SparseVLM(**params)


def test_a_shallow_decoder_is_refused():
    with pytest.raises(MethodError, match=r"pruning layer 15 is outside the allowed range \[0, 3\]"):
        SparseVLM(pruning_layers=(2, 6, 15)).prefill_layers(4)
    assert SparseVLM().prefill_layers(32) == SparseVLM().prefill_layers(16) == (0, 3, 7, 16)
    assert SparseVLM().prefill_layers(6) == (0, 1, 2, 3), "at the same depth"
    assert SparseVLM(version="1.0").prefill_layers(4) == (0, 1, 2, 3, 4)
    with pytest.raises(MethodError, match="the decoder has 2 layers"):
        SparseVLM().prefill_layers(2)
    assert SparseVLM(pruning_layers=(1, 2, 3)).prefill_layers(4) == (0, 2, 3, 4)


# -- parts -------------------------------------------------------------------------------------------------------------


def test_raters_by_definition():
    hidden = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0))
    visual = torch.zeros(2, 12, dtype=torch.bool)
    visual[0, 2:7], visual[1, 4:9] = True, True
    text = torch.ones(2, 5, dtype=torch.bool)
    text[1, :2] = False  # its picture ends later
    relevance, raters = select_raters(hidden, visual, text)
    for row, start in ((0, 7), (1, 9)):
        rows = hidden[row, visual[row]] @ hidden[row, start:].T
        expected = rows.softmax(-1).mean(0)
        torch.testing.assert_close(relevance[row, -len(expected) :], expected)
        assert raters[row, -len(expected) :].tolist() == (expected > expected.mean()).tolist()


@pytest.mark.parametrize("text", [1, 4])
def test_where_all_text_is_alike_all_of_it_rates(text):
    hidden = torch.ones(1, 6 + text, 8)
    visual = (torch.arange(6 + text) < 6)[None]
    assert select_raters(hidden, visual, torch.ones(1, text, dtype=torch.bool))[1].all()


def test_clusters_of_two_are_the_same_in_every_run():
    tokens = torch.randn(16, 12, generator=torch.Generator().manual_seed(4))
    merged, labels, centres = cluster_and_merge(tokens, 2)
    assert torch.equal(labels[centres], torch.arange(2)) and merged.shape == (2, 12)
    for _ in range(3):
        assert torch.equal(cluster_and_merge(tokens, 2)[0], merged)
    for number in range(2):
        torch.testing.assert_close(merged[number], tokens[labels == number].mean(0), atol=1e-5, rtol=1e-5)


def test_rotary_decay_is_the_sum_of_cosines():
    dim, theta, positions = 16, 1e4, torch.tensor([0, 1, 5, 40])
    angles = positions[:, None] * theta ** -(torch.arange(0, dim, 2) / dim)
    tables = tuple(torch.cat([part, part], -1)[None] for part in (angles.cos(), angles.sin()))
    distance = positions[2:, None] - positions
    expected = 2 / dim**0.5 * torch.cos(distance[..., None] * theta ** -(torch.arange(0, dim, 2) / dim)).sum(-1)
    torch.testing.assert_close(rotary_decay(tables, torch.tensor([2, 3]))[0], expected, atol=1e-5, rtol=1e-5)


# -- in a decoder ------------------------------------------------------------------------------------------------------


def run(method, asked, **more):
    model = decoder()
    cache = DynamicCache(config=model.config)
    request = asked.record()
    out = run_decoder(
        model.model, Pipeline((method,)), **asked.inputs, request=request, past_key_values=cache, use_cache=True, **more
    )
    return out, request, cache


def test_counts_and_order_behind_each_layer():
    asked = make_prompts([[("image", 40, False)]], 3, "random", 0)
    method = SparseVLM(pruning_layers=(0, 2), budgets=(20, 6), tokens_per_image=None)
    out, request, cache = run(method, asked)
    # 20 go, 7 of them are merged into 1 row; 15 of 21 go, 5 of them into 1
    text = asked.lengths[0] - 40
    assert request.layer_lengths(0) == [text + 40, text + 21, text + 21, text + 7]
    assert [cache.get_seq_length(i) for i in range(LAYERS)] == request.layer_lengths(0)
    kept = out.kept[0].tolist()
    assert kept[:1] == [0] and kept[-4:] == list(range(asked.lengths[0] - 4, asked.lengths[0]))
    assert kept[1:7] == sorted(kept[1:7]), "those that stay keep their order, the merged one comes behind them"
    item = request.samples[0].items[0]
    merged = kept[7]
    assert int((item.held_by == merged).sum()) >= 5 and int(item.merged_at.min()) == 1


def test_positions_are_counted_anew_or_kept():
    asked = make_prompts([[("image", 40, False)]], 3, "random", 0)
    for version, expected in (("1.5", [44, 24, 24, 10]), ("2.0", [44, 44, 44, 44])):
        method = SparseVLM(version=version, pruning_layers=(0, 2), budgets=(20, 6), tokens_per_image=None)
        _, request, cache = run(method, asked)
        state = cache.accelerate_state
        shifts = [0 if known.shift is None else int(known.shift) for known in state.layers]
        next_position = [int(state.next_position) - shift for shift in shifts]
        total = asked.lengths[0]
        lengths = request.layer_lengths(0)
        assert next_position == (lengths if version == "1.5" else [total] * LAYERS), expected


def test_text_only_and_no_text_behind_the_picture():
    method = SparseVLM(pruning_layers=(0, 2), budgets=(4, 2), tokens_per_image=None)
    alone = make_prompts([[]], 5, "random", 0)
    out, request, _ = run(method, alone)
    assert out.kept is None and request.layer_lengths(0) == alone.lengths * LAYERS
    trailing = make_prompts([[("image", 12, False)]], 0, "random", 0)
    trailing.lengths, trailing.embeds = [13], [trailing.embeds[0][:13]]  # ends with the picture
    out, request, _ = run(method, trailing)
    assert out.kept is None and request.layer_lengths(0) == [13] * LAYERS


def test_composes_with_a_method_that_drops_tokens_in_between():
    asked = make_prompts([[("image", 40, False)], [("image", 25, True)]], 3, "random", 1)
    sparse = SparseVLM(pruning_layers=(0, 2), budgets=(20, 6), tokens_per_image=None)
    pipeline = Pipeline((sparse, get("fastv", k=2, retention_ratio=0.5)))
    pipeline.check_layers(LAYERS)
    request = asked.record()
    with torch.no_grad():
        out = run_decoder(decoder().model, pipeline, **asked.inputs, request=request)
    assert torch.isfinite(out.last_hidden_state).all()
    lengths = request.layer_lengths(0)
    assert lengths[1] == asked.lengths[0] - 40 + 21 and lengths[2] < lengths[1] and lengths[3] < lengths[2]


def test_two_methods_before_one_layer_are_refused():
    sparse = SparseVLM(pruning_layers=(0, 1), budgets=(20, 6), tokens_per_image=None)
    with pytest.raises(MethodError, match="sparsevlm and fastv both act before decoder layer 2"):
        Pipeline((sparse, get("fastv", k=2))).check_layers(LAYERS)
