"""Position ids of three axes for prompts that have lost visual tokens. Nothing here needs vLLM."""

import pytest
import torch

from accelerate_methods.hosts.vllm import grids

TEXT, IMAGE, VIDEO = 1, 8, 9


def prompt(*runs):
    """ids, and offset and rows of each run of media."""
    ids, items = [], []
    for token, count in runs:
        if token != TEXT:
            items.append((len(ids), count))
        ids += [token] * count
    return torch.tensor(ids), items


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_columns_are_exact_in_half_precision(dtype):
    numbers = torch.tensor([[0, 1, 255, 256, 257, 401], [2, 511, 512, 99, 4095, 65535], [3, 300, 9, 77, 5, 60000]])
    columns = grids.packed(numbers, torch.zeros(1, dtype=dtype))
    assert columns.dtype == dtype
    assert columns.shape == (6, grids.COLUMNS)
    assert torch.equal(grids.unpacked(columns), numbers)


def test_one_column_per_axis_would_not_be():
    """The check above can fail."""
    assert torch.tensor(257, dtype=torch.bfloat16).long().item() != 257


def test_text_stands_where_it_would_without_a_method():
    whole = grids.coordinates(2, 4, 4)
    _, dense = prompt((TEXT, 3), (IMAGE, 32), (TEXT, 2))
    _, short = prompt((TEXT, 3), (IMAGE, 5), (TEXT, 2))
    before, delta = grids.prompt_positions(37, [(*dense[0], whole)])
    after, short_delta = grids.prompt_positions(10, [(*short[0], whole)])
    assert torch.equal(before[:, -2:], after[:, -2:])
    assert before[:, -1].tolist() == [8, 8, 8]
    assert 37 + delta == 10 + short_delta == 9
    assert torch.equal(before[:, 3:35], 3 + whole)


def test_frames_may_be_longer_than_one_id():
    grid = grids.coordinates(3, 1, 2, per_frame=2.5)
    assert grid.tolist() == [[0, 0, 2, 2, 5, 5], [0] * 6, [0, 1] * 3]
    positions, _ = grids.prompt_positions(8, [(0, 6, grid)])
    assert positions[:, 6].tolist() == [6, 6, 6]


def case():
    ids, items = prompt((TEXT, 2), (IMAGE, 3), (TEXT, 4), (VIDEO, 5), (TEXT, 1))
    wholes = [grids.coordinates(1, 4, 4), grids.coordinates(3, 2, 3)]
    kept = [torch.tensor([0, 7, 15]), torch.tensor([1, 4, 9, 13, 17])]
    positions, _ = grids.prompt_positions(len(ids), [(*i, w) for i, w in zip(items, wholes, strict=True)])
    columns = [grids.packed(w[:, k], torch.zeros(1)) for w, k in zip(wholes, kept, strict=True)]
    return ids, positions, columns, wholes, kept


def test_encoded_tokens_keep_their_coordinates():
    ids, positions, columns, wholes, kept = case()
    found = grids.with_encoded(ids, (IMAGE, VIDEO), positions, 0, columns)
    assert torch.equal(found[:, 2:5], 2 + wholes[0][:, kept[0]])
    assert torch.equal(found[:, 9:14], 10 + wholes[1][:, kept[1]])
    text = torch.isin(ids, torch.tensor([TEXT]))
    assert torch.equal(found[:, text], positions[:, text])


@pytest.mark.parametrize("cut", range(1, 14))
def test_in_parts_or_again_comes_to_the_same(cut):
    """Chunked prefill, prefix-cache hits inside an item, and requests that were put off."""
    ids, positions, columns, _, _ = case()
    media = (IMAGE, VIDEO)
    whole = grids.with_encoded(ids, media, positions, 0, columns)
    rows = torch.cat(columns)
    before = int((ids[:cut] != TEXT).sum())
    first = [rows[:before]] if before else []
    in_parts = grids.with_encoded(ids, media, positions, 0, first)
    in_parts = grids.with_encoded(ids, media, in_parts, cut, [rows[before:]] if before < len(rows) else [])
    assert torch.equal(in_parts, whole)
    assert torch.equal(grids.with_encoded(ids, media, whole, 0, columns), whole)
    from_cache = grids.with_encoded(ids, media, positions, cut, [rows[before:]] if before < len(rows) else [])
    assert torch.equal(from_cache[:, cut:], whole[:, cut:])
