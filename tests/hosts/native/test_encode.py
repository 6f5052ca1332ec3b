"""Encode methods on transformers' models: the same as on the tree, or as their parts computed one by one."""

import pytest
import torch

from accelerate_methods import MethodError, accelerate, record
from tests.support import qwen_inputs as qwen
from tests.support.hand_cut import Cut, dense_inputs, language_model
from tests.support.native_models import expanded, native_model, tree_model

SETTINGS = [
    ("tome", {"retention_ratio": 0.5}),
    ("tome", {"r": 60, "token_order": "first_patch", "variant": "lightcompress"}),
    ("tome", {"retention_ratio": 0.5, "unmerge": True}),
    ("evit", {"keep_rate": 0.6, "fuse_token": True, "token_order": "raster"}),
    ("evit", {"retention_ratio": 0.3}),
    ("tome+fastv", {"tome.retention_ratio": 0.5, "fastv.k": 1}),
    ("tome+visionzip", {"tome.retention_ratio": 0.6, "visionzip.retention_ratio": 0.2}),
]
each_setting = pytest.mark.parametrize(("method", "params"), SETTINGS)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def pictures(side, *shape):
    return torch.randn(*shape, 3, side, side, generator=torch.Generator().manual_seed(sum(shape)))


def assert_same_record(one, two):
    for item, same in zip(one[0].samples[0].items, two[0].samples[0].items, strict=True):
        assert torch.equal(item.owner, same.owner) and torch.equal(item.kept, same.kept)
        assert (item.tokens_before, item.tokens_after, item.grid) == (same.tokens_before, same.tokens_after, same.grid)
    assert one[0].samples[0].length == two[0].samples[0].length
    assert one[0].samples[0].dense_length == two[0].samples[0].dense_length


@each_setting
def test_llava_is_the_tree(method, params):
    tree, native = tree_model("tiny-llava-1.5"), native_model("tiny-llava-1.5")
    pixels = pictures(336, 1)
    with accelerate(tree, method, **params), record() as one:
        expected = tree.generate(
            torch.tensor([[5, -200, 8, 9]]), images=pixels, max_new_tokens=3, do_sample=False, eos_token_id=None,
            output_logits=True, return_dict_in_generate=True, pad_token_id=0,
        ).logits  # fmt: skip
    with accelerate(native, method, **params), record() as two:
        got = native.generate(
            input_ids=expanded([5, 7, 8, 9], 7, 576), pixel_values=pixels, max_new_tokens=3, do_sample=False,
            eos_token_id=None, output_logits=True, return_dict_in_generate=True, pad_token_id=0,
        ).logits  # fmt: skip
    torch.testing.assert_close(torch.cat(got), torch.cat(expected), atol=1e-4, rtol=1e-4)
    assert_same_record(one, two)
    assert all("forward" not in vars(layer) for layer in native.model.vision_tower.encoder.layers)


