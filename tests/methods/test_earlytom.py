"""EarlyTom beyond its golden cases: against a slow restatement, its edges, several videos, every host."""

import itertools
import math

import pytest
import torch

import accelerate_methods
from accelerate_methods import MethodError, accelerate, record
from accelerate_methods.earlytom import (
    ATTENTION,
    best_of_windows,
    frame_groups,
    frame_products,
    frame_similarity,
    select,
)
from accelerate_methods.stages.frames import FrameStep, mixed
from tests.support import qwen_inputs as qwen
from tests.support.native_models import expanded, native_model, tree_model

FRAMES = 12
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def clip(frames, places, width, seed=0, still=0.5):
    """Scenes of four frames, each frame a little off the one before."""
    generator = torch.Generator().manual_seed(seed)
    out = [torch.randn(places, width, generator=generator)]
    for number in range(1, frames):
        step = 2.0 if number % 4 == 0 else still * torch.rand(1, generator=generator)
        out.append(out[-1] + step * torch.randn(places, width, generator=generator))
    return torch.stack(out)


def slowly(frames, tau, longest, ema, mode="mixing"):
    """Groups and merged frames, step by step."""
    unit = frames / frames.norm(dim=-1, keepdim=True)

    def similar(one, two):
        return (unit[one] * unit[two]).sum(-1).mean()

    groups, start, running = [], 0, 1.0
    for i in range(1, len(frames)):
        running = ema * similar(start, i) + (1 - ema) * running
        if running < tau or i - start + 1 >= longest:
            groups.append((start, i - 1))
            start, running = i, 1.0
    groups.append((start, len(frames) - 1))
    out = []
    for first, last in groups:
        middle = list(range(first + 1, last))
        out.append(frames[first])
        if len(middle) == 1:
            out.append(frames[middle[0]])
        elif middle and mode == "naive_mixing":
            out.append(frames[middle].mean(0))
        j = 0
        while mode == "mixing" and j < len(middle) - 1:
            here = similar(middle[j], middle[j + 1])
            following = similar(middle[j + 1], middle[j + 2]) if j + 2 < len(middle) else None
            if here > similar(first, last) and (following is None or here > following):
                w = 1.0 if following is None else here / (here + following)
                out.append(w * frames[middle[j]] + (1 - w) * frames[middle[j + 1]])
                j += 2
            else:
                out.append(frames[middle[j]])
                j += 1
        if last > first:
            out.append(frames[last])
    return groups, torch.stack(out)


def step_of(frames, block=0, blocks=1):
    received = torch.rand(frames.shape[:2], generator=torch.Generator().manual_seed(1))
    return FrameStep(block, blocks, frames, 0, lambda: received)


@pytest.mark.parametrize(
    ("seed", "tau", "longest", "mode"),
    itertools.product(range(3), [0.4, 0.8], [4, 7, 99], ["mixing", "naive_mixing"]),
)
def test_groups_and_merged_frames(seed, tau, longest, mode):
    frames = clip(17, 9, 16, seed, still=0.4)
    method = accelerate_methods.get("earlytom", tau=tau, max_window=longest, merge_mode=mode, layers=(0,))
    merge = method.encode_frames(step_of(frames))
    groups, expected = slowly(frames, tau, longest, 0.9, mode)
    similar = frame_similarity(frame_products(frames))
    assert frame_groups(similar.tolist(), tau, longest, 0.9) == groups
    torch.testing.assert_close(mixed(frames, merge.mixing), expected, atol=1e-5, rtol=1e-5)
    again, _ = slowly(expected, tau, longest, 0.9)
    assert merge.info["groups"] == again, "the frames that are left are cut once more"
    assert (len(expected) < len(frames)) == (longest > 4), "groups of three frames keep them all"


def test_only_the_last_block_looks_at_attention():
    frames = clip(8, 4, 8)
    method = accelerate_methods.get("earlytom", layers=(1, 3), tau=-1.0, max_window=99)
    early = method.encode_frames(step_of(frames, block=1, blocks=5))
    assert not early.values and not early.info
    assert set(method.encode_frames(step_of(frames, block=3, blocks=5)).values) == {ATTENTION}
    assert method.encode_frames(step_of(frames[:1], block=1, blocks=5)) is None, "a single frame"
    assert method.encode_frames(step_of(frames[:1], block=3, blocks=5)).info["groups"] == [(0, 0)]


