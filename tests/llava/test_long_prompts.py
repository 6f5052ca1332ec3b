"""Prompts longer than the context: told once, recorded right, refused on demand; in the tree and in native models."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accelerate_methods import accelerate, record
from accelerate_methods.engine.flops import prefill_macs
from accelerate_methods.engine.long_prompts import LongPromptError, context_length, trained_positions
from accelerate_methods.engine.sequences import uncompressed
from accelerate_methods.hosts.layouts import video_item
from accelerate_methods.registry import available, method_class
from accelerate_methods.stages.errors import UnknownNameError
from accelerate_methods.visualize import draw_kept_tokens
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.builder import load_pretrained_model
from tests.support.configured import configured
from tests.support.native_models import expanded, native_model
from tests.support.paths import ROOT
from tests.support.qwen_inputs import image as qwen_image
from tests.support.qwen_inputs import inputs, qwen

PREFILL = sorted(name for name in available() if "prefill" in method_class(name).class_stages())
ASK = {"max_new_tokens": 2, "do_sample": False}


@pytest.fixture(scope="module")
def loaded():
    _, model, processor, _ = load_pretrained_model(
        ROOT / "assets" / "tiny-llava-onevision", device_map="cpu", torch_dtype="float32"
    )
    return model, processor.size[0]


@pytest.fixture
def model(loaded):
    """The embedded model with a context of 90 tokens; a frame has 49."""
    model, _ = loaded
    before = model.config.tokenizer_model_max_length
    model.config.tokenizer_model_max_length = 90
    yield model
    model.config.tokenizer_model_max_length = before
    model.config.on_long_prompt = None


@pytest.fixture
def clip(loaded):
    side = loaded[1]
    return lambda frames: torch.rand(frames, 3, side, side, generator=torch.Generator().manual_seed(frames))


@pytest.fixture
def told(caplog):
    """The warnings so far, which are then forgotten."""
    caplog.set_level(logging.WARNING, logger="accelerate_methods")

    def messages():
        found = [r.getMessage() for r in caplog.records if r.name == "accelerate_methods.engine.long_prompts"]
        caplog.clear()
        return found

    return messages


def prompt(*tail, head=(5,), items=1):
    return torch.tensor([[*head, *[IMAGE_TOKEN_INDEX] * items, *tail]])


def video(*clips):
    return {"images": list(clips), "modalities": ["video"] * len(clips)}


def ask(model, ids, **kwargs):
    with record() as requests:
        answer = model.generate(ids, **ASK, **kwargs)
    (request,) = requests
    return answer, request


def tokens_of(model, clip):
    """Content tokens of one frame."""
    with record() as requests, torch.no_grad():
        model(prompt(9), **video(clip(1)))
    return requests[0].samples[0].visual_tokens_before


# -- told --------------------------------------------------------------------------------------------------------------


def test_one_warning_per_request_says_how_much_of_which_sample_is_lost(model, clip, told):
    frame = tokens_of(model, clip)
    told()
    model.config.tokenizer_model_max_length = limit = 2 * frame
    ids = torch.tensor([[5, IMAGE_TOKEN_INDEX, 9, 10], [5, IMAGE_TOKEN_INDEX, 9, 10]])
    model.generate(ids, **ASK, **video(clip(1), clip(3)))
    (message,) = told()
    lost = 1 + 3 * frame + 1 + 2 - limit  # the newline closes the video
    assert f"sample 1 (of 2 in the batch) has {limit + lost} tokens" in message and f"holds {limit}:" in message
    assert f"last {lost} tokens are lost" in message and "the question" in message and "sample 0" not in message
    for remedy in ("fewer frames", "retention_ratio", "tokenizer_model_max_length", "on_long_prompt = 'error'"):
        assert remedy in message
    model.generate(prompt(9), **ASK, **video(clip(1)))
    assert told() == []
    with torch.no_grad():
        model(prompt(9), **video(clip(3)))
    assert len(told()) == 1, "forward tells as generate does"


def test_the_head_stays_and_the_answer_is_that_of_the_head(model, clip):
    frame = tokens_of(model, clip)
    with torch.no_grad():
        model.config.tokenizer_model_max_length = None
        whole = model(prompt(9, 10, 11), **video(clip(2))).logits
        model.config.tokenizer_model_max_length = frame
        cut = model(prompt(9, 10, 11), **video(clip(2))).logits
    torch.testing.assert_close(cut, whole[:, :frame])


def test_a_key_of_the_config_makes_it_an_error(model, clip, told):
    model.config.on_long_prompt = "error"
    model.generate(prompt(9), **ASK, **video(clip(1)))
    for call in (
        lambda: model.generate(prompt(9), **ASK, **video(clip(9))),
        lambda: model(prompt(9), **video(clip(9))),
        lambda: model.prepare_inputs_labels_for_multimodal(prompt(9), None, None, None, None, [clip(9)], ["video"]),
        lambda: model.generate(torch.arange(91)[None], **ASK),
        lambda: model(torch.arange(91)[None]),
    ):
        with pytest.raises(LongPromptError, match="sample 0") as error:
            call()
        assert (error.value.samples, error.value.batch) == ([0], 1)
    assert told() == []
    with accelerate(model, "random", retention_ratio=0.1):
        model.generate(prompt(9), **ASK, **video(clip(9)))  # what is left fits
    model.config.on_long_prompt = "errors"
    with pytest.raises(UnknownNameError, match="Did you mean 'error'"):
        model.generate(prompt(9), **ASK, **video(clip(1)))


def test_text_alone_is_not_cut_but_told(model, told):
    ids = torch.arange(2, 102)[None]
    with record() as requests:
        model.generate(ids, **ASK)
    (message,) = told()
    assert "context of 90 positions: 10 of its 100 tokens" in message
    (sample,) = requests[0].samples
    assert (sample.length, sample.dense_length, sample.cut) == (100, 100, 0)
    assert sample.untrained == sample.over_dense == 10
    with torch.no_grad():
        assert model(ids).logits.shape[1] == 100 and len(told()) == 1
        mask = torch.ones_like(ids)
        mask[:, :10] = 0
        model(ids, attention_mask=mask)
    assert told() == [], "padding is no token"


def test_positions_of_the_uncompressed_prompt_may_run_beyond_the_context(model, clip, told):
    model.config.tokenizer_model_max_length = None
    before, model.config.max_position_embeddings = model.config.max_position_embeddings, 60
    try:
        with accelerate(model, "uniform", retention_ratio=0.1):
            gapped = model.acceleration.pipeline.positions == "original"
            _, request = ask(model, prompt(9, 10), **video(clip(4)))
    finally:
        model.config.max_position_embeddings = before
    sample = request.samples[0]
    assert sample.cut == 0 and sample.over_dense == sample.dense_length - 60 and sample.length < 60
    assert (sample.untrained > 0) == gapped == bool(told())


def test_training_says_how_many_labels_are_lost(model, clip, told):
    ids = torch.tensor([[5, IMAGE_TOKEN_INDEX, *range(10, 20)]])
    labels = ids.masked_fill(ids < 6, IGNORE_INDEX)
    kept = model.prepare_multimodal(ids, None, labels, [clip(1)], ["video"]).lengths[0]
    model.config.tokenizer_model_max_length = kept - 4
    spliced = model.prepare_multimodal(ids, None, labels, [clip(1)], ["video"])
    assert "Of its 10 training labels 4 are lost." in told()[-1]
    assert (spliced.labels != IGNORE_INDEX).sum() == 6 and spliced.cut == [4]
    model(ids, labels=labels, **video(clip(1))).loss.backward()
    model.zero_grad()
    told()
    model.prepare_multimodal(ids, None, labels, [clip(3)], ["video"])
    assert "10 training labels 10 are lost. Without any label the loss is not a number." in told()[0]


# -- recorded ----------------------------------------------------------------------------------------------------------


#: those that are given the whole prompt, and only between layers
BETWEEN = [
    name
    for name in PREFILL
    if "compress" not in configured(name).stages and not configured(name).inner_layers(6)
]


@pytest.mark.parametrize("method", [None, *BETWEEN])
def test_a_cut_prompt_is_recorded_as_what_is_left_of_it(model, clip, method):
    with torch.no_grad():
        if method is None:
            answer, request = ask(model, prompt(9, 10), **video(clip(4)))
        else:
            with accelerate(model, configured(method, 0.9)):
                plain = model.generate(prompt(9, 10), **ASK, **video(clip(4)))
                answer, request = ask(model, prompt(9, 10), **video(clip(4)))
            assert torch.equal(answer, plain), "recording changes nothing"
    (sample,), config = request.samples, model.config
    (item,) = sample.items
    assert sample.length == min(sample.length + sample.cut, 90) == request.layer_lengths(0)[0] and sample.limit == 90
    assert sample.dense_length == 90 and sample.over_dense == 1 + item.tokens_before + 1 + 2 - 90
    assert item.tokens_after == item.kept.sum() and item.tokens_after < item.tokens_before
    assert item.owner.max() < 90 - item.start and not item.kept[item.owner < 0].any()
    assert ((item.left_at == 0) == (item.owner < 0)).all() and item.left_at.max() == config.num_hidden_layers
    for layer, length in enumerate(request.layer_lengths(0)):
        assert (item.kept & (item.left_at > layer)).sum() == length - (sample.length - item.tokens_after)
    assert prefill_macs(request.layer_lengths(0), config) <= prefill_macs([90] * config.num_hidden_layers, config)


def test_the_last_of_several_images_is_cut_in_the_middle(model, loaded):
    side = loaded[1]
    images = {"images": [torch.rand(1, 3, side, side) for _ in range(3)], "modalities": ["image"] * 3}
    images["image_sizes"] = [(side, side)] * 3
    model.config.tokenizer_model_max_length = None
    spliced = model.prepare_multimodal(prompt(9, items=3), None, None, **images)
    first, second, third = spliced.spans[0]
    for limit, left in ((second.start + 5, 2), (second.start, 1), (third.end - 1, 3), (third.end, 3)):
        model.config.tokenizer_model_max_length = limit
        with accelerate(model, "fastv", retention_ratio=0.5):
            _, request = ask(model, prompt(9, items=3), **images)
        (sample,) = request.samples
        before = [item.tokens_before for item in sample.items]
        assert before == [span.num_content for span in (first, second, third)], "an item that is lost is recorded"
        assert [bool(item.tokens_after) for item in sample.items] == [n < left for n in range(3)]
        assert all(item.tokens_after == item.kept.sum() for item in sample.items)
        assert sample.cut == spliced.lengths[0] - limit and sample.visual_tokens_after <= limit


@pytest.mark.parametrize("side", ["left", "right"])
def test_of_a_batch_only_the_samples_that_are_too_long_are_cut(model, clip, side):
    ids = torch.tensor([[5, IMAGE_TOKEN_INDEX, 9], [5, IMAGE_TOKEN_INDEX, 9], [5, 7, 9]])
    with torch.no_grad(), record() as requests:
        model.config.tokenizer_padding_side = side
        for number in range(2):
            if number:
                with accelerate(model, "fastv", retention_ratio=0.5):
                    model.generate(ids, **ASK, **video(clip(1), clip(3)))
            else:
                model(ids, **video(clip(1), clip(3)))
    for request in requests:
        short, long, text = request.samples
        assert short.cut == text.cut == short.over_dense == text.over_dense == 0 < long.cut == long.over_dense
        assert long.length == 90 and short.items[0].tokens_after == short.items[0].tokens_before
        assert long.items[0].tokens_after == 89
    alone = ask(model, ids[1:2], **video(clip(3)))[0]
    with torch.no_grad():
        assert torch.equal(model.generate(ids, **ASK, **video(clip(1), clip(3)))[1:2], alone)


@pytest.mark.parametrize("method", sorted(n for n in available() if "compress" in method_class(n).class_stages()))
def test_a_compressed_prompt_that_fits_knows_that_dense_would_not(model, clip, method):
    with torch.no_grad(), accelerate(model, configured(method, 0.1)):
        _, request = ask(model, prompt(9, 10), **video(clip(4)))
    (sample,) = request.samples
    assert sample.over_dense == 1 + sample.visual_tokens_before + 1 + 2 - 90 > 0 and sample.dense_length == 90
    assert (sample.cut > 0) == (sample.length == 90), "a method that leaves too much is cut, too"


def test_a_smaller_picture_knows_that_the_full_one_would_not_fit(model, clip):
    with torch.no_grad(), accelerate(model, "downsample", retention_ratio=0.25):
        _, request = ask(model, prompt(9), **video(clip(4)))
    (sample,) = request.samples
    assert sample.cut == 0 < sample.over_dense and sample.dense_length == 90


def test_kept_tokens_of_a_cut_prompt_are_drawn(model, clip, tmp_path):
    with accelerate(model, "fastv", retention_ratio=0.5):
        _, request = ask(model, prompt(9, items=2), **video(clip(3), clip(2)))
    for number, item in enumerate(request.samples[0].items):
        frames = torch.zeros(len(item.owner), 32, 32, 3, dtype=torch.uint8).numpy()
        assert draw_kept_tokens(frames, item, tmp_path / f"{number}.png", "cut").is_file()


@given(frames=st.integers(1, 3), rows=st.integers(0, 20), layout=st.sampled_from(["one_token", "grid", "frame"]))
def test_the_first_rows_of_a_sequence(frames, rows, layout):
    item = video_item(torch.rand(frames, 4, 2), torch.zeros(1, 2) - 1, layout, "spatial_unpad")
    whole = uncompressed(item)
    left = whole.first(rows)
    end = min(rows, len(whole.tokens))
    assert torch.equal(left.tokens, whole.tokens[:end]) and left.num_content == whole.is_content[:end].sum()
    assert torch.equal(left.owner >= 0, whole.owner < end) and torch.equal(left.stands, left.owner >= 0)
    assert (left is whole) == (end == len(whole.tokens) and rows >= end)


def test_scaled_rotary_embeddings_lengthen_the_context():
    def config(**values):
        return type("Config", (), values)

    assert trained_positions(config()) is None and context_length(config(tokenizer_model_max_length=7)) == 7
    assert trained_positions(config(max_position_embeddings=8)) == 8
    linear = config(max_position_embeddings=8, rope_parameters={"rope_type": "linear", "factor": 4.0})
    assert trained_positions(linear) == 32
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
    assert trained_positions(config(max_position_embeddings=32, rope_scaling=yarn)) == 32
    assert context_length(config(max_position_embeddings=8, tokenizer_model_max_length=5)) == 5


# -- models of transformers: never cut ---------------------------------------------------------------------------------


@pytest.fixture(params=["qwen2-vl", "llava-1.5"])
def native(request):
    """A native model that was trained on 30 positions, and arguments of ``generate``."""
    if request.param == "llava-1.5":
        model = native_model("tiny-llava-1.5")
        count = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
        side = model.config.vision_config.image_size
        pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        asked = {"input_ids": expanded([5, 7, 9, 10], 7, count), "pixel_values": pixels}
    else:
        model = qwen("tiny-qwen2-vl")
        asked = inputs(model, [9, qwen_image(8, 12), 10, *range(11, 40)])
    text = model.config.get_text_config()
    before, text.max_position_embeddings = text.max_position_embeddings, 30
    yield model, asked
    text.max_position_embeddings = before
    model.config.on_long_prompt = None


def test_a_native_prompt_beyond_the_trained_positions_is_told_and_counted(native, told):
    model, asked = native
    with accelerate(model, None), record() as requests:
        model.generate(**asked, **ASK)
    (message,) = told()
    (sample,) = requests[0].samples
    assert "sample 0 (of 1 in the batch)" in message and f"{sample.untrained} of its {sample.length} tokens" in message
    assert sample.cut == 0 < sample.untrained == sample.over_dense and sample.limit == 30
    assert sample.length == sample.dense_length == asked["input_ids"].shape[1], "nothing is cut"
    if asked["input_ids"].shape[1] > 100:  # positions that count tokens
        assert sample.untrained == sample.length - 30


def test_a_native_prompt_that_is_too_long_can_be_refused(native, told):
    model, asked = native
    model.config.on_long_prompt = "error"
    with accelerate(model, None), pytest.raises(LongPromptError, match="sample 0"):
        model.generate(**asked, **ASK)
    assert told() == []


def test_a_compressed_native_prompt_knows_that_dense_would_run_beyond(told):
    model = native_model("tiny-llava-1.5")
    side, count = model.config.vision_config.image_size, (336 // 14) ** 2
    text = model.config.get_text_config()
    before, text.max_position_embeddings = text.max_position_embeddings, 100
    try:
        with accelerate(model, "visionzip", retention_ratio=0.1), record() as requests:
            model.generate(expanded([5, 7, 9], 7, count), pixel_values=torch.rand(1, 3, side, side), **ASK)
    finally:
        text.max_position_embeddings = before
    (sample,) = requests[0].samples
    assert told() == [] and sample.untrained == 0 and sample.over_dense == count + 2 - 100
