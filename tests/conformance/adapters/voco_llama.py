"""VoCo-LLaMA: the mask that its two calls stand for, prompts, and whole models with what they keep."""

from __future__ import annotations

from typing import Any

import torch

from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token
from llava.model.architectures.voco_llama.division import visible
from llava.model.architectures.voco_llama.model import voco_prompt
from llava.tokenization import load_tokenizer
from tests.conformance.adapters import whole_models


def _model(params: dict[str, Any], context: Any) -> Any:
    return whole_models.load_architecture(params, context)


def attention_mask(inputs, params, context):
    return {"visible": visible(inputs["attention_mask"], inputs["voco_positions"])}


def prompt(inputs, params, context):
    conversation = conv_templates["voco_v1"].copy()
    conversation.append_message(conversation.roles[0], "<image>\n" + params["question"])
    conversation.append_message(conversation.roles[1], None)
    text = voco_prompt(conversation.get_prompt(), params["num_voco"])
    assert text == params["expected_prompt"], text
    tokenizer = load_tokenizer(str(context.checkpoint(params["checkpoint"])))
    return {"input_ids": tokenizer_image_token(text, tokenizer, return_tensors="pt")}


def e2e(inputs, params, context):
    model, ids, repeat = _model(params, context), inputs["input_ids"], params["pixel_repeat"]
    images = inputs["coarse"].float().repeat_interleave(repeat, 2).repeat_interleave(repeat, 3)
    mask, side = inputs.get("attention_mask"), params.get("padding_side")
    with torch.no_grad():
        spliced = model.prepare_multimodal(ids, mask, None, images, padding_side=side)
        cached = model(input_ids=ids, attention_mask=mask, images=images, use_cache=True)
        asked = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
        generated = model.generate(ids, images=images, attention_mask=mask, **asked)
    out = {
        "prefill_logits": cached.logits[:, -1],
        "greedy_ids": generated,
        "position_ids": torch.where(spliced.mask, spliced.position_ids, 1),  # as the official generate has padding
        "n_visual": torch.tensor([spliced.spans[0][0].length]),
    }
    if spliced.division is None:
        return out
    low, high = (torch.tensor([rows[place] for rows in _voco(spliced)]) for place in (0, -1))
    count = int((high - low)[0]) + 1
    voco = low[:, None] + torch.arange(count)
    span = spliced.spans[0][0]
    rows = spliced.inputs_embeds
    cache = cached.past_key_values
    return {
        **out,
        "voco_positions": voco if len(ids) > 1 else voco[0],
        "visible_last_row": visible(spliced.mask, voco)[:, -1],
        "inputs_embeds": torch.cat([rows[:, : span.start], rows[:, span.end :]], dim=1),
        "image_embeds_head": rows[:, span.start : span.start + 4],
        "voco_keys": torch.stack([layer.keys[0, :, :count].transpose(0, 1) for layer in cache.layers]),
        "voco_values": torch.stack([layer.values[0, :, :count].transpose(0, 1) for layer in cache.layers]),
        "n_visual_kept": torch.tensor([cache.get_seq_length() - spliced.division.text.shape[1]]),
    }


def _voco(spliced) -> list[list[int]]:
    """Columns of the ``<voco>`` tokens of each prompt, from the rows that are kept."""
    looks = spliced.division.looks
    return [rows[kept].tolist() for rows, kept in zip(looks.rows, looks.kept, strict=True)]


ADAPTERS = {
    ("voco_llama", "attention_mask"): attention_mask,
    ("voco_llama", "prompt"): prompt,
    ("voco_llama", "e2e"): e2e,
}