@pytest.mark.parametrize("name", ["tiny-llava-1.6", "tiny-llava-onevision"])
@each_setting
def test_tiles_are_the_tree(name, method, params):
    tree, native = tree_model(name), native_model(name)
    tower = tree.get_vision_tower()
    side, (width, height) = tower.image_size, tree.config.image_grid_pinpoints[0]
    views = 1 + (width // side) * (height // side)
    pixels, size = pictures(side, views), (width, height)
    length = tree.encode([pixels], ["image"], [size])[0].length
    with accelerate(tree, method, **params), record() as one:
        expected = tree(
            input_ids=torch.tensor([[5, -200, 8]]), images=[pixels], modalities=["image"], image_sizes=[size]
        ).logits[:, -1]
    asked = {"pixel_values": pixels[None], "image_sizes": torch.tensor([[height, width]])}
    with accelerate(native, method, **params), record() as two:
        got = native(input_ids=expanded([5, 7, 8], 7, length), **asked).logits[:, -1]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert_same_record(one, two)


@each_setting
def test_videos_are_the_tree(method, params):
    tree, native = tree_model("tiny-llava-onevision"), native_model("tiny-llava-onevision")
    pixels = pictures(tree.get_vision_tower().image_size, 3)
    with accelerate(tree, method, **params), record() as one:
        ids = torch.tensor([[5, -200, 8]])
        expected = tree(input_ids=ids, images=[pixels], modalities=["video"]).logits[:, -1]
    with accelerate(native, method, **params), record() as two:
        got = native(input_ids=expanded([5, 8, 9], 8, 3 * 196 + 1), pixel_values_videos=pixels[None])
    with accelerate(native, method, **params):
        again = native(input_ids=expanded([5, 8, 9], 8, 3 * 196 + 1), pixel_values_videos=pixels[None])
    assert torch.equal(got.logits, again.logits), "nothing of a request is left behind"
    with accelerate(tree, method, **params):
        other = tree(input_ids=torch.tensor([[5, -200, 9]]), images=[pixels], modalities=["video"]).logits[:, -1]
    torch.testing.assert_close(got.logits[:, -1], other, atol=1e-4, rtol=1e-4)
    assert not torch.equal(expected, other)
    assert_same_record(one, two)


# -- Qwen-VL -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", qwen.MODELS)
def test_where_nothing_is_merged_every_number_is_that_of_the_model(name):
    """The blocks run apart, windows padded, frames of one size together."""
    model = qwen.qwen(name)
    for question in qwen.QUESTIONS.values():
        asked = qwen.inputs(model, question)
        dense = model(**asked).logits
        with accelerate(model, "tome", r=0):
            torch.testing.assert_close(model(**asked).logits, dense, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", qwen.MODELS)
@pytest.mark.parametrize(("method", "params"), SETTINGS[:6])
def test_records_of_a_batch(name, method, params):
    model = qwen.qwen(name)
    with accelerate(model, method, **params), record() as requests:
        together = model(**qwen.inputs(model, *qwen.BATCH))
        again = model(**qwen.inputs(model, *qwen.BATCH))
    assert torch.equal(again.logits, together.logits)
    for sample, question in zip(requests[0].samples, qwen.BATCH, strict=True):
        kinds = [part for part in question if not isinstance(part, int)]
        assert [item.owner.shape for item in sample.items] == [(part.frames, part.per_frame) for part in kinds]
        for item in sample.items:
            held = item.owner[item.kept]
            assert (held >= 0).all() and len(held.unique()) == len(held)


@pytest.mark.parametrize("name", qwen.MODELS)
def test_dropping_blocks_is_the_model_without_them(name):
    """After the last block, dropping is choosing among the model's own features and positions."""
    model = qwen.qwen(name)
    asked, depth = qwen.inputs(model, qwen.QUESTIONS["image"]), len(model.model.visual.blocks)
    dense = dense_inputs(model, asked)
    with accelerate(model, "evit", blocks=[depth - 1], tokens=[7]), record() as requests:
        logits = model(**asked).logits[:, -1]
    (item,) = requests[0].samples[0].items
    assert item.kept.sum() == 7 and torch.equal(item.owner >= 0, item.kept)
    rows = (asked["input_ids"][0] == qwen.IMAGE).nonzero().flatten()
    gone = rows[~item.kept[0]]
    left = torch.ones(asked["input_ids"].shape[1], dtype=torch.bool)
    left[gone] = False
    expected, _ = language_model(model, without(dense, left), 1)
    torch.testing.assert_close(logits[0], expected[0], atol=1e-4, rtol=1e-4)


def without(dense, left):
    """A dense prompt of one sample without some of its rows."""
    return Cut(
        embeds=dense.embeds[0, left],
        positions=dense.positions[:, 0, left],
        source=left.nonzero().flatten(),
        added=[part[0, left] for part in dense.added],
        following=int(dense.positions[:, 0, -1].max()) + 1,
    )


@pytest.mark.parametrize("name", qwen.MODELS)
def test_a_batch_is_its_samples(name):
    model, batch = qwen.qwen(name), qwen.inputs(qwen.qwen(name), *qwen.BATCH)
    real, used = batch["attention_mask"].bool(), {"image": 0, "video": 0}
    ends = {kind: [0] for kind in used}
    for kind in used:
        for frames, rows, columns in batch[f"{kind}_grid_thw"].tolist():
            ends[kind].append(ends[kind][-1] + frames * rows * columns)
    with accelerate(model, "tome", retention_ratio=0.5):
        together = model(**batch).logits[:, -1]
        for row, question in enumerate(qwen.BATCH):
            one = {name: batch[name][row : row + 1, real[row]] for name in ("input_ids", "attention_mask")}
            one["mm_token_type_ids"] = batch["mm_token_type_ids"][row : row + 1, real[row]]
            for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
                count = sum(not isinstance(part, int) and part.kind == kind for part in question)
                here = slice(used[kind], used[kind] + count)
                if count:
                    one[f"{kind}_grid_thw"] = batch[f"{kind}_grid_thw"][here]
                    one[pixels] = batch[pixels][ends[kind][here.start] : ends[kind][here.stop]]
                used[kind] = here.stop
            torch.testing.assert_close(model(**one).logits[0, -1], together[row], atol=1e-4, rtol=1e-4)


def test_signals_of_merged_blocks_are_refused():
    with pytest.raises(MethodError, match=r"key_states, .*signals of vision blocks are not read"):
        accelerate(qwen.qwen(qwen.QWEN2), "tome+visionzip", **{"tome.r": 2, "visionzip.retention_ratio": 0.5})

