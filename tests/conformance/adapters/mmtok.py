"""MMTok: the words of a question and their ids, padding, the order of the picks, layouts, LLaVA and Qwen2.5-VL."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

import accelerate_methods
from accelerate_methods.engine.sequences import assemble_views
from accelerate_methods.hosts import questions
from accelerate_methods.hosts.questions import POST_PROMPTS, word_ids
from accelerate_methods.mmtok import coverage_of, keywords, padded_patches
from accelerate_methods.ops.coverage import greedy_coverage
from accelerate_methods.stages.views import Views, view_selection
from tests.conformance import vocabulary
from tests.conformance.adapters import whole_models


def _message(text: str) -> str:
    """What the release takes for the question in a message; the project has questions without placeholders."""
    if text.startswith("<image>\n"):
        text = text[len("<image>\n") :]
    elif text.startswith("<image> ") and "\n" in text:
        text = text.split("\n", 1)[1]
    for sentence in POST_PROMPTS:
        text = text.replace(sentence, "")
    return text


def text(inputs, params, context):
    out = {}
    llava, qwen = (
        AutoTokenizer.from_pretrained(str(context.checkpoint(params[name])))
        for name in ("llava_tokenizer", "qwen_tokenizer")
    )
    for number, message in enumerate(params["llava_messages"]):
        found = keywords(_message(message))
        out[f"llava_{number}"] = torch.tensor(list(found.encode()), dtype=torch.uint8)
        out[f"llava_ids_{number}"] = torch.tensor(word_ids(found.split(), llava))
    method = accelerate_methods.get("mmtok", question="all")
    for number, parts in enumerate(params["qwen_text_parts"]):
        asked = " ".join(parts).strip().replace("<image>", "").strip()
        out[f"qwen_{number}"] = torch.tensor(list(f"Question: {asked}".encode()), dtype=torch.uint8)
        out[f"qwen_ids_{number}"] = torch.tensor(word_ids(method.words(asked), qwen))
    return out


def padding(inputs, params, context):
    side = params["target_size"] // params["patch_size"]
    masks = [padded_patches(tuple(size), (side, side)) for size in inputs["sizes_wh"].tolist()]
    found = {f"index_{number}": mask.nonzero().squeeze(1) for number, mask in enumerate(masks)}
    return found | {"count": torch.stack([mask.sum() for mask in masks])}


def select(inputs, params, context):
    tokens, inner, words = (inputs[name].float() for name in ("vision", "vision_pre", "text"))
    count, size = params["num_tokens"], tokens.shape[1]
    side = int(size**0.5)
    method = vocabulary.method_of(context, params)
    views = Views(
        inner, (side, size // side), signals={"question_rows": words}, project=lambda _: tokens,
        size=params.get("image_size_wh"),
    )  # fmt: skip
    compressed = method.compress_views(views)
    if compressed is None:
        return {"index": torch.arange(size).expand(len(tokens), -1)}
    benefit = coverage_of(tokens, inner, words, params["alpha"], params["tau_text"], params["tau_vision"])
    last = torch.zeros(len(tokens), size, dtype=torch.bool)
    if "exclude" in inputs:
        last[:, inputs["exclude"]] = True
    order, gains = greedy_coverage(benefit, count, last=last)
    if "exclude" not in inputs or "image_size_wh" in params:  # else the method cannot know what is padding
        assert torch.equal(order, compressed.info["order"])
    return {"index": order.sort(1).values, "order": order, "coverage": gains.sum(1)}


def assemble(inputs, params, context):
    tokens, index = inputs["features"].float(), inputs["index"]
    features = torch.zeros(len(tokens), 576, tokens.shape[2])
    features.scatter_(1, index[:, :, None].expand_as(tokens), tokens)
    tiles = params["grid_wh"] and tuple(params["grid_wh"])
    views, newline = Views(features, (24, 24), tiles=tiles), inputs.get("newline")
    item = SimpleNamespace(
        newlines=None if newline is None else newline.float()[None], length=len(tokens) * 576, modality="image"
    )
    compressed = view_selection(views, index, newlines="single")
    return {"tokens": assemble_views(item, views, compressed, lambda tokens: tokens).tokens.half()}


def recorded_words(ids):
    """Whatever is asked, its words have the recorded ids."""
    return mock.patch.object(questions, "word_ids", lambda words, tokenizer: ids.tolist())


def e2e(inputs, params, context):
    model = whole_models.load_tiny(params, context)
    size = params["image_size_wh"]
    method = vocabulary.method_of(context, params)
    question = whole_models.ask(inputs, params, context, model=model, method=method)
    question.media |= {"image_sizes": [tuple(size)], "questions": ["as recorded"]}
    rows = model.get_model().embed_tokens(inputs["text_ids"]).detach()
    with accelerate_methods.accelerate(model, method), recorded_words(inputs["text_ids"]):
        model.acceleration.tokenizer = object()
        (views,) = [item.views for item in question.items()]
        views.signals["question_rows"] = rows
        compressed = method.compress_views(views)
        out = whole_models.answer(question)
    found = out | {
        "order": compressed.info["order"],
        "index": compressed.patch.view(views.num_views, -1),
    }
    if views.size is not None:
        found["exclude"] = padded_patches(views.size, views.grid).nonzero().squeeze(1)
    return found


def e2e_qwen(inputs, params, context):
    """What enters the decoder is read where the loop is called."""
    path = str(context.checkpoint(params["checkpoint"]))
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    ids = inputs["input_ids"]
    asked = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": inputs["pixel_u8"].float() / 127.5 - 1,
        "image_grid_thw": inputs["grid_thw"],
        "mm_token_type_ids": (ids == model.config.image_token_id).long(),
    }
    method, seen = vocabulary.method_of(context, params), {}
    with torch.no_grad(), accelerate_methods.accelerate(model, method), recorded_words(inputs["text_ids"]):
        state = model.acceleration
        state.tokenizer = object()
        run, compress = state._run, state._sequence
        state._run = lambda asked, embeds, **more: seen.setdefault("run", (embeds, more)) and run(asked, embeds, **more)
        state._sequence = lambda item: seen.setdefault("item", item) and compress(item)
        out = model.generate(
            **asked, questions=["as recorded"], do_sample=False, max_new_tokens=params["new_tokens"],
            eos_token_id=None, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    (embeds, more), item = seen["run"], seen["item"]
    compressed = method.compress(item)
    delta = model.model.rope_deltas.view(-1)
    steps = ids.shape[1] + torch.arange(params["new_tokens"] - 1) + delta
    return {
        "index": compressed.positions,
        "order": compressed.info["order"][0],
        "vision_row0_8": item.features[0, :8],
        "vision_pre_row0_8": item.signal("encoder_tokens")[0, :8],
        "inputs_embeds": embeds[0],
        "position_ids": more["position_ids"][-3:, 0],
        "decode_position_ids": steps[:, None].expand(-1, 3),
        "prefill_logits": out.logits[0][0],
        "gen_ids": out.sequences[0, ids.shape[1] :],
    }


PARAMETERS = {"num_tokens": "tokens_per_view", "retain_ratio": "retention_ratio"}
ADAPTERS = {
    ("mmtok", "text"): text,
    ("mmtok", "padding"): padding,
    ("mmtok", "select"): select,
    ("mmtok", "assemble"): assemble,
    ("mmtok", "e2e"): e2e,
    ("mmtok", "e2e_qwen"): e2e_qwen,
}
