"""Masks and indices of the best, whatever the scores are: ties, infinities, not-a-number, half precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accelerate_methods.dycoke import best_share
from accelerate_methods.ops.select import (
    by_score,
    flat_rows,
    mask_to_indices,
    on_device,
    pick_rows,
    right_aligned_indices,
    top_indices,
    top_mask,
)

NAN, INF = float("nan"), float("inf")
VALUES = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0, INF, NAN])
ROWS = st.integers(1, 9).flatmap(
    lambda n: st.lists(st.lists(VALUES, min_size=n, max_size=n), min_size=1, max_size=3)
)


def best(row, count):
    """The rule in plain Python: the largest, of equal ones the first; not-a-number only when nothing else is left."""
    order = sorted(range(len(row)), key=lambda i: (row[i] != row[i], 0 if row[i] != row[i] else -row[i], i))
    return sorted(order[:count])


@settings(max_examples=200, deadline=None)
@given(rows=ROWS, dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]), data=st.data())
def test_the_best_of_any_scores(rows, dtype, data):
    scores = torch.tensor(rows, dtype=dtype)
    size = scores.shape[1]
    count = data.draw(st.integers(0, size))
    expected = [best(row, count) for row in rows]
    assert top_indices(scores, count).tolist() == expected
    assert [row.nonzero().flatten().tolist() for row in top_mask(scores, count)] == expected
    counts = data.draw(st.lists(st.integers(0, size), min_size=len(rows), max_size=len(rows)))
    for each in (counts, torch.tensor(counts)):
        got = [row.nonzero().flatten().tolist() for row in top_mask(scores, each)]
        assert got == [best(row, n) for row, n in zip(rows, counts, strict=True)]
    assert [sorted(order) for order in by_score(scores).tolist()] == [list(range(size))] * len(rows)
    # where the number is for the device to say
    share = max(counts) / size
    mask = best_share(scores.float(), torch.tensor(counts)[:, None], share)
    assert torch.equal(mask, top_mask(scores, counts))


def test_not_a_number_is_never_taken_before_a_number_and_what_is_masked_never_before_it():
    scores = torch.arange(20.0)[None]
    scores[0, 3] = NAN
    assert [top_indices(scores, 10)[0].tolist() for _ in range(3)] == [[*range(10, 20)]] * 3
    assert top_indices(scores, 20)[0].tolist() == [*range(20)]
    scores[0, 10:] = -INF  # no candidates
    assert top_indices(scores, 10)[0].tolist() == [*range(10)]


def test_indices_are_always_written():
    mask = torch.tensor([[True, False, True, True], [False, False, False, True]])
    for _ in range(3):
        torch.full((2, 4), 10**12)  # what memory given back would hold
        assert mask_to_indices(mask, 3).tolist() == [[0, 2, 3], [3, 0, 0]]
    indices, valid = right_aligned_indices(mask, [3, 1])
    assert indices[0].tolist() == [0, 2, 3] and valid.tolist() == [[True] * 3, [False, False, True]]
    assert indices[1, 2] == 3 and right_aligned_indices(mask[:, 2:], [2, 1])[0].shape == (2, 2)


@pytest.mark.parametrize("first", [0, 1, 3])
def test_rows_of_sets_that_are_parts_of_longer_ones(first):
    whole = torch.randn(4, 9, 6, generator=torch.Generator().manual_seed(0))
    part, index = whole[:, first:], torch.tensor([[0, 5], [2, 1], [5, 5], [0, 3]])
    assert flat_rows(part)[0].data_ptr() == part.data_ptr(), "nothing is copied"
    assert torch.equal(pick_rows(part, index), torch.stack([p[i] for p, i in zip(part, index, strict=True)]))
    turned = whole.transpose(1, 2)
    assert torch.equal(pick_rows(turned, index), torch.stack([p[i] for p, i in zip(turned, index, strict=True)]))
    assert pick_rows(part, index[:, :0]).shape == (4, 0, 6)


def test_on_device_takes_lists_and_tensors():
    for values in ([[1, 2], [3, 4]], torch.tensor([[1, 2], [3, 4]])):
        assert on_device(values, torch.device("cpu")).tolist() == [[1, 2], [3, 4]]
