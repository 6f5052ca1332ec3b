"""Greedy MAP inference: what it maximises, and what it does at the edges."""

import itertools

import pytest
import torch

from accelerate_methods.ops import dpp
from accelerate_methods.ops.dpp import greedy_map, greedy_map_of


def kernels(batch, size, rank, seed=0):
    factors = torch.randn(batch, size, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factors @ factors.transpose(1, 2)


def by_determinants(kernel, count):
    """Each step tries every item: the definition, without any recursion."""
    chosen = []
    for _ in range(count):
        rest = [i for i in range(len(kernel)) if i not in chosen]
        gains = [torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]).item() for i in rest]
        chosen.append(rest[max(range(len(rest)), key=gains.__getitem__)])
    return chosen


@pytest.mark.parametrize("seed", range(3))
def test_every_step_enlarges_the_determinant_most(seed):
    kernel = kernels(4, 9, 9, seed)
    assert greedy_map(kernel, 6).tolist() == [by_determinants(one, 6) for one in kernel]


def test_kernels_do_not_touch_each_other():
    kernel = kernels(5, 20, 12).float()
    together = greedy_map(kernel, 10)
    assert torch.equal(together, torch.cat([greedy_map(one[None], 10) for one in kernel]))


@pytest.mark.parametrize(("count", "rank"), itertools.product((1, 3, 8, 11, 12, 40), (1, 3, 12)))
def test_beyond_the_rank_every_index_comes_once(count, rank):
    kernel = kernels(3, 12, rank).float()
    chosen = greedy_map(kernel, count)
    assert chosen.shape == (3, min(count, 12))
    for row, one in zip(chosen.tolist(), kernel, strict=True):
        assert len(set(row)) == len(row)
        rest = row[rank:]  # what cannot be told apart any more: by the diagonal
        assert rest == sorted(rest, key=lambda i: (-one[i, i].item(), i))


def test_equal_items_go_by_index():
    assert greedy_map(torch.ones(1, 5, 5), 4).tolist() == [[0, 1, 2, 3]]
    assert greedy_map(torch.zeros(2, 5, 5), 3).tolist() == [[0, 1, 2]] * 2
    assert greedy_map(torch.eye(4)[None], 4).tolist() == [[0, 1, 2, 3]]


def test_the_kernel_is_left_alone():
    kernel = kernels(2, 6, 6)
    before = kernel.clone()
    greedy_map(kernel, 4)
    assert torch.equal(kernel, before)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("width", [6, 40])
def test_rows_that_are_foreseen_are_those_of_the_kernel(monkeypatch, width, weighted):
    """Several rounds, choices that nobody foresaw, and more of them than the rank of six directions."""
    monkeypatch.setattr(dpp, "AHEAD", 5)
    monkeypatch.setattr(dpp, "OTHERS", 3)
    draw = torch.Generator().manual_seed(width)
    states = torch.randn(2, 120, width, generator=draw)
    states[:, 7] = float("nan")
    weights = torch.rand(2, 120, generator=draw) if weighted else torch.ones(2, 120)
    unit = torch.nn.functional.normalize(states.double(), dim=2).nan_to_num(0.0)
    kernel = (unit @ unit.mT) * weights[:, :, None] * weights[:, None]
    kernel.diagonal(dim1=1, dim2=2)[:, torch.arange(120) != 7] = weights[:, torch.arange(120) != 7].double().square()
    found = greedy_map_of(states, weights if weighted else None, 20)
    whole = greedy_map_of(states, weights if weighted else None, 40)
    assert torch.equal(whole[:, : min(width, 20)], found[:, :width]), "from the whole kernel"
    assert torch.equal(found[:, :width], greedy_map(kernel, 20)[:, :width])
    assert all(len(set(row)) == 20 and 7 not in row for row in found.tolist())
