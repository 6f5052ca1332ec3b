"""DyCoke beyond its golden vectors: TTM on every layout and frame count, DP step by step, both on a tiny model."""

from types import SimpleNamespace

import pytest
import torch

import accelerate_methods
from accelerate_methods import MethodError, accelerate, record
from accelerate_methods.dycoke import DyCoke, reference_similarity, temporal_tokens
from accelerate_methods.engine.sequences import assemble
from accelerate_methods.hosts.layouts import video_item

OV, VIDEO, IMAGE = "tiny-llava-onevision", "tiny-llava-video", -200
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def features(frames, per_frame, width=24, seed=0):
    """Frames that resemble each other, as a video's do."""
    generator = torch.Generator().manual_seed(seed)
    scene = torch.randn(per_frame, width, generator=generator)
    return scene + 0.5 * torch.randn(frames, per_frame, width, generator=generator)


# -- TTM ---------------------------------------------------------------------------------------------------------------


def by_the_spec(values, k):
    """Section 3 frame by frame, in float64."""
    frames, per_frame, _ = values.shape
    keep, out, counts = int((1 - k) * per_frame), [], []
    for f in range(frames - frames % 2):
        reference = f - 1 if f % 2 else f - 2 if f % 4 == 2 and f - 2 < frames - 4 else None
        places = range(per_frame)
        if reference is not None:
            one, other = values[f].double(), values[reference].double()
            cosine = (one * other).sum(-1) / (one.norm(dim=-1) * other.norm(dim=-1))
            places = sorted(places, key=lambda n, c=cosine: c[n].item())[:keep]
        counts.append(len(places))
        out += [f * per_frame + n for n in places]
    return out, counts + [0] * (frames % 2)


