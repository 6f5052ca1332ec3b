"""V2Drop: counts, how much a layer changed a token, and that the least changed ones go."""

import pytest
import torch

from accelerate_methods import MethodError, get
from accelerate_methods.stages.prefill import VisualSpan
from accelerate_methods.v2drop import V2Drop, variation
from tests.support.prompts import LAYERS, by_layers, decoder, make_prompts, run

pytestmark = pytest.mark.usefixtures("no_grad")


# -- parameters --------------------------------------------------------------------------------------------------------


def counts(method, total, items=1):
    """What is left at each layer of the list."""
    spans = [VisualSpan(0, total // items, "image", total // items, item=i) for i in range(items)]
    left = [total]
    for stage in range(method.num_drops):
        left.append(method.keep_count(left[-1], spans, stage))
    return left[1:]


@pytest.mark.parametrize(
    ("given", "total", "kept"),
    [
        ({}, 576, [288, 144, 1]),
        ({"keep_one": False}, 576, [288, 144, 0]),
        ({"keep_ratio_list": (0.25, 0.05, 0.0)}, 576, [144, 7, 1]),
        ({"keep_ratio_list": (0.31, 1.0, 1.0)}, 101, [31, 31, 31]),
        ({"keep_ratio_list": (0.29, 0.1, 0.1)}, 100, [28, 2, 1]),  # the product is 28.999...
        ({}, 0, [0, 0, 0]),
        ({"retention_ratio": 0.125}, 576, [288, 144, 72]),
        ({"retention_ratio": 1.0}, 9, [9, 9, 9]),
        ({"retention_ratio": 0.001}, 9, [1, 1, 1]),
        ({"retention_ratio": 0.5}, 0, [0, 0, 0]),
        ({"tokens_per_image": 72}, 576, [288, 144, 72]),
        ({"tokens_per_image": 99}, 9, [9, 9, 9]),
    ],
)
def test_counts_are_shares_of_what_is_left(given, total, kept):
    assert counts(get("v2drop", **given), total) == kept


def test_a_number_counts_for_each_image():
    assert counts(get("v2drop", tokens_per_image=72), 1152, items=2) == [576, 288, 144]


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"layer_list": (3, 17)}, "2 layers in layer_list need as many shares in keep_ratio_list, got 3"),
        ({"layer_list": (3, 3, 22)}, r"layer_list \[3, 3, 22\] must rise"),
        ({"layer_list": (0, 3, 22)}, r"layer_list=0 is outside the allowed range \[1, inf\)"),
        ({"keep_ratio_list": (0.5, 0.5, -1)}, r"outside the allowed range \[0, 1\]"),
        ({"metric": "l3"}, "Allowed: cosine, l1, l2"),
    ],
)
def test_what_is_refused(params, says):
    with pytest.raises(MethodError, match=says):
        get("v2drop", **params)


def test_a_layer_that_does_not_exist_is_refused():
    with pytest.raises(MethodError, match=r"layer_list=22 is outside the allowed range \[0, 5\]"):
        V2Drop(layer_list=(3, 17, 22)).prefill_layers(6)
    assert [V2Drop().prefill_layers(n) for n in (28, 6, 4)] == [(3, 17, 22), (1, 3, 4), (1, 2, 3)]


# -- scores ------------------------------------------------------------------------------------------------------------


