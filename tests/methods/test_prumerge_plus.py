"""PruMerge+ beyond its golden vectors."""

import pytest
import torch

import accelerate_methods
from accelerate_methods.prumerge_plus import CLS, adaptive_grid, budgeted_choice, fixed_choice, with_even
from tests.support.items import make_item, make_views


@pytest.mark.parametrize(
    ("ratio", "step"), [(1 / 8, 2), (30 / 576, 6), (0.2, 1), (0.24, 1), (1 / 576, 192)]
)
def test_spacing(ratio, step):
    grid = list(adaptive_grid(576, ratio))
    assert grid == list(range(0, 575, step)) and 575 not in grid
    assert list(adaptive_grid(576, 0.0)) == []


@pytest.mark.parametrize(("ratio", "count"), [(1 / 16, 36), (0.1, 57), (1 / 8, 72), (1 / 5, 115), (1 / 4, 144)])
def test_both_halves_of_the_fixed_form_are_of_one_size(ratio, count):
    top, grid = fixed_choice(576, ratio)
    assert top == len(grid) == count


def test_outliers_by_attention_then_the_spaced_ones():
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.2, 0.8, 0.0, 0.05, 0.06]])
    assert with_even(scores, 2, range(0, 7, 2)).tolist() == [[1, 4, 0, 2, 6]]


def test_views_keep_the_same_number():
    scores = torch.tensor([[0.9, 0.1, 0.8, 0.2, 0.3, 0.0], [0.1, 0.9, 0.2, 0.8, 0.0, 0.3]])
    # the first view's outliers are spaced ones already: what follows by attention fills up
    assert with_even(scores, 2, range(0, 5, 2)).tolist() == [[0, 2, 4, 3, 1], [1, 3, 0, 2, 4]]


def test_a_budget_takes_outliers_first():
    scores = torch.full((1, 100), 0.01)
    scores[0, [50, 70]] = torch.tensor([0.5, 0.9])
    assert budgeted_choice(scores, 6).tolist() == [[70, 50, 0, 16, 32, 48]]
    assert budgeted_choice(scores, 1).tolist() == [[70]] and budgeted_choice(scores, 0).shape == (1, 0)


def test_without_outliers_one_token_stays():
    views, _ = make_views((2, 1), 4, True, "random", torch.float32, 0)
    views.signals[CLS] = torch.full((3, 16), 0.02)
    assert len(accelerate_methods.get("prumerge_plus").compress_views(views).tokens) == 3


def test_what_the_fixed_form_chooses_twice():
    """In views it is there twice, as released; where tokens have rows of a prompt it is there once."""
    method = accelerate_methods.get("prumerge_plus", reduction_ratio=0.25)
    views, _ = make_views(None, 5, True, "random", torch.float32, 0)
    top, grid = fixed_choice(25, 0.25)
    views.signals[CLS] = torch.zeros(1, 25).index_fill(1, torch.tensor(grid[:3]), 1.0)
    compressed = method.compress_views(views)
    assert len(compressed.tokens) == top + len(grid) + 1 == method.count(views.shape)
    assert (compressed.patch < 0).sum() == 3
    item = make_item("one_token", 2, 5, "random", torch.float32, 0)
    positions = method.compress(item).positions
    assert len(positions.unique()) == len(positions) and method.count(item.shape) is None
