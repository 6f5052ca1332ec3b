"""VidCom2 beyond the golden vectors: a plain restatement, exact counts, newlines, what is not a number."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import accelerate_methods
from accelerate_methods import MethodError
from accelerate_methods.engine.sequences import assemble
from accelerate_methods.vidcom2 import frame_scales, token_scores
from tests.support.items import FEATURES, make_item

pytestmark = pytest.mark.usefixtures("one_thread")


def features(frames=5, per_frame=9, width=12):
    return torch.randn(frames, per_frame, width, generator=torch.Generator().manual_seed(0)) + 0.5


def test_scores_are_sums_of_gaussians_over_the_calm_channels():
    values = features().double()
    calm = values.flatten(0, 1).var(0, correction=0).topk(6, largest=False).indices
    unit = torch.nn.functional.normalize(values[..., calm], dim=-1)

    def gaussians(centre):
        squared = (unit - centre).square().sum(-1)
        return sum((-squared / (2 * alpha)).exp() for alpha in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    scores = token_scores(values.float())
    torch.testing.assert_close(scores.video.double(), gaussians(unit.mean((0, 1))), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.frame.double(), gaussians(unit.mean(1, keepdim=True)), atol=1e-5, rtol=1e-5)


def test_a_frame_that_stands_out_gets_more():
    video = torch.tensor([[3.0, 3.0], [1.0, 1.0], [3.0, 3.0], [3.0, 3.0]])
    torch.testing.assert_close(frame_scales(video, 0.2), 0.2 * torch.tensor([0.75, 1.75, 0.75, 0.75]))
    assert frame_scales(video, 0.9)[1] == 1
    torch.testing.assert_close(frame_scales(video[:1], 0.2), torch.tensor([0.2])), "a single frame: r"


@settings(max_examples=60, deadline=None)
@given(
    frames=st.integers(1, 9),
    side=st.sampled_from([1, 2, 4]),
    ratio=st.sampled_from([0.001, 0.1, 0.25, 0.6, 0.99]),
    kind=st.sampled_from(FEATURES),
    exact=st.booleans(),
)
def test_any_video(frames, side, ratio, kind, exact):
    item = make_item("one_token", frames, side, kind, torch.float32, 2)
    method = accelerate_methods.get("vidcom2", retention_ratio=ratio, exact=exact)
    kept = method.compress(item).positions
    assert kept.unique().equal(kept), "ascending, each once"
    if exact:
        assert len(kept) == method.count(item.shape) == max(frames, int(frames * side * side * ratio))
    else:
        assert torch.bincount(kept // (side * side), minlength=frames).min() >= 1
        assert method.count(item.shape) is None


def test_newlines_of_a_frame_follow_its_tokens():
    item = make_item("grid", 2, 3, "random", torch.float32, 0)
    sequence = assemble(item, accelerate_methods.get("vidcom2", retention_ratio=0.4).compress(item))
    per_frame = 12
    frames = [part.tolist() for part in (sequence.positions // per_frame, sequence.is_content)]
    expected = sorted(zip(*frames, strict=True), key=lambda row: (row[0], not row[1]))
    assert list(zip(*frames, strict=True)) == expected and sequence.is_content.logical_not().sum() == 6


def test_what_is_not_a_number_goes_first():
    item = make_item("one_token", 3, 4, "random", torch.float32, 0)
    item.features[1, :5] = torch.nan
    kept = accelerate_methods.get("vidcom2", retention_ratio=0.5).compress(item)
    assert torch.isfinite(kept.tokens).all()
    item.features[:] = torch.nan
    assert len(accelerate_methods.get("vidcom2", retention_ratio=0.5).compress(item).positions) == 24


def test_everything_is_kept_at_one():
    item = make_item("one_token", 3, 4, "random", torch.float32, 0)
    method = accelerate_methods.get("vidcom2", retention_ratio=1)
    assert len(method.compress(item).positions) == method.count(item.shape) == 48


@pytest.mark.parametrize("wrong", [{"retention_ratio": 0}, {"retention_ratio": 1.2}, {"exact": 3}])
def test_refuses(wrong):
    with pytest.raises(MethodError, match="vidcom2"):
        accelerate_methods.get("vidcom2", **wrong)
