"""AKS beyond its golden vectors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import accelerate_methods
from accelerate_methods.aks import normalised, split
from accelerate_methods.stages.errors import MethodError


def method(**params):
    return accelerate_methods.get("aks", **params)


def step_by_step(scores, count, depth, t1, t2):
    """Judge-and-split on lists, part by part, as the paper tells it; indices of the chosen frames."""
    values = scores.tolist()
    low, high = min(values), max(values)
    values = [(v - low) / (high - low) if high > low else 0.0 for v in values]

    def visit(start, part, level):
        if not part:
            return []
        mean, best = sum(part) / len(part), sorted(part, reverse=True)[:count]
        deviation = math.sqrt(sum((v - mean) ** 2 for v in part) / len(part))
        if level == depth or (sum(best) / len(best) - mean > t1 and deviation > t2):
            order = sorted(range(len(part)), key=lambda i: (-part[i], i))
            return [start + i for i in order[: count // 2**level]]
        half = len(part) // 2
        return visit(start, part[:half], level + 1) + visit(start + half, part[half:], level + 1)

    return sorted(visit(0, values, 0))


@settings(max_examples=150, deadline=None)
@given(
    size=st.integers(1, 90), count=st.integers(1, 40), depth=st.integers(0, 6), t1=st.sampled_from([-1.0, 0.21, 0.4]),
    t2=st.sampled_from([-100.0, 0.2]), coarse=st.booleans(), seed=st.integers(0, 3),
)  # fmt: skip
def test_is_judge_and_split(size, count, depth, t1, t2, coarse, seed):
    scores = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scores = (scores * 4).round() / 4 if coarse else scores
    chosen = method(t1=t1, t2=t2, all_depth=depth, depth_rule="as_released").frames(scores, count)
    expected = list(range(size)) if size < count else step_by_step(scores, count, depth, t1, t2)
    assert chosen.tolist() == expected


@given(size=st.integers(0, 200), count=st.integers(1, 70), seed=st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_by_default_every_part_may_have_a_frame(size, count, seed):
    scores = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    chosen = method().frames(scores, count)
    assert len(chosen) <= count and (chosen[1:] > chosen[:-1]).all()
    assert len(chosen) == size if size < count else len(chosen) > 0


def test_a_budget_below_the_number_of_parts():
    scores = torch.rand(600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert len(method(depth_rule="as_released").frames(scores, 16)) == 0
    assert len(method().frames(scores, 16)) == 16


def test_the_strategies_of_the_paper():
    scores = torch.rand(256, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    top = method(mode="top").frames(scores, 8)
    assert set(top.tolist()) == set(scores.topk(8).indices.tolist())
    bins = method(mode="bin", t1=-1.0).frames(scores, 8)  # three levels: one frame out of each eighth
    assert (bins // 32).tolist() == list(range(8))
    assert torch.equal(method(mode="ada", t1=-1.0).frames(scores, 8), top), "stands out at once"
    assert len(method(mode="uni").frames(scores, 8)) == 0, "the model's own evenly spaced frames"


def test_thinned_candidates_and_a_number_of_its_own():
    scores = torch.rand(103, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    chosen = method(ratio=4, max_num_frames=4).frames(scores, 64)
    assert len(chosen) == 4 and (chosen % 4 == 0).all() and chosen.max() < 100


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_no_numbers(bad):
    scores = torch.linspace(0, 1, 64, dtype=torch.float64)
    scores[5] = bad
    assert normalised(scores).isfinite().all()
    chosen = method(mode="top").frames(scores, 4).tolist()
    assert (5 in chosen) == (bad == float("inf")) and len(chosen) == 4
    assert torch.equal(normalised(torch.full((4,), bad)), torch.zeros(4, dtype=torch.float64))


def test_parts_come_in_the_order_of_time():
    scores = torch.cat([torch.full((64,), 0.5), torch.zeros(60), torch.ones(4)]).double()  # flat, then a peak
    starts, lengths, levels = split(scores, 4, 3, 0.9, -100)
    assert starts.tolist() == [0, 16, 32, 48, 64] and lengths.tolist() == [16, 16, 16, 16, 64]
    assert levels.tolist() == [3, 3, 3, 3, 1]


@pytest.mark.parametrize(
    ("total", "rate", "frames"),
    [(300, 29.97, 10), (301, 25.0, 12), (10, 29.97, 1), (0, 25.0, 0), (7, 0.5, 7)],
)
def test_one_candidate_per_second(total, rate, frames):
    candidates = method().candidates(total, rate)
    assert len(candidates) == frames and (not frames or candidates[-1] < total)


def test_fields_say_what_they_may_be():
    for wrong in ({"mode": "best"}, {"scorer": "sevila"}, {"ratio": 0}, {"scorer_checkpoint": " "}, {"all_depth": -1}):
        with pytest.raises(MethodError):
            method(**wrong)