def test_the_last_frame_between_the_ends():
    still = clip(1, 4, 8).expand(6, -1, -1)
    shares = {}
    for keep in (False, True):
        method = accelerate_methods.get("earlytom", layers=(0,), max_window=99, keep_last_middle=keep)
        shares[keep] = method.encode_frames(step_of(still)).mixing.sum(0).tolist()
    assert shares[False] == [1, 1, 1, 1, 0, 1], "nothing resembles more than the ends do, and the last one is lost"
    assert shares[True] == [1] * 6
    moving = clip(6, 4, 8, still=0.05)
    moving[5] = clip(1, 4, 8, seed=5)[0] * 0.9 + moving[5] * 0.5
    pairs = accelerate_methods.get("earlytom", layers=(0,), tau=-1.0, max_window=99, keep_last_middle=True)
    mixing = pairs.encode_frames(step_of(moving)).mixing
    torch.testing.assert_close(mixing.sum(1), torch.ones(len(mixing)))
    assert (mixing.sum(0) > 0).all(), "every frame is in one that goes on"


@pytest.mark.parametrize(("size", "ratio"), itertools.product([1, 7, 49], [0.01, 0.2, 0.5, 0.93, 1.0]))
def test_the_choice_in_each_frame(size, ratio):
    attention = torch.rand(9, size, generator=torch.Generator().manual_seed(size))
    groups = [(0, 3), (4, 4), (5, 6), (7, 8)]
    mask, counts = select(attention, groups, ratio)
    assert mask.sum(1).tolist() == counts
    for frame in range(9):
        between = frame in (1, 2)
        if not between:
            best = attention[frame].argsort(descending=True)[: math.ceil(size * ratio)]
        else:
            count = max(1, round(size * ratio))
            ends = [len(part) for part in torch.arange(size).tensor_split(count)]
            windows = attention[frame].split(ends)
            firsts = [0, *itertools.accumulate(ends)]
            best = torch.tensor([first + int(w.argmax()) for first, w in zip(firsts, windows, strict=False)])
        assert mask[frame].nonzero().squeeze(1).tolist() == best.sort().values.tolist()


def test_scores_that_are_no_numbers():
    scores = torch.full((2, 10), torch.nan)
    assert best_of_windows(scores, 3).sum(1).tolist() == [3, 3]
    frames = clip(6, 4, 8)
    frames[3] = torch.nan
    assert len(accelerate_methods.get("earlytom", layers=(0,)).encode_frames(step_of(frames)).mixing) >= 3


def test_what_is_refused():
    tree = tree_model("tiny-llava-onevision")
    with pytest.raises(MethodError, match=r"block 8 of the vision encoder does not run; blocks are 0\.\.2"):
        accelerate(tree, "earlytom", layers=(8, 21, 23), k=2)
    with pytest.raises(MethodError, match=r"layers .* must rise"):
        accelerate_methods.get("earlytom", layers=(3, 1))
    with pytest.raises(MethodError, match="acts on video only"):
        accelerate(tree_model("tiny-llava-1.5"), "earlytom")


# -- whole models ------------------------------------------------------------------------------------------------------


def frames_of(side, count=FRAMES, seed=0):
    small = clip(count, 3, 64, seed, still=0.3).view(count, 3, 8, 8)
    return torch.nn.functional.interpolate(small, (side, side))


