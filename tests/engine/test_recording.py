"""A record is printed in one line: counts and shapes, no tensors, and which prompt was cut."""

from __future__ import annotations

import torch

from accelerate_methods import accelerate, record
from accelerate_methods.engine.recording import ItemRecord, RequestRecord, SampleRecord
from tests.methods import test_every_method as every


def video_item(before=784, after=192):
    owner = torch.full((16, 49), -1)
    return ItemRecord("video", before, after, grid=(7, 7), owner=owner, kept=owner >= 0, info={"segments": owner})


def test_a_record_of_a_real_request_is_one_short_line(tiny):
    name = "tiny-llava-onevision"
    question = every.QUESTIONS[name][every.MAIN[name]]
    with accelerate(tiny(name), "random", retention_ratio=0.25), record() as requests:
        every.answer(tiny(name), question, every.TEXT)
    (request,) = requests
    sample, text = request.samples
    assert f"visual tokens {sample.visual_tokens_before} -> {sample.visual_tokens_after}" in repr(request)
    assert f"prompt {sample.dense_length} -> {sample.length}" in repr(sample) and "text only: prompt" in repr(text)
    for shown in (request, request.samples, sample.items):
        assert "tensor" not in repr(shown) and "\n" not in repr(shown) and len(repr(shown)) < 400, repr(shown)
    assert "prefill" in repr(request) and "decode steps" in repr(request)


def test_an_item_shows_shapes():
    assert repr(video_item()) == (
        "ItemRecord(video: 784 -> 192 visual tokens; owner [16, 49]; grid 7 x 7; info segments)"
    )
    assert repr(ItemRecord("image", 4, 2)) == "ItemRecord(image: 4 -> 2 visual tokens)"


def test_it_is_said_which_prompt_was_cut_and_by_how_much():
    request = RequestRecord()
    fits = SampleRecord([video_item()], 800, 208, limit=220)
    request.samples = [fits, SampleRecord([video_item(), video_item()], 1600, 220, cut=172, limit=220)]
    assert "the prompt of sample 1: cut: lost its last 172 tokens, the context holds 220" in repr(request)
    assert "sample 0: cut" not in repr(request) and "cut" not in repr(fits)
    assert "2 videos: visual tokens 1568 -> 384, prompt 1600 -> 220" in repr(request.samples[1])
    assert "its last 9 tokens stand beyond the training" in repr(SampleRecord(untrained=9))
    assert "uncompressed it would be 7 tokens too long" in repr(SampleRecord(over_dense=7))


def test_a_large_batch_is_no_longer():
    request = RequestRecord()
    request.samples = [SampleRecord([video_item()], 800, 208, cut=1)] * 64
    assert "62 more samples" in repr(request) and "62 more prompts" in repr(request) and len(repr(request)) < 500