def test_variation_by_hand():
    before, after = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[4.0, 4.0], [2.0, 2.0]])
    torch.testing.assert_close(variation(before, after), torch.tensor([5.0, 2**0.5]))
    torch.testing.assert_close(variation(before, after, "l1"), torch.tensor([7.0, 2.0]))
    torch.testing.assert_close(variation(before, after, "cosine"), torch.tensor([-(0.5**0.5), -1.0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_changes_beside_large_activations_count(dtype):
    """The squares of these overflow half precision, and their sum rounds small terms away."""
    before = torch.zeros(3, 512, dtype=dtype)
    after = before.clone()
    after[:, 0] = 300.0
    after[1, 1:] = 1.0
    after[2, 1:] = 0.5
    one, two, three = variation(before, after).tolist()
    assert one < three < two < float("inf")


# -- in a decoder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(1, 3), (2, 3)])  # neighbours: the first drop is not part of the second difference
@pytest.mark.parametrize("metric", ["l2", "l1", "cosine"])
def test_those_that_changed_least_go(layers, metric):
    asked, ratios = make_prompts([[("image", 18, True), ("video", 20, False)]], 3, "random", 0), (0.5, 0.4)
    visual = [asked.layout.blocks()[0]]

    def choose(layer, hidden, before, positions):
        if layer not in layers:
            return None
        change = {
            "l2": lambda: (hidden - before).pow(2).sum(-1).sqrt(),
            "l1": lambda: (hidden - before).abs().sum(-1),
            "cosine": lambda: -torch.cosine_similarity(hidden, before, dim=-1),
        }[metric]()[0]
        candidates = visual[-1].nonzero().flatten()
        best = candidates[change[candidates].topk(int(len(candidates) * ratios[layers.index(layer)])).indices]
        rows = torch.cat([(~visual[-1]).nonzero().flatten(), best]).sort().values
        visual.append(visual[-1][rows])
        return rows

    kept, states = by_layers(decoder(), asked.embeds[0][None], choose)
    out, request, cache = run(V2Drop(layer_list=layers, keep_ratio_list=ratios, metric=metric), asked)
    assert torch.equal(out.kept[0], kept)
    torch.testing.assert_close(out.last_hidden_state, states, atol=2e-5, rtol=2e-5)
    text = asked.lengths[0] - 39
    first, second = layers
    lengths = [text + 39] * first + [text + 19] * (second - first) + [text + 7] * (LAYERS - second)
    assert request.layer_lengths(0) == [cache.get_seq_length(i) for i in range(LAYERS)] == lengths
    assert int(cache.accelerate_state.next_position) == asked.lengths[0], "positions are those of the whole prompt"


def test_the_last_one_goes_where_asked():
    asked = make_prompts([[("image", 9, True)]], 2, "random", 0)
    for keep_one, left in ((True, 1), (False, 0)):
        method = V2Drop(layer_list=(1, 2), keep_ratio_list=(0.5, 0.0), keep_one=keep_one)
        out, _, _ = run(method, asked)
        assert out.kept.shape[1] == asked.lengths[0] - 10 + left


def test_composes_with_methods_at_the_layers_between():
    """Also with one that acts where it would have to remember what enters the layer before."""
    asked = make_prompts([[("image", 40, False)], [("image", 25, True)], []], 3, "random", 1)
    method = V2Drop(layer_list=(1, 3), keep_ratio_list=(0.75, 0.5))
    _, request, _ = run(method, asked, get("fastv", k=2, r=0.5))
    text = [n - block for n, block in zip(asked.lengths, (40, 26, 0), strict=True)]
    assert [request.layer_lengths(row) for row in range(3)] == [
        [t + n for n in left] for t, left in zip(text, ([40, 30, 15, 7], [26, 19, 10, 5], [0] * 4), strict=True)
    ]


def test_what_entered_a_layer_inside_of_which_rows_went():
    """Of the rows that FrameFusion has left inside the layer, each is compared with itself."""
    asked, seen = make_prompts([[("video", 40, False)]], 3, "random", 1), []

    class Watched(V2Drop):
        def prefill(self, step):
            selection = super().prefill(step)
            seen.append((step.rows[0], step.entered()[0], step.layer))
            return selection

    method = Watched(layer_list=(1, 3), keep_ratio_list=(0.9, 0.5))
    merging = get("framefusion", cost=0.6, similarity_lower_bound=-1.0)
    _, request, _ = run(method, asked, merging)
    assert request.layer_lengths(0)[1] < request.layer_lengths(0)[0]
    rows, entered, layer = seen[0]
    assert layer == 1 and len(rows) == len(entered) < asked.lengths[0]
    text = rows[rows > 40]  # has not been merged
    torch.testing.assert_close(entered[-len(text) :], asked.embeds[0][text])


def test_nothing_of_a_prompt_stays_on_the_method():
    method = V2Drop(layer_list=(1, 3), keep_ratio_list=(0.5, 0.5))
    before = dict(vars(method))
    run(method, make_prompts([[("image", 40, False)]], 3, "random", 0))
    assert vars(method) == before
