"""EVS beyond its golden cases."""

import pytest
import torch

import accelerate_methods
from accelerate_methods.engine.sequences import assemble, uncompressed
from accelerate_methods.evs import EVS, vllm_positions
from accelerate_methods.hosts.layouts import video_item
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.shapes import ItemShape
from tests.support.items import make_item


def video(features):
    return video_item(features, torch.zeros(features.shape[-1]), "one_token", "spatial_unpad")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kept(features, rate):
    return EVS(pruning_rate=rate).compress(video(features)).positions.tolist()


@pytest.mark.parametrize(
    ("frames", "each", "rate", "count"),
    [(1, 196, 0.75, 196), (2, 196, 0.75, 196), (8, 196, 0.75, 392), (32, 196, 0.7, 1881), (7, 5, 0.0, 35)],
)
def test_counts_are_known_beforehand(frames, each, rate, count):
    assert EVS(pruning_rate=rate).count(ItemShape(frames, each)) == count
    if each < 10:
        assert len(kept(randn(frames, each, 4), rate)) == count


def test_what_changes_most_in_the_whole_video_stays():
    features = randn(1, 9, 16).repeat(4, 1, 1)
    features[2, 4] = -features[2, 4]  # there and back again: two changes
    features[3, 7] += 0.5 * randn(16, seed=1)
    assert kept(features, 1 - 12.5 / 36) == [*range(9), 2 * 9 + 4, 3 * 9 + 4, 3 * 9 + 7]


def test_of_tokens_that_change_alike_the_earlier_ones_stay():
    features = randn(1, 6, 24).repeat(5, 1, 1)
    assert kept(features, 0.5) == list(range(15))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_not_a_number_goes_first(dtype):
    features = randn(6, 5, 8).to(dtype)
    features[4, 2] = torch.nan
    assert not {22, 27} & set(kept(features, 0.1)), "neither it nor what is compared with it"


@pytest.mark.parametrize("layout", ["one_token", "grid", "frame", "no_token", "flat video"])
def test_one_frame_or_no_pruning_changes_nothing(layout):
    for frames, rate in ((1, 0.9), (7, 0.0)):
        item = make_item(layout, frames, 5, "random", torch.float32, 0)
        sequence = assemble(item, EVS(pruning_rate=rate).compress(item))
        assert torch.equal(sequence.tokens, uncompressed(item).tokens)


def test_vllms_positions_of_a_prompt_that_begins_with_a_video():
    media = torch.tensor([[0, 1, 1, 1, 1, 2], [0, 1, 1, 2, 2, 3], [0, 1, 1, 1, 2, 2], [0, 1, 0, 0, 0, 0], [0] * 6])
    positions, delta = vllm_positions(torch.tensor([9, 1, 5, 5, 5, 2, 7]), [media], 1)
    assert positions[:, :6].tolist() == media[:3].tolist() and positions[:, 6].tolist() == [4] * 3 and delta == -2


def test_vllms_positions_of_an_image_of_qwen3():
    image = torch.tensor([[0] * 4, [0, 0, 1, 1], [0, 1, 0, 1], [0] * 4, [0] * 4])
    positions, delta = vllm_positions(torch.tensor([9, 1, 5, 5, 5, 5, 2, 7]), [image], 1)
    assert positions[1].tolist() == [0, 1, 2, 2, 3, 3, 4, 5] and delta == -2


@pytest.mark.parametrize("wrong", [{"pruning_rate": 1}, {"pruning_rate": -0.1}, {"retention_ratio": 0.3}])
def test_refuses(wrong):
    with pytest.raises(MethodError, match="evs"):
        accelerate_methods.get("evs", **wrong)


def test_the_name_in_vllm():
    assert accelerate_methods.get("evs", video_pruning_rate=0.5) == EVS(pruning_rate=0.5)
