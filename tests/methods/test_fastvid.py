"""FastVID beyond the golden vectors: any setting on any video, its variants, its noise, what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import accelerate_methods
from accelerate_methods.stages.errors import MethodError
from tests.support.items import FEATURES, make_item

pytestmark = pytest.mark.usefixtures("one_thread")
VARIANTS = ("onevision", "llava_video", "qwen2_5_vl")


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=80, deadline=None)
@given(
    frames=st.integers(1, 12),
    side=st.sampled_from([1, 2, 4, 6]),
    ratio=st.sampled_from([0.001, 0.05, 0.1, 0.25, 0.5, 0.75, 0.99]),
    c=st.integers(1, 20),
    tau=st.sampled_from([-1.0, 0.0, 0.9, 1.0]),
    d=st.sampled_from([0.0, 0.1, 0.4, 1.0]),
    p=st.integers(1, 9),
    beta=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    kind=st.sampled_from(FEATURES),
)
def test_never_fails_and_stays_in_budget(variant, frames, side, ratio, c, tau, d, p, beta, kind):
    item = make_item("grid" if variant == "llava_video" else "one_token", frames, side, kind, torch.float32, 3)
    method = accelerate_methods.get(
        "fastvid", variant=variant, retention_ratio=ratio, c=c, tau=tau, d=d, p=p, beta=beta
    )
    compressed = method.compress(item)
    quota = method.frame_budget(side * side)
    kept = compressed.positions.shape[0]
    assert 1 <= kept <= quota * frames and torch.isfinite(compressed.tokens).all()
    if quota < side * side:
        info = compressed.info
        assert sum(info["segment_sizes"]) == frames and len(info["segment_sizes"]) >= min(c, frames)
        assert sum(info["salient_per_frame"]) + sum(info["context_per_frame"]) == kept
        if variant == "llava_video" and d <= 0.4 and p <= 2 and ratio <= 0.5:
            assert kept == quota * frames


def test_variant_follows_the_newlines():
    method = accelerate_methods.get("fastvid")
    for layout, variant in (("grid", "llava_video"), ("one_token", "onevision"), ("no_token", "onevision")):
        item = make_item(layout, 3, 5, "random", torch.float32, 0)
        assert method.compress(item).info["variant"] == variant


def test_tie_noise_is_its_own():
    item = make_item("one_token", 8, 5, "random", torch.float32, 0)
    method, state = accelerate_methods.get("fastvid", retention_ratio=0.4, tie_noise=1e-6), torch.get_rng_state()
    first, second = method.compress(item), method.compress(item)
    assert torch.equal(first.tokens, second.tokens) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "wrong",
    [
        {"retention_ratio": 0.5, "tokens_per_frame": 3}, {"retention_ratio": None}, {"c": 0}, {"c": 1.5}, {"tau": 2},
        {"d": -0.1}, {"p": 0}, {"beta": 1.1}, {"tie_noise": -1}, {"variant": "qwen"},
    ],
)  # fmt: skip
def test_refuses(wrong):
    with pytest.raises(MethodError, match="fastvid"):
        accelerate_methods.get("fastvid", **wrong)