def asked(model, ids, **media):
    with record() as requests:
        out = model.generate(
            ids, **media, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    return torch.stack(out.logits, 1), requests[0]


def test_each_video_is_merged_for_itself_and_images_pass():
    tree = tree_model("tiny-llava-onevision")
    side = tree.get_vision_tower().image_size
    one, two, picture = frames_of(side, 7), frames_of(side, 5, seed=1), frames_of(side, 1, seed=2)
    together = torch.tensor([[5, -200, 6, -200, 7, -200, 8]])
    with accelerate(tree, "earlytom", k=2, retention_ratio=0.3):
        _, request = asked(
            tree, together, images=[one, picture, two], modalities=["video", "image", "video"],
            image_sizes=[(side, side)] * 3,
        )  # fmt: skip
        alone = [asked(tree, torch.tensor([[5, -200, 8]]), images=[v], modalities=["video"])[1] for v in (one, two)]
    first, middle, last = request.samples[0].items
    assert middle.tokens_after == middle.tokens_before
    for item, request in zip((first, last), alone, strict=True):
        (same,) = request.samples[0].items
        assert item.info["groups"] == same.info["groups"] and item.tokens_after == same.tokens_after
        assert torch.equal(item.kept, same.kept)
    assert first.tokens_before == 7 * first.owner.shape[1] and len(first.owner) == 7, "provenance is over all frames"
    assert first.info["frames"] < 7


@pytest.mark.parametrize("params", [{}, {"inner": False, "retention_ratio": 0.1}, {"retention_ratio": 1.0}])
def test_transformers_onevision_is_the_tree(params):
    tree, native = tree_model("tiny-llava-onevision"), native_model("tiny-llava-onevision")
    frames = frames_of(tree.get_vision_tower().image_size)
    method = accelerate_methods.get("earlytom", k=2, **params)
    with accelerate(tree, method):
        expected, one = asked(tree, torch.tensor([[5, -200, 9]]), images=[frames], modalities=["video"])
    ids = expanded([5, 8, 9], 8, FRAMES * 196 + 1)
    with accelerate(native, method):
        got, two = asked(native, ids, attention_mask=torch.ones_like(ids), pixel_values_videos=frames[None])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    (item,), (same,) = one.samples[0].items, two.samples[0].items
    assert torch.equal(item.owner, same.owner) and torch.equal(item.kept, same.kept)
    assert (item.tokens_before, item.tokens_after) == (same.tokens_before, same.tokens_after)
    assert int(item.kept.sum()) == item.tokens_after


@pytest.mark.parametrize("name", qwen.MODELS)
def test_qwen_models(name):
    """Where nothing is merged and everything stays, all is as without the method; else fewer frames go on."""
    model = qwen.qwen(name)
    blocks = len(model.model.visual.blocks)
    inputs = qwen.inputs(model, qwen.QUESTIONS["image and video"])
    dense = model(**inputs).logits[:, -1]
    with accelerate(model, "earlytom", k=2, retention_ratio=1.0):
        torch.testing.assert_close(model(**inputs).logits[:, -1], dense, atol=1e-4, rtol=1e-4)
    merging = accelerate_methods.get(
        "earlytom", k=2, tau=-1.0, max_window=99, layers=(0, blocks - 1), retention_ratio=0.6
    )
    with accelerate(model, merging), record() as requests:
        model(**inputs)
    items = {item.modality: item for item in requests[0].samples[0].items}
    assert items["image"].tokens_after == items["image"].tokens_before
    video = items["video"]
    assert video.info["initial_frames"] == 4 and video.info["frames"] == 3
    assert int(video.kept.sum()) == video.tokens_after < video.tokens_before


def test_a_batch_of_qwen_prompts_is_its_prompts_one_by_one():
    model, questions = qwen.qwen(qwen.QWEN25), ["two videos", qwen.TEXT, "image and video", "image"]
    together = qwen.inputs(model, *[qwen.QUESTIONS.get(question, question) for question in questions])
    first = {"pixel_values": 0, "pixel_values_videos": 0}
    with accelerate(model, "earlytom", k=2, tau=-1.0, max_window=99, retention_ratio=0.5):
        with record() as requests:
            batch = model(**together).logits[:, -1]
        for sample, question in enumerate(questions):
            alone = qwen.inputs(model, qwen.QUESTIONS.get(question, question))
            for pixels in {*first} & {*alone}:
                count = len(alone[pixels])
                alone[pixels] = together[pixels][first[pixels] : first[pixels] + count]
                first[pixels] += count
            with record() as own:
                one = model(**alone).logits[0, -1]
            torch.testing.assert_close(batch[sample], one, atol=1e-4, rtol=1e-4)
            for item, same in zip(requests[0].samples[sample].items, own[0].samples[0].items, strict=True):
                assert torch.equal(item.kept, same.kept) and item.tokens_after == same.tokens_after
                assert (item.tokens_after < item.tokens_before) == (item.modality == "video")