@pytest.mark.parametrize("k", [0.0, 0.3, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("frames", [2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 16])
def test_tokens_are_those_of_the_spec(frames, k):
    for width in (7, 24):
        values = features(frames, 20, width, seed=frames)
        kept, counts = temporal_tokens(values, k)
        assert (kept.tolist(), counts) == by_the_spec(values, k)


def test_by_hand():
    """Two places; frames 1 and 2 look at frame 0, frame 3 at frame 2, frame 5 at frame 4."""
    right, up, left = [1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]
    values = torch.tensor([[right, up], [right, left], [up, up], [up, left], [left, up], [up, up]])
    similarity = reference_similarity(values)
    assert similarity.tolist() == [[0, 0], [1, 0], [0, 1], [1, 0], [0, 0], [0, 1]]
    kept, counts = temporal_tokens(values, 0.5)
    assert kept.tolist() == [0, 1, 3, 4, 7, 8, 9, 10] and counts == [2, 1, 1, 1, 2, 1]


@pytest.mark.parametrize(
    ("frames", "k", "total"),
    [(32, 0.7, 3098), (32, 0.5, 4018), (32, 0.3, 4915), (8, 0.7, 878), (12, 0.7, 1248), (16, 0.7, 1618)],
)  # fmt: skip
def test_token_counts_of_the_spec(frames, k, total):
    kept, counts = temporal_tokens(features(frames, 196, 4), k)
    assert len(kept) == sum(counts) == total


def test_one_frame_stays():
    item = video_item(features(1, 9), torch.ones(24), "one_token", "spatial_unpad")
    sequence = assemble(item, accelerate_methods.get("dycoke").compress(item))
    assert torch.equal(sequence.tokens, item.dense()) and sequence.owner.tolist() == [list(range(9))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_tokens_tie(dtype):
    """A still picture: the lower places stay, whatever their length; zeros resemble nothing and come first."""
    still = features(1, 32)[:1].expand(8, -1, -1).clone().to(dtype)
    still[:, 20] = 0
    kept, counts = temporal_tokens(still, 0.875)
    assert counts == [32, 4, 4, 4, 32, 4, 32, 4]
    assert kept[32:36].tolist() == [52, 32, 33, 34] and kept[-4:].tolist() == [7 * 32 + n for n in (20, 0, 1, 2)]


def test_length_of_a_token_does_not_matter():
    values = features(8, 16)
    scaled = values * torch.rand(8, 16, 1, generator=torch.Generator().manual_seed(1)).add(0.1)
    assert torch.equal(temporal_tokens(values, 0.6)[0], temporal_tokens(scaled, 0.6)[0])


def test_a_window_knows_no_other():
    values = features(12, 16)
    other = values.clone()
    other[4:8] = features(4, 16, seed=5)
    (kept, counts), (changed, _) = temporal_tokens(values, 0.6), temporal_tokens(other, 0.6)
    first, last = sum(counts[:4]), sum(counts[8:])
    assert torch.equal(kept[:first], changed[:first]) and torch.equal(kept[-last:], changed[-last:])
    assert not torch.equal(kept, changed)


@pytest.mark.parametrize("layout", ["one_token", "no_token", "flat", "grid", "frame"])
def test_order_and_newlines(layout):
    values, newline = features(7, 9), torch.full((24,), 9.0)
    merge, position = ("flat", "one_token") if layout == "flat" else ("spatial_unpad", layout)
    item = video_item(values, newline, position, merge)
    kept, counts = temporal_tokens(values, 0.6)
    sequence = assemble(item, accelerate_methods.get("dycoke", k=0.6).compress(item))
    content = sequence.tokens[sequence.is_content]
    flat = values.flatten(0, 1)
    newlines = (~sequence.is_content).nonzero().squeeze(1)
    if layout in ("one_token", "no_token", "flat"):  # by rising similarity, as the official code
        assert torch.equal(content, flat[kept])
        assert newlines.tolist() == ([len(kept)] if layout == "one_token" else [])
    else:  # our extension: everything in its place
        assert torch.equal(content, flat[kept.sort().values])
        assert (sequence.positions.diff() > 0).all() and len(newlines) > 0
        assert torch.equal(sequence.tokens[newlines], newline.expand(len(newlines), -1))
    held = sequence.owner.flatten()
    assert torch.equal((held >= 0).nonzero().squeeze(1), kept.sort().values)
    assert torch.equal(sequence.tokens[held[kept]], flat[kept])
    assert (sequence.owner >= 0).sum(1).tolist() == counts == [9, 3, 3, 3, 9, 3, 0]


# -- DP ----------------------------------------------------------------------------------------------------------------


class Steps:
    """Feeds rows of attention [B, S] (one head unless three-dimensional) to ``decode``, one step after the other."""

    def __init__(self, visual, **params):
        self.method, self.memory = accelerate_methods.get("dycoke", **params), {}
        self.visual = torch.as_tensor(visual, dtype=torch.bool)

    def __call__(self, scores):
        scores = scores if scores.dim() == 3 else scores[:, None]
        visual = torch.nn.functional.pad(self.visual, (0, scores.shape[-1] - self.visual.shape[1]))
        return self.method.decode(SimpleNamespace(visual=visual, memory=self.memory, attention=lambda: scores))


def rows(*values):
    return torch.tensor(values, dtype=torch.float32)


def test_hides_the_least_seen():
    """Five visual keys, of which the last is never hidden; half of the other four stay."""
    steps = Steps([[0, 0, 1, 1, 1, 1, 1, 0, 0]], p=0.5)
    keep = steps(rows([9, 9, 3, 1, 2, 4, 0, 9, 9]))
    assert keep.dtype == torch.bool and keep.tolist() == [[True, True, True, False, False, True, True, True, True]]
    # another step, other tokens: the hidden ones come back, and generated ones are always seen
    keep = steps(rows([0, 0, 0, 4, 3, 0, 5, 0, 0, 0]))
    assert keep.tolist() == [[True, True, False, True, True, False, True, True, True, True]]
    assert steps.memory["dycoke.similarity"].item() == pytest.approx(10 / (30**0.5 * 5))


def test_similar_attention_hides_nothing():
    steps = Steps([[0, 1, 1, 1, 1, 1, 0]], p=0.5)
    first = rows([0, 4, 3, 2, 1, 0, 0])
    assert not steps(first).all()
    grown = torch.nn.functional.pad(first * 7, (0, 1), value=5.0)
    assert steps(grown).all(), "the angle counts, not the length, and not the new token"
    assert not steps(rows([0, 1, 2, 3, 4, 0, 0, 0, 0])).all(), "compared with the last step, not with the first"
    always = Steps([[0, 1, 1, 1, 1, 1, 0]], p=0.5, threshold=1.5)
    assert not always(first).all() and not always(first).all()
    never = Steps([[0, 1, 1, 1, 1, 1, 0]], p=0.5, threshold=0.0)
    assert never(first).all(), "the first step counts as similarity 0"


def test_only_visual_attention_is_compared():
    steps = Steps([[0, 1, 1, 1, 0]], p=0.5)
    steps(rows([1, 2, 1, 0, 1]))
    steps(rows([50, 2, 1, 70, 90, 1]))
    assert steps.memory["dycoke.similarity"].item() == pytest.approx(1)


def test_heads_are_averaged():
    scores = torch.tensor([[[0.0, 9, 0, 4, 0], [0, 0, 0, 4, 0], [0, 0, 8, 4, 0]]])  # means 3, 8/3, 4
    keep = Steps([[1, 1, 1, 1, 1]], p=0.75)(scores)
    assert keep.tolist() == [[False, False, False, True, True]]


@pytest.mark.parametrize(("p", "count"), [(0.7, 464), (0.8, 309), (0.9, 154), (1.0, 0), (0.3, 1082)])
def test_share_is_truncated_as_in_double_precision(p, count):
    visual = torch.zeros(1, 1600)
    visual[:, 14:1562] = 1  # 1547 and the last one
    scores = torch.rand(1, 1600, generator=torch.Generator().manual_seed(0))
    keep = Steps(visual, p=p)(scores)
    assert count == int(1547 * (1 - p)) and keep.sum().item() == 1600 - 1547 + count
    assert keep[:, :14].all() and keep[:, 1561:].all()


def test_equal_scores_keep_the_first():
    assert Steps([[1, 1, 1, 1, 1]], p=0.5)(torch.ones(1, 5)).tolist() == [[True, True, False, False, True]]


def test_each_sample_decides_for_itself():
    generator = torch.Generator().manual_seed(0)
    visual = torch.zeros(4, 40)
    visual[0, 3:33], visual[1, 20:29], visual[3, 7] = 1, 1, 1  # the third has none, the last a single one
    batch, singles = Steps(visual, p=0.6), [Steps(visual[i : i + 1], p=0.6) for i in range(4)]
    similar = torch.rand(4, 40, generator=generator)
    for t in range(4):
        scores = torch.rand(4, 40 + t, generator=generator)
        scores[1, :40] = similar[1]  # the second sample's attention does not change
        keep = batch(scores)
        assert torch.equal(keep, torch.cat([one(scores[i : i + 1]) for i, one in enumerate(singles)]))
        hidden = (~keep).sum(1).tolist()
        assert hidden == [18, 5 if t == 0 else 0, 0, 0]  # 29 - int(29 * 0.4), 8 - int(8 * 0.4)


def test_nothing_to_hide():
    assert Steps([[0, 1, 1, 1, 0]], p=0.0)(torch.rand(1, 5)) is None


def test_a_cropped_cache():
    """Assisted decoding takes tokens back: the step after it has fewer keys than the one before."""
    steps = Steps([[0, 1, 1, 1, 0]], p=0.5)
    steps(rows([0, 3, 2, 1, 0, 0, 0]))
    assert steps(rows([0, 3, 2, 1, 0, 0])).all()


# -- parameters --------------------------------------------------------------------------------------------------------


def test_stages():
    assert DyCoke().stages == ("compress", "decode")
    assert DyCoke(ttm=False).stages == ("decode",) and DyCoke(dp=False).stages == ("compress",)
    assert DyCoke(l=3).decode_layer(28) == 3 and DyCoke(l=30).decode_layer(28) == 28


@pytest.mark.parametrize(
    "wrong",
    [{"k": -0.1}, {"k": 1.1}, {"p": 2}, {"p": "0.7"}, {"l": 0}, {"l": 1.5}, {"threshold": -2}, {"ttm": "no"},
     {"dp": None}, {"ttm": False, "dp": False}],
)  # fmt: skip
def test_refuses(wrong):
    with pytest.raises(MethodError, match="dycoke"):
        accelerate_methods.get("dycoke", **wrong)


def test_composition():
    pipeline = accelerate_methods.resolve(
        ["fastvid", {"method": "dycoke", "ttm": False}, {"method": "random_prefill", "layer": 1}]
    )
    assert pipeline.compress.name == "fastvid" and pipeline.decode.name == "dycoke"
    with pytest.raises(MethodError, match="both act at the compress stage"):
        accelerate_methods.resolve("fastvid+dycoke")


# -- on a model --------------------------------------------------------------------------------------------------------


def pixels(count, seed=0):
    return torch.randn(count, 3, 384, 384, generator=torch.Generator().manual_seed(seed)) * 0.5


def prompts(*texts):
    """A batch of prompts, right-padded with its mask."""
    longest = max(map(len, texts))
    padded = torch.tensor([[*t, *[0] * (longest - len(t))] for t in texts])
    return padded, torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in texts])


def answer(model, prompt, frames=None, mask=None, modality="video", **kwargs):
    """Ids and logits [B, steps, V] of a generation; ``frames`` holds one tensor per placeholder."""
    visual = {} if frames is None else {"images": frames, "modalities": [modality] * len(frames)}
    out = model.generate(
        prompt, attention_mask=mask, **visual, **GREEDY, **kwargs, return_dict_in_generate=True, output_logits=True
    )
    return out.sequences, torch.stack(out.logits, 1)


PROMPT = torch.tensor([[5, IMAGE, 7, 8, 9]])


@pytest.fixture
def hidden(monkeypatch):
    """Counts of hidden keys [B] per decode step, and whether every step hid visual keys only."""
    seen, original = [], DyCoke.decode

    def decode(self, step):
        keep = original(self, step)
        assert not (~keep & ~step.visual).any()
        seen.append((~keep).sum(1).tolist())
        return keep

    monkeypatch.setattr(DyCoke, "decode", decode)
    return seen


def test_dp_leaves_the_prompt_and_the_first_token_alone(tiny, hidden):
    model, video = tiny(OV), [pixels(8)]
    with accelerate(model, "dycoke", threshold=2), record() as requests:
        _, both = answer(model, PROMPT, video)
    with accelerate(model, "dycoke", dp=False):
        _, ttm = answer(model, PROMPT, video)
    torch.testing.assert_close(both[:, 0], ttm[:, 0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(both[:, 1], ttm[:, 1], atol=1e-4)
    assert hidden == [[877 - int(877 * 0.3)]] * 5
    sample = requests[0].samples[0]
    assert sample.visual_tokens_after == 878 and requests[0].layer_lengths(0) == [878 + 1 + 4] * 6
    assert sample.items[0].info["tokens_per_frame"] == [196, 58, 58, 58, 196, 58, 196, 58]


@pytest.mark.parametrize("name", [OV, VIDEO])
def test_batch_of_videos_equals_each_alone(name, tiny, hidden):
    model, videos = tiny(name), [pixels(9, seed=1), pixels(2, seed=2), pixels(1, seed=3)]
    batch, mask = prompts([5, IMAGE, 7, 8, 9], [IMAGE, 9], [5, 6, IMAGE], [5, 6, 7])
    for params in ({}, {"threshold": 2.0}, {"ttm": False}):
        with accelerate(model, "dycoke", p=0.9, **params):
            ids, logits = answer(model, batch, videos, mask)
            together = [*hidden]
            for row in range(4):
                hidden.clear()
                own = batch[row : row + 1, : int(mask[row].sum())]
                one_ids, one = answer(model, own, videos[row : row + 1] if row < 3 else None)
                torch.testing.assert_close(logits[row], one[0], atol=1e-4, rtol=1e-4)
                assert torch.equal(ids[row], one_ids[0])
                assert [h[0] for h in hidden] == ([] if row == 3 else [h[row] for h in together])
            hidden.clear()


def test_images_and_text_are_left_alone(tiny, hidden):
    model = tiny(OV)
    for frames, prompt in ((None, torch.tensor([[5, 6, 7]])), ([pixels(1)], PROMPT)):
        ids, dense = answer(model, prompt, frames, modality="image")
        with accelerate(model, "dycoke"):
            same_ids, same = answer(model, prompt, frames, modality="image")
        torch.testing.assert_close(same, dense, atol=1e-5, rtol=1e-5)
        assert torch.equal(same_ids, ids)
    assert hidden == [], "no decode step was looked at"


def test_an_image_beside_a_video_keeps_its_keys(tiny, hidden):
    model, prompt = tiny(OV), torch.tensor([[5, IMAGE, 6, IMAGE, 7]])
    with accelerate(model, "dycoke", threshold=2, p=1):
        model.generate(prompt, images=[pixels(1), pixels(4, seed=1)], modalities=["image", "video"], **GREEDY)
    assert hidden == [[2 * 196 + 2 * 58 - 1]] * 5, "all of the video but its last token"


def test_state_is_fresh_in_every_request(tiny, hidden):
    model, videos = tiny(OV), [pixels(6, seed=1), pixels(3, seed=2)]
    with accelerate(model, "dycoke"):
        first = answer(model, PROMPT, videos[:1])
        answer(model, PROMPT, videos[1:])  # another visual length: the official code stops here
        again = answer(model, PROMPT, videos[:1])
    assert all(map(torch.equal, first, again))
    assert hidden[:5] == hidden[10:] and hidden[0] == hidden[10] != [0]


def test_no_dp_from_the_last_layer_on(tiny, hidden):
    model, video = tiny(OV), [pixels(4)]
    with accelerate(model, "dycoke", l=6):
        above = answer(model, PROMPT, video)
    with accelerate(model, "dycoke", dp=False):
        ttm = answer(model, PROMPT, video)
    assert hidden == [] and all(map(torch.equal, above, ttm))


@pytest.mark.parametrize("dp", [True, False])
def test_together_with_a_prefill_method(tiny, dp, hidden):
    model, methods = tiny(OV), [{"method": "dycoke", "dp": dp, "threshold": 2}, "random_prefill"]
    with accelerate(model, methods, **{"random_prefill.layer": 2}), record() as requests:
        answer(model, PROMPT, [pixels(8)])
    length, cut = 878 + 1 + 4, 878 - 878 // 4
    assert requests[0].layer_lengths(0) == [length] * 2 + [length - cut] * 4
    left = 878 // 4 - 1  # of which DP may hide
    assert hidden == ([[left - int(left * 0.3)]] * 5 if dp else [])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    from llava.model.builder import load_pretrained_model
    from tests.conftest import CHECKPOINTS

    _, model, _, _ = load_pretrained_model(
        str(CHECKPOINTS / OV), device_map="cpu", torch_dtype=dtype, attn_implementation="sdpa", method="dycoke"
    )
    ids, logits = answer(model, PROMPT, [pixels(5).to(getattr(torch, dtype))])
    assert ids.shape == (1, 6) and torch.isfinite(logits).all()
