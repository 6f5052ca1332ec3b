"""Farthest-first picks against the rule written out."""

import pytest
import torch

from accelerate_methods.ops import diversity
from accelerate_methods.ops.diversity import farthest_first


def by_hand(features, count):
    """Each pick the farthest from the picks before it, the first the most isolated; all in float64."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    distance = 1 - unit @ unit.T
    others = distance + torch.diag(torch.full((len(unit),), 9.0, dtype=torch.float64))
    picks = [int(others.amin(1).argmax())]
    while len(picks) < count:
        least = distance[picks].amin(0)
        least[picks] = -9
        picks.append(int(least.argmax()))
    return picks


@pytest.fixture(params=["all", "some"])
def way(request, monkeypatch):
    """Both ways to find the same picks."""
    if request.param == "some":
        monkeypatch.setattr(diversity, "_few_rows_do", lambda total, count: True)
        for name in ("AHEAD", "POOL", "AT_LEAST"):  # several rounds on few tokens
            monkeypatch.setattr(diversity, name, {"POOL": 8}.get(name, 3))
    return request.param


@pytest.mark.parametrize(("total", "count"), [(2, 1), (5, 5), (60, 7), (150, 60), (200, 200)])
@pytest.mark.parametrize("clusters", [None, 6])
def test_picks(way, total, count, clusters):
    draw = torch.Generator().manual_seed(total + count)
    features = torch.randn(total, 12, generator=draw)
    if clusters:
        features = torch.randn(clusters, 12, generator=draw)[torch.randint(clusters, (total,), generator=draw)]
        features = features + 0.2 * torch.randn(total, 12, generator=draw)
    assert farthest_first(features, count).tolist() == by_hand(features, count)


def test_a_row_is_never_picked_twice(way):
    features = torch.eye(4).repeat(5, 1)  # four directions, five times each
    picks = farthest_first(features, 20).tolist()
    assert sorted(picks) == list(range(20)) and sorted(features[picks[:4]].argmax(1).tolist()) == [0, 1, 2, 3]
    assert picks[:4] == [0, 1, 2, 3] and picks[4:] == list(range(4, 20)), "of equal ones the lower index"


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_rows_without_a_direction_come_last(way, bad):
    features = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    features[[3, 17]] = bad
    picks = farthest_first(features, 30).tolist()
    assert picks[-2:] == [3, 17]
    rest = [i for i in range(30) if i not in (3, 17)]
    assert picks[:-2] == [rest[i] for i in by_hand(features[rest], 28)]
    assert farthest_first(torch.full((6, 3), bad), 4).tolist() == [0, 1, 2, 3]


def test_few_rows(way):
    assert farthest_first(torch.randn(1, 4), 1).tolist() == [0]
    assert farthest_first(torch.randn(9, 4), 0).tolist() == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_in_float32(way, dtype):
    features = torch.randn(80, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert farthest_first(features, 30).tolist() == farthest_first(features.float(), 30).tolist()
