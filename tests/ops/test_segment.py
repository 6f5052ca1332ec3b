"""Comparing frames place by place."""

import pytest
import torch

from accelerate_methods.ops.segment import place_similarity, window_products


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("frames", range(1, 10))
def test_each_place_is_compared_with_the_next_frame(frames):
    features = randn(frames, 5, 12)
    expected = torch.cosine_similarity(features[1:].double(), features[:-1].double(), dim=-1)
    torch.testing.assert_close(place_similarity(features), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("width", [7, 24, 896])
def test_equal_tokens_tie(width):
    assert (place_similarity(randn(1, 30, width).repeat(8, 1, 1)) == 1).all()


def test_tokens_without_a_direction_are_like_none():
    features = randn(3, 2, 4)
    features[1, 0] = 0
    assert place_similarity(features)[:, 0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("size", "step"), [(4, 4), (4, 3), (2, 1)])
def test_windows_that_lack_frames_are_filled_up_with_zeros(size, step):
    features = randn(6, 3, 8).double()
    products = window_products(features, size, step)
    padded = torch.cat([features, torch.zeros(size, 3, 8)])
    for number, found in enumerate(products):
        window = padded[number * step : number * step + size].transpose(0, 1)
        torch.testing.assert_close(found, window @ window.mT, atol=1e-5, rtol=1e-5)
