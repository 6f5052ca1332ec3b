"""Exact numbers of tokens: caps, and layouts that are known from sizes."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accelerate_methods.engine.sequences import compressed_sequence
from accelerate_methods.hosts.vllm.layouts import (
    LlavaLayouts,
    LlavaNextLayouts,
    LlavaOnevisionLayouts,
    made_up,
    rows_of,
)
from accelerate_methods.hosts.vllm.prompts import PromptWords
from accelerate_methods.hosts.vllm.served import exactly
from accelerate_methods.hosts.vllm.spec import method_of
from accelerate_methods.stages.compress import Compressed, VisualItem, selection
from accelerate_methods.stages.contract import check_compressed
from accelerate_methods.stages.errors import MethodError
from tests.support.native_processors import byte_tokenizer
from tests.support.served_methods import PARAMETERS, specification

CONFIG = SimpleNamespace(
    vision_config=SimpleNamespace(image_size=32, patch_size=4),
    image_grid_pinpoints=[[32, 64], [64, 32], [64, 64], [32, 96], [96, 32]],
    vision_aspect_ratio="anyres_max_2",
)
SIZES = [(32, 32), (40, 70), (96, 64), (33, 100), (500, 90)]


def item_of(frames=3, tokens=8, width=4):
    features = torch.arange(frames * tokens * width, dtype=torch.float32).view(frames, tokens, width)
    return VisualItem("video", features, torch.arange(frames * tokens).view(frames, tokens), frames * tokens)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_number_is_met_and_every_owner_is_right(data):
    item = item_of()
    total = item.num_tokens
    kept = data.draw(st.lists(st.integers(0, total - 1), min_size=1, unique=True))
    wanted = data.draw(st.integers(1, total))
    before = selection(item, torch.tensor(kept), order="given")
    after = exactly(before, item, wanted)
    check_compressed("test", after, item)
    assert after.positions.shape[0] == wanted
    assert after.positions.unique().shape[0] == wanted
    assert torch.equal(after.tokens, item.features.flatten(0, 1)[after.positions])
    owned = after.owner.flatten()
    assert torch.equal(owned[after.positions], torch.arange(wanted))
    assert ((owned >= 0).sum() == wanted).item()
    few, many = sorted((after.positions.tolist(), kept), key=len)
    assert set(few) <= set(many)


def test_merged_tokens_keep_what_they_hold():
    item = item_of(1, 4)
    owner = torch.tensor([[0, 0, 1, 1]])
    merged = Compressed(torch.ones(2, 4), torch.tensor([0, 2]), owner, order="given")
    filled = exactly(merged, item, 3)
    assert filled.owner[0, 0] == 0
    assert filled.owner[0, 2] == 1
    assert (filled.owner == 2).sum() == 1


@pytest.mark.parametrize("name", sorted(PARAMETERS))
@pytest.mark.parametrize("family", [LlavaLayouts, LlavaNextLayouts, LlavaOnevisionLayouts])
def test_rows_are_known_before_anything_is_encoded(name, family):
    """What the front end reserves is what a method gives, for other content of the same form."""
    layouts, method = family(CONFIG), method_of(specification(name))
    made = [layouts.image(height, width) for width, height in SIZES]
    if family is LlavaOnevisionLayouts:
        made += [layouts.video(frames) for frames in (1, 4, 9)]
    for layout in made:
        if layout.item.modality not in method.modalities:
            assert rows_of(method, layout) == layout.item.length
            continue
        try:
            rows = rows_of(method, layout)
        except MethodError as error:
            assert "mixtures of patches" in str(error)
            continue
        sequence = compressed_sequence(made_up(method, layout), method, lambda tokens: tokens)
        assert sequence.tokens.shape[0] == rows


def test_newlines_of_tiles_all_stay():
    layouts, method = LlavaNextLayouts(CONFIG), method_of({"method": "random", "tokens_per_image": 3})
    layout = layouts.image(70, 40)
    newlines = layout.item.length - layout.item.num_tokens
    assert newlines > 3
    assert rows_of(method, layout) == 3 + newlines


@pytest.mark.parametrize(
    ("specified", "said"),
    [
        ({"method": "fastervlm", "merge": "spatial_unpad"}, "Give a parameter that says the number"),
        ({"method": "prunevid", "selection": False}, '"cap"'),
    ],
)
def test_a_number_that_only_the_content_decides_is_refused(specified, said):
    layouts, method = LlavaOnevisionLayouts(CONFIG), method_of(specified)
    layout = layouts.image(40, 70) if "image" in method.modalities else layouts.video(8)
    with pytest.raises(MethodError, match=said):
        rows_of(method, layout)


def test_a_specification_is_json():
    method = method_of({"method": "vidcom2", "retention_ratio": 0.1})
    assert json.loads(json.dumps(method.specification)) == method.specification
    assert method.count(item_of(10, 10).shape) == 10


def test_what_a_prompt_says_travels_as_bytes():
    tokenizer = byte_tokenizer(320, {300: "<image>"})
    method = method_of(specification("mmtok"))
    ids = tokenizer("user: <image>What colour is it?").input_ids
    words = PromptWords.of(method, frozenset({"question_rows"}), ids, {300}, [7, 7], tokenizer)
    assert words.question == "What colour is it?"
    assert tokenizer.decode(words.words) == "colour"
    assert words.text == (*(number for number in ids if number != 300), 7, 7)
    assert PromptWords.read(words.written().encode()) == words
    table = torch.nn.Embedding(320, 4)
    told = words.told(frozenset({"question_rows", "prompt_mean"}), table, None)
    assert torch.equal(told.signals["question_rows"], table(torch.tensor(words.words)))
    torch.testing.assert_close(told.signals["prompt_mean"], table(torch.tensor(words.text)).mean(0))
    nothing = PromptWords.of(method, frozenset({"question_rows"}), [300], {300}, [], tokenizer)
    with pytest.raises(MethodError, match="says nothing"):
        nothing.check(method, frozenset({"question_rows"}))
