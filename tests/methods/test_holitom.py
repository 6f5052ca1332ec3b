"""HoliTom beyond its golden cases: against a slow restatement, windows by trying all of them, and its edges."""

import itertools
import math

import pytest
import torch

import accelerate_methods
from accelerate_methods.engine.sequences import assemble, uncompressed
from accelerate_methods.holitom import HoliTom, best_windows, plan_windows, static_since, still_counts
from accelerate_methods.hosts.layouts import video_item
from accelerate_methods.stages.errors import MethodError
from tests.support.items import make_item


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def video(frames=9, side=6, width=16, layout="one_token", seed=0, still=0.7):
    """Two scenes in which a share of the places hardly changes."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(2, side * side, width, generator=generator)
    static = torch.rand(2, side * side, 1, generator=generator) < still
    scene = torch.arange(frames) * 2 // frames
    noise = torch.randn(frames, side * side, width, generator=generator)
    features = torch.where(static[scene], base[scene] + 0.25 * noise, noise)
    item = video_item(features, torch.randn(width, generator=generator), layout, "spatial_unpad")
    item.signals = {"received_attention": torch.rand(frames, side * side, generator=generator)}
    return item


def static(similarity, tau, start, end):
    """[N] whether each place is static from frame ``start`` to ``end``."""
    return (similarity[start:end] > tau).all(0)


@pytest.mark.parametrize(("seed", "longest"), itertools.product(range(6), [2, 3, 1024]))
def test_windows_save_the_most_there_is_to_save(seed, longest):
    similarity = torch.rand(6, 10, generator=torch.Generator().manual_seed(seed))
    windows, saved = best_windows(still_counts(static_since(similarity, 0.3)).tolist(), longest)

    def saves(cut):
        return sum(int(static(similarity, 0.3, s, e).sum()) * (e - s) for s, e in cut)

    cuts = []
    for chosen in itertools.product([False, True], repeat=6):
        ends = [i for i, last in enumerate(chosen) if last] + [6]
        cuts.append(list(zip([0, *(end + 1 for end in ends[:-1])], ends, strict=True)))
    allowed = [cut for cut in cuts if all(end - start < longest for start, end in cut)]
    assert windows in allowed and saves(windows) == saved == max(map(saves, allowed))


def test_of_equal_windows_the_last_is_shorter():
    assert best_windows([[0] * 4] * 4) == ([(0, 0), (1, 1), (2, 2), (3, 3)], 0)
    equal = still_counts(static_since(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 0.5)).tolist()
    assert best_windows(equal) == ([(0, 1), (2, 2)], 1), "either pair saves one token"


def slowly(item, ratio, tau, beta=0.6, k=7):
    """[(token, first frame or None of a static one)] in order, token by token in float64."""
    x, attention = item.features.double(), item.signals["received_attention"]
    frames, per_frame = x.shape[:2]
    similarity = torch.cosine_similarity(x[1:], x[:-1], dim=-1)
    windows, saved = best_windows(still_counts(static_since(similarity, tau)).tolist())
    ratio = min(ratio / ((frames * per_frame - saved) / (frames * per_frame)), 1.0)
    out = []
    for start, end in windows:
        still = static(similarity, tau, start, end) if end > start else torch.zeros(per_frame, dtype=torch.bool)
        places = still.nonzero().flatten().tolist()
        means = [x[start : end + 1, place].mean(0) for place in places]
        peaks = round(len(places) * ratio)
        if peaks:
            far = [[float((a - b).square().mean().sqrt()) for b in means] for a in means]
            rho = [math.exp(-sum(d * d for d in sorted(row)[: min(k, peaks)]) / min(k, peaks)) for row in far]
            score = []
            for i, row in enumerate(far):
                denser = [d for j, d in enumerate(row) if rho[j] > rho[i]]
                score.append(rho[i] * (min(denser) if denser else max(map(max, far))))
            centres = sorted(sorted(range(len(means)), key=lambda i: -score[i])[:peaks])
            members = {c: [] for c in centres}
            for i in set(range(len(means))) - set(centres):
                members[min(centres, key=lambda c: far[i][c])].append(means[i])
            for c in centres:
                mean = torch.stack(members[c]).mean(0) if members[c] else None
                out.append((start, places[c], means[c] if mean is None else beta * means[c] + (1 - beta) * mean))
        for frame in range(start, end + 1):
            moving = (~still).nonzero().flatten().tolist()
            count = math.ceil(len(moving) * ratio)
            best = sorted(sorted(moving, key=lambda place: -attention[frame, place])[:count])
            out += [(frame, place, x[frame, place]) for place in best]
    return out


@pytest.mark.parametrize("layout", ["one_token", "grid"])
@pytest.mark.parametrize(("seed", "ratio"), [(0, 0.3), (1, 0.25), (2, 0.6)])
def test_equals_the_slow_way(layout, seed, ratio):
    item = video(layout=layout, seed=seed)
    compressed = HoliTom(retention_ratio=ratio).compress(item)
    assert any(count > 2 for count in compressed.info["static_per_window"]), "or there is nothing to see"
    expected = slowly(item, ratio, 0.8)
    places = torch.stack([item.positions[frame, place] for frame, place, _ in expected])
    assert torch.equal(compressed.positions, places)
    torch.testing.assert_close(compressed.tokens, torch.stack([token for *_, token in expected]).float())
    sequence = assemble(item, compressed)
    content = sequence.positions[sequence.is_content]
    assert torch.equal(content, places.sort().values if layout == "grid" else places)
    assert (~sequence.is_content).sum() == (len((places // 7).unique()) if layout == "grid" else 1)


def test_what_is_left_holds_what_it_was_made_of():
    item = video()
    compressed = HoliTom(retention_ratio=0.4).compress(item)
    owner, (frames, _) = compressed.owner, item.features.shape[:2]
    assert set(range(len(compressed.tokens))) <= set(owner.flatten().tolist())
    flat = item.features.flatten(0, 1)
    holders = torch.bincount(owner[owner >= 0])
    for number in (holders == 1).nonzero().flatten().tolist():
        torch.testing.assert_close(compressed.tokens[number], flat[(owner.flatten() == number).nonzero()[0, 0]])
    for start, end in compressed.info["windows"]:
        inside = owner[start : end + 1]
        shared = (inside == inside[0]).all(0) & (inside[0] >= 0)
        assert end == start or shared.any(), "static places of a window are one token"
    assert frames == 9


@pytest.mark.parametrize("layout", ["one_token", "grid", "frame", "no_token", "flat video"])
@pytest.mark.parametrize("frames", [1, 2, 7])
def test_any_budget_on_any_video(layout, frames):
    item = make_item(layout, frames, 5, "random", torch.float32, 0)
    everything = assemble(item, HoliTom(retention_ratio=1.0).compress(item))
    assert torch.equal(everything.tokens, uncompressed(item).tokens), "nothing changes"
    for ratio in (1e-6, 0.3, 0.999):
        kept = len(HoliTom(retention_ratio=ratio).compress(item).tokens)
        assert 1 <= kept <= ratio * item.num_tokens + 2 * frames


def test_something_stays_of_a_still_video():
    item = make_item("one_token", 8, 2, "constant", torch.float32, 0)
    compressed = HoliTom(retention_ratio=0.01).compress(item)
    assert compressed.info["windows"] == [(0, 7)] and compressed.info["static_per_window"] == [1]
    torch.testing.assert_close(compressed.tokens, item.features[0, :1])
    assert plan_windows([(0, 1), (2, 3)], [3, 4], 4, 0.1).dynamic == [1, 1, 0, 0], "another frame keeps one"


def test_tokens_that_are_not_numbers_are_no_static_ones():
    item = video()
    item.features[3, 5] = torch.nan
    compressed = HoliTom(retention_ratio=0.5).compress(item)
    spoilt = ~torch.isfinite(compressed.tokens).all(1)
    assert set(spoilt.nonzero().flatten().tolist()) <= {int(compressed.owner[3, 5])}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_about_the_same(dtype):
    item, half = video(seed=3), video(seed=3)
    half.features = half.features.to(dtype)
    compressed, whole = HoliTom(retention_ratio=0.5).compress(half), HoliTom(retention_ratio=0.5).compress(item)
    assert compressed.tokens.dtype == dtype and compressed.info["windows"] == whole.info["windows"]


def test_where_it_acts():
    assert HoliTom().stages == ("compress", "prefill") and HoliTom(inner=False).stages == ("compress",)
    assert HoliTom().prefill_layers(28) == (18,) and HoliTom().unmasked_layers(28) == ()
    assert HoliTom(k=4, causal_score_layer=False).unmasked_layers(28) == (3,)
    with pytest.raises(MethodError, match=r"k=18 is outside the allowed range \[0, 17\]"):
        HoliTom(k=18).prefill_layers(18)
    assert HoliTom().prefill_layers(18) == (11,), "at the same depth"


@pytest.mark.parametrize("wrong", [{"retention_ratio": 0}, {"k": 0}, {"r": 1.5}, {"tau": 2}, {"neighbours": 0}])
def test_refuses(wrong):
    with pytest.raises(MethodError, match="holitom"):
        accelerate_methods.get("holitom", **wrong)
