"""DivPrune beyond its golden vectors."""

import pytest
import torch

import accelerate_methods
from accelerate_methods.divprune import DivPrune, keep_count
from accelerate_methods.engine.sequences import assemble, uncompressed
from accelerate_methods.hosts.layouts import flat_item, video_item
from accelerate_methods.ops.diversity import farthest_first
from accelerate_methods.stages.errors import MethodError
from tests.support.items import make_item


def method(**params):
    return accelerate_methods.get("divprune", **params)


@pytest.mark.parametrize(
    ("total", "ratio", "count"), [(576, 0.098, 56), (2340, 0.098, 229), (576, 64 / 576, 64), (5, 0.5, 2), (7, 0.5, 4)]
)
def test_counts_of_the_papers_tables(total, ratio, count):
    assert keep_count(total, ratio) == count
    assert DivPrune(retention_ratio=ratio).count(flat_item(torch.zeros(1, total, 1), None).shape) == count


def test_tokens_stay_in_their_order():
    features = torch.randn(1, 30, 8, generator=torch.Generator().manual_seed(0))
    compressed = method(tokens_per_image=9).compress(flat_item(features, None))
    order = farthest_first(features[0], 9)
    assert torch.equal(compressed.info["order"], order)
    assert torch.equal(compressed.positions, order.sort().values)
    assert torch.equal(compressed.tokens, features[0, compressed.positions])


@pytest.mark.parametrize("layout", ["one_token", "grid", "frame", "anyres"])
def test_one_newline_is_part_of_what_is_kept(layout):
    item = make_item(layout, 4, 5, "random", torch.float32, 0)
    sequence = assemble(item, method(retention_ratio=0.25).compress(item))
    assert len(sequence.tokens) == keep_count(item.length, 0.25)
    assert (~sequence.is_content).sum() == 1 and not sequence.is_content[-1]
    whole = assemble(item, method(tokens_per_image=item.length).compress(item))
    assert torch.equal(whole.tokens, uncompressed(item).tokens)


def test_all_frames_of_a_video_are_one_set():
    """Frames that repeat each other keep nothing of their own."""
    frame = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0))
    item = video_item(frame.repeat(5, 1, 1), torch.zeros(8), "no_token", "spatial_unpad")
    kept = method(tokens_per_image=16).compress(item).positions
    assert sorted((kept % 16).tolist()) == list(range(16))


def test_at_least_one_token_stays():
    item = make_item("frame", 3, 2, "random", torch.float32, 0)
    for params in ({"retention_ratio": 1e-6}, {"tokens_per_image": 1}):
        assert len(method(**params).compress(item).tokens) == 1


@pytest.mark.parametrize("wrong", [{"retention_ratio": 0}, {"tokens_per_image": 0}, {"tokens_per_image": 2.5}])
def test_refuses(wrong):
    with pytest.raises(MethodError, match="divprune"):
        method(**wrong)


def test_the_name_of_the_released_variable():
    assert method(subset_ratio=0.3) == DivPrune(retention_ratio=0.3)
