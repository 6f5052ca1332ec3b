"""FlashVID beyond the golden vectors: its steps against plain restatements, any setting, what the LLM prunes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import accelerate_methods
from accelerate_methods import MethodError
from accelerate_methods.flashvid import FlashVID, candidates, cluster_counts, grow_trees, link_threshold, merge_in_space
from accelerate_methods.ops.diversity import farthest_first_sets
from accelerate_methods.stages.prefill import RowPlaces, VisualSpan
from tests.conformance.vocabulary import RecordedStep
from tests.support.items import FEATURES, make_item

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_picks_are_weighted_by_the_candidate():
    features, weights = drawn(3, 20, 8), drawn(3, 20, seed=1).exp()
    found = farthest_first_sets(features, 7, weights)
    for states, weight, picks in zip(features.double(), weights.double(), found.tolist(), strict=True):
        unit = torch.nn.functional.normalize(states, dim=1)
        value = (1 - unit @ unit.T) * weight
        chosen = [int(value.fill_diagonal_(torch.inf).amin(0).argmax())]
        while len(chosen) < 7:
            least = value[chosen].amin(0)
            least[chosen] = -torch.inf
            chosen.append(int(least.argmax()))
        assert picks == chosen


@pytest.mark.parametrize("weight", [-1.0, 0.0])
def test_nothing_is_picked_twice(weight):
    picks = farthest_first_sets(drawn(2, 6, 4), 6, torch.full((2, 6), weight))
    assert picks.sort(1).values.tolist() == [list(range(6))] * 2


def test_a_still_video_becomes_one_tree_per_place():
    states = drawn(1, 9, 16).repeat(5, 1, 1)
    salient = torch.zeros(5, 9, dtype=torch.bool)
    salient[:, :2] = True
    trees = grow_trees(states, salient, [5], (2, 0), 0.8)
    assert trees.counts == [7, 0, 0, 0, 0]
    torch.testing.assert_close(trees.values, states[0, 2:] * 2.5)  # chains of five
    torch.testing.assert_close(grow_trees(states, salient, [5], (2, 0), 0.8, mean=True).values, states[0, 2:])
    assert grow_trees(states, salient, [5], (2, 0), 1.0).counts == [7] * 5


def test_segments_are_as_each_alone():
    states, salient = drawn(9, 6, 4), drawn(9, 6, seed=1) > 0.8
    salient = torch.zeros_like(salient).scatter_(1, drawn(9, 6, seed=1).topk(2, dim=1).indices, True)
    whole, rows = grow_trees(states, salient, [4, 1, 4], (2, 1), 0.1), 0
    for part in (slice(0, 4), slice(4, 5), slice(5, 9)):
        alone = grow_trees(states[part], salient[part], [part.stop - part.start], (2, 1), 0.1)
        assert whole.counts[part] == alone.counts
        torch.testing.assert_close(whole.values[rows : rows + len(alone.values)], alone.values)
        rows += len(alone.values)
    assert rows == len(whole.values)


def test_no_more_is_linked_than_a_segment_can_spare():
    similarity = torch.tensor([[-1.0, -1.0, -1.0], [0.9, 0.8, 0.95], [-1.0, -1.0, -1.0]])
    least = link_threshold(similarity, [2, 1], 1, 0.5)
    assert least[:, 0].tolist() == pytest.approx([0.9, 0.9, 0.5]), "two can go; the second one's similarity is the bar"
    assert link_threshold(similarity, [2, 1], 2, 0.5)[:, 0].tolist() == pytest.approx([0.5] * 3)


def test_trees_are_shared_out_over_a_segment():
    assert cluster_counts([20, 4, 0, 9], [3, 1], 4) == [10, 2, 0, 4]
    assert cluster_counts([5, 1], [2], 4) == [5, 1]


def test_batches_of_frames_are_as_each_alone():
    counts, wanted = [12, 3, 11, 5, 0], [4, 3, 2, 2, 0]
    values = drawn(31, 8)
    tokens, anchors, group = merge_in_space(values, counts, wanted)
    assert group.bincount(minlength=11).min() >= 1 and len(tokens) == 11
    assert torch.equal(group[anchors], torch.arange(11)), "a token stands at one of its own"
    start = first = 0
    for count, number in zip(counts, wanted, strict=True):
        if count:
            alone = merge_in_space(values[start : start + count], [count], [number])
            torch.testing.assert_close(tokens[first : first + number], alone[0])
            assert torch.equal(anchors[first : first + number] - start, alone[1])
        start, first = start + count, first + number


@settings(max_examples=100, deadline=None)
@given(
    layout=st.sampled_from(["one_token", "grid", "frame", "no_token"]),
    frames=st.integers(1, 9),
    side=st.sampled_from([1, 2, 4]),
    ratio=st.sampled_from([0.001, 0.1, 0.25, 0.5, 0.9]),
    alpha=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    threshold=st.sampled_from([-1.0, 0.0, 0.8, 1.0, 2.0]),
    least=st.integers(1, 12),
    how=st.sampled_from(["attn_div_v2", "attn_div", "div", "attn"]),
    kind=st.sampled_from([*FEATURES, "not a number"]),
)
def test_any_video(layout, frames, side, ratio, alpha, threshold, least, how, kind):
    item = make_item(layout, frames, side, "random" if kind == "not a number" else kind, torch.float32, 3)
    if kind == "not a number":
        item.features[0, 0], item.signals["received_attention"][-1] = torch.nan, torch.nan
    before = item.features.clone()
    method = FlashVID(
        retention_ratio=ratio, alpha=alpha, temporal_threshold=threshold, min_segment_num=least,
        token_selection_method=how,
    )  # fmt: skip
    kept, merged = method.budgets(side * side)
    compressed = method.compress(item)
    assert torch.equal(before.nan_to_num(), item.features.nan_to_num()), "the input is not written to"
    count = len(compressed.positions)
    budget = min(kept + merged, side * side) * frames
    assert kept * frames <= count <= budget + frames or count == item.num_tokens
    if merged or kept >= side * side:
        assert (compressed.owner >= 0).all(), "every token is held by one"
    elif method.count(item.shape) is not None:
        assert method.count(item.shape) == count


def test_alpha_one_is_the_selection_alone():
    item = make_item("one_token", 4, 5, "random", torch.float32, 0)
    method = accelerate_methods.get("flashvid", tokens_per_frame=6, alpha=1.0)
    compressed = method.compress(item)
    assert method.count(item.shape) == len(compressed.positions) == 24
    assert torch.equal(compressed.tokens, item.features.flatten(0, 1)[compressed.positions])


class _Step(RecordedStep):
    """Two frames of three rows, each closed by a newline, and one newline behind all if ``behind``."""

    def __init__(self, behind):
        super().__init__(torch.zeros(12, 1), 0, 0, torch.arange(24.0).view(2, 12))
        self.block = torch.zeros(1, 12, dtype=torch.bool)
        self.block[0, 1 : 9 + behind] = True
        self.visual = self.block.clone()
        self.visual[0, [4, 8]] = False
        self.visual[0, 9] = False
        info = {"newline_behind": True} if behind else {}
        self.spans = [[VisualSpan(1, 8 + behind, "video", 6, info, frames=2, frame_rows=4)]]

    def where(self):
        frame = torch.full((1, 12), -1)
        frame[0, 1:9] = torch.arange(8) // 4
        return RowPlaces(frame, frame, frame)


@pytest.mark.parametrize("behind", [False, True])
def test_newlines_of_frames_are_pruned_but_not_the_one_behind(behind):
    step = _Step(behind)
    visual, counts = candidates(step)
    assert visual[0].nonzero().flatten().tolist() == list(range(1, 9)) and counts == [8]
    kept = FlashVID(llm_retention_ratio=0.3).prefill(step).indices[0].tolist()
    assert kept == [0, 6, 7, 8, 9, 10, 11]
    assert FlashVID(llm_retention_ratio=1).prefill(step) is None


def test_a_layer_that_is_not_there_prunes_nothing():
    method = accelerate_methods.get("flashvid", pruning_layer=6)
    assert method.prefill_layers(6) == () and method.prefill_layers(7) == (6,)


@pytest.mark.parametrize(
    "wrong",
    [
        {"retention_ratio": 0.5, "tokens_per_frame": 3}, {"retention_ratio": 0}, {"alpha": 1.5}, {"min_segment_num": 0},
        {"pruning_layer": 0}, {"llm_retention_ratio": 0}, {"trees": "sum"}, {"token_selection_method": "cls"},
    ],
)  # fmt: skip
def test_refuses(wrong):
    with pytest.raises(MethodError, match="flashvid"):
        accelerate_methods.get("flashvid", **wrong)
