"""Greedy coverage: what a step maximises, whichever way it is found, and what happens at the edges."""

import pytest
import torch

from accelerate_methods.ops import coverage
from accelerate_methods.ops.coverage import greedy_coverage


def by_hand(benefit, count, weights, add):
    """One set, candidate by candidate, in float64."""
    benefit, covered, picks = benefit.double(), torch.zeros(benefit.shape[1]).double(), []
    for _ in range(count):
        gains = {}
        for candidate in range(len(benefit)):
            if candidate not in picks:
                gain = (benefit[candidate] - covered).clamp(min=0).sum().item()
                gains[candidate] = gain + weights[candidate].item() if add else gain * weights[candidate].item()
        picks.append(max(gains, key=gains.__getitem__))
        covered = torch.maximum(covered, benefit[picks[-1]])
    return picks


def drawn(sets, size, things, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(sets, size, things, generator=draw), torch.rand(sets, size, generator=draw)


def both_ways(benefit, count, weights, add):
    """On a CPU only candidates that may come next are evaluated, elsewhere all."""
    free = torch.zeros_like(weights)
    return greedy_coverage(benefit, count, weights, add=add), coverage._from_all(benefit, count, weights, free, add)


@pytest.mark.parametrize("pool", [1, 4, 64])
@pytest.mark.parametrize("add", [False, True])
def test_picks_what_gains_most(pool, add, monkeypatch):
    monkeypatch.setattr(coverage, "POOL", pool)
    benefit, weights = drawn(3, 40, 23)
    for order, gain in both_ways(benefit, 15, weights, add):
        assert order.tolist() == [by_hand(b, 15, w, add) for b, w in zip(benefit, weights, strict=True)]
        assert (gain.diff() <= 1e-5).all(), "gains only fall"


@pytest.mark.parametrize("pool", [1, 2, 64])
def test_ties_go_to_the_lower_index(pool, monkeypatch):
    """Of six directions in four copies each the first copies come first; then nothing gains and indices ascend."""
    monkeypatch.setattr(coverage, "POOL", pool)
    benefit, weights = torch.eye(6).repeat(4, 4)[None], torch.ones(1, 24)
    for order, gain in both_ways(benefit, 24, weights, False):
        assert order.tolist() == [list(range(24))]
        assert gain[0].tolist() == [4.0] * 6 + [0.0] * 18


def test_more_than_there_are():
    benefit, weights = drawn(2, 9, 5)
    order, _ = greedy_coverage(benefit, 99, weights)
    assert torch.equal(order.sort(1).values, torch.arange(9).expand(2, -1))
    assert greedy_coverage(benefit, 0)[0].shape == (2, 0)


def test_last_come_last_and_each_once():
    benefit, weights = drawn(2, 12, 7)
    last = torch.zeros(2, 12, dtype=torch.bool)
    last[0, :5] = last[1, 6:] = True
    order, _ = greedy_coverage(benefit, 12, weights, last=last)
    taken_last = last.gather(1, order).int()
    assert (taken_last.diff() >= 0).all() and all(len(row.unique()) == 12 for row in order)


def test_a_weight_that_is_no_number_is_none():
    benefit, weights = drawn(1, 8, 8)
    weights[0, 3] = torch.nan
    order, gain = greedy_coverage(benefit, 7, weights)
    assert 3 not in order[0, :6] and torch.isfinite(gain).all()
