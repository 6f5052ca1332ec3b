"""VisPruner beyond its golden vectors."""

import pytest
import torch

import accelerate_methods
from accelerate_methods.ops.select import by_score
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.vispruner import important_and_diverse, without_duplicates
from tests.support.items import make_views


def by_hand(features, left, count):
    """One view, round by round, as the released code does it; odd counts leave one more at even places."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    left = list(left)
    while len(left) > count:
        even, odd = left[0::2], left[1::2]
        drop = min(8, len(left) - count, len(even))
        nearest = {token: max((float(unit[token] @ unit[o]) for o in odd), default=-9) for token in even}
        even.sort(key=lambda token: -nearest[token])  # stable
        left = even[drop:] + odd
    return left


@pytest.mark.parametrize(("size", "count"), [(60, 20), (61, 20), (33, 1), (9, 0), (24, 23), (5, 5)])
def test_rounds(size, count):
    draw = torch.Generator().manual_seed(size)
    features = torch.randn(3, size, 10, generator=draw)
    left = torch.stack([torch.randperm(size, generator=draw) for _ in range(3)])
    found = without_duplicates(features, left, count)
    assert found.tolist() == [by_hand(f, row.tolist(), count) for f, row in zip(features, left, strict=True)]


def test_important_tokens_come_first():
    draw = torch.Generator().manual_seed(0)
    features, scores = torch.randn(2, 40, 6, generator=draw), torch.rand(2, 40, generator=draw)
    found = important_and_diverse(features, scores, 6, 9)
    order = by_score(scores)
    assert torch.equal(found[:, :6], order[:, :6]) and len(found[0].unique()) == 15
    assert torch.equal(important_and_diverse(features, scores, 7, 0), order[:, :7])


def test_of_duplicates_one_stays():
    """A round drops tokens whose equals stand at odd places."""
    features = torch.eye(16).repeat_interleave(2, 0)[None]
    found = without_duplicates(features, torch.arange(32)[None], 24)
    assert set((found[0] // 2).tolist()) == set(range(16))


def test_large_frames_drop_more_in_a_round():
    """The number of rounds does not grow with the size: what stays of 1152 tokens takes rounds of 16."""
    features = torch.randn(1, 1152, 4, generator=torch.Generator().manual_seed(0))
    left = torch.arange(1152)[None]
    assert torch.equal(without_duplicates(features, left, 1136), without_duplicates(features, left, 1136))
    one = without_duplicates(features, left, 1136)[0]
    assert set(range(1152)) - set(one.tolist()) <= set(range(0, 1152, 2)), "one round: only even places"


@pytest.mark.parametrize("params", [{"tokens_per_view": 3}, {"tokens_per_view": 3, "important_ratio": 1.0}])
def test_odd_counts_work(params):
    views, _ = make_views((2, 1), 3, True, "random", torch.float32, 0)
    assert accelerate_methods.get("vispruner", **params).compress_views(views).patch.shape == (9,)


@pytest.mark.parametrize("wrong", [{"important_ratio": 1.1}, {"important_ratio": -0.1}, {"tokens_per_view": 0}])
def test_refuses(wrong):
    with pytest.raises(MethodError, match="vispruner"):
        accelerate_methods.get("vispruner", **wrong)
