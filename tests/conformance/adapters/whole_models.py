"""Whole tiny models under a method: what the ``e2e`` cases of all methods share."""

from __future__ import annotations

import dataclasses
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import accelerate_methods
from accelerate_methods.stages.compress import VisualItem
from accelerate_methods.stages.method import Method
from llava.model.architectures import architecture_of
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import load_config, read_config
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.language_model.llava_qwen import LlavaQwenForCausalLM
from tests.conformance import vocabulary

#: pictures are recorded small; each pixel is repeated until they have the tower's size
PICTURES = ("pixel_small", "pixel_lowres", "coarse", "frames_small", "frames_lowres")
LOGITS = ("prefill_logits", "logits", "logits_last", "last_logits")
IDS = ("gen_ids", "generated", "generated_ids", "greedy_ids")


@lru_cache(maxsize=4)
def _load(folder: str) -> Any:
    return load_pretrained_model(folder, device_map="cpu", torch_dtype="float32", attn_implementation="sdpa")[1]


def load_tiny(params: dict[str, Any], context: Any) -> Any:
    """The named tiny checkpoint in float32 with the case's config changes (undone when the next case loads it)."""
    model = _load(str(context.checkpoint(params["checkpoint"])))
    saved = model.__dict__.setdefault("_saved_config", dict(model.config.__dict__))
    model.config.__dict__.clear()
    model.config.__dict__.update(saved)
    for key, value in (params.get("overwrite_config") or {}).items():
        setattr(model.config, key, value)
    return model


def load_whole_vocabulary(params: dict[str, Any], context: Any) -> Any:
    """The same without the cut to the tokenizer's vocabulary, as some official runs had it; not shared."""
    folder = context.checkpoint(Path(params["checkpoint"]).name)
    (name,) = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    (cls,) = (c for c in (LlavaLlamaForCausalLM, LlavaQwenForCausalLM) if c.__name__ == name)
    config = load_config(cls.config_class, folder)
    for key, value in (params.get("config_overrides") or {}).items():
        setattr(config, key, value)
    attention = params.get("attn_implementation", "sdpa")
    return cls.from_pretrained(folder, config=config, dtype=torch.float32, attn_implementation=attention).eval()


@lru_cache(maxsize=4)
def _load_architecture(folder: Path, tower: Path, **keys: Any) -> Any:
    model_class = architecture_of(read_config(folder), folder)
    config = load_config(model_class.config_class, folder)
    for key, value in {"mm_vision_tower": str(tower), **keys}.items():
        setattr(config, key, value)
    model = model_class.from_pretrained(folder, config=config, dtype=torch.float32, attn_implementation="sdpa").eval()
    model.get_vision_tower().load_model()
    return model


def load_architecture(params: dict[str, Any], context: Any, **keys: Any) -> Any:
    """The trained architecture of a case in float32, with the tower that it names and ``keys`` in its config."""
    first, *rest = Path(params["vision_tower"]).parts
    tower = context.checkpoint(first).joinpath(*rest)
    return _load_architecture(context.checkpoint(params["checkpoint"]), tower, **keys)


@dataclasses.dataclass
class Question:
    """A model with what it is asked.

    Attributes:
        ids: [B, L]; media: ``images``, ``modalities``, ``image_sizes`` as the model's methods take them.
        expected: shapes of the outputs that the case holds.
    """

    model: Any
    method: Method
    ids: Tensor
    media: dict[str, Any]
    params: dict[str, Any]
    expected: dict[str, tuple[int, ...]]

    def items(self) -> list[VisualItem]:
        """What the vision side gives, with the signals of the attached method."""
        return self.model.encode(self.media["images"], self.media["modalities"], self.media["image_sizes"])

    def splice(self) -> Any:
        """What goes to the language model."""
        return self.model.prepare_multimodal(self.ids, None, None, **self.media)

    @property
    def steps(self) -> int:
        return self.params.get("max_new_tokens", self.params.get("new_tokens", 8))


def pictures(inputs: dict[str, Tensor], side: int) -> Tensor:
    """[V, 3, side, side] in the value range of the encoder."""
    if "pixel_u8" in inputs:
        small = inputs["pixel_u8"].float() / 127.5 - 1
    else:
        small = vocabulary.first(inputs, PICTURES).float()
    factor = side // small.shape[-1]
    return small.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def ask(inputs: dict[str, Tensor], params: dict[str, Any], context: Any, **given: Any) -> Question:
    """The question of a case.

    Args:
        given: ``model``, ``method`` or ``modality`` where the case does not say it in a way that all cases do.
    """
    method = given.get("method") or vocabulary.method_of(context, params)
    model = given.get("model")
    if model is None:
        uncut = "config_overrides" in params or "attn_implementation" in params
        model = (load_whole_vocabulary if uncut else load_tiny)(params, context)
    views = pictures(inputs, model.get_vision_tower().image_size)
    likely = "video" if {"frames_small", "frames_lowres"} & set(inputs) else "image"
    modality = given.get("modality") or params.get("modality") or (params.get("modalities") or [likely])[0]
    sizes = params.get("image_sizes") or ([params["image_size_wh"]] if _has_tiles(params) else None)
    form = params.get("image_form") or ("stack" if modality == "video" or sizes else "tensor")
    images = {"tensor": views, "list3": list(views), "stack": [views]}[form]
    ids = inputs["input_ids"]
    ids = ids if ids.dim() == 2 else ids[None]
    placeholder = params.get("image_token_id", params.get("image_token_index", -200))
    media = {
        "images": images,
        "modalities": [modality] * len(images),
        "image_sizes": None if sizes is None else [tuple(size) for size in sizes],
    }
    return Question(model, method, ids.masked_fill(ids == placeholder, -200), media, params, context.expected)


def _has_tiles(params: dict[str, Any]) -> bool:
    return "image_size_wh" in params and params.get("crops", 1) > 1


def answered(question: Question) -> dict[str, Any]:
    """Attach the method, ask, detach: :func:`answer`."""
    with accelerate_methods.accelerate(question.model, question.method):
        return answer(question)


def answer(question: Question, stop: bool = False) -> dict[str, Any]:
    """What the model says, under every name that cases have for it. The method is attached already.

    Args:
        stop: whether the end-of-sequence token ends the answer, as it does in no other recording.
    """
    model, media, expected = question.model, question.media, question.expected
    spliced = question.splice()
    prefill = model(input_ids=question.ids, use_cache=True, **media)
    generated = model.generate(
        question.ids, **media, do_sample=False, max_new_tokens=question.steps, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True, **({} if stop else {"eos_token_id": None}),
    )  # fmt: skip
    embeds, cache = spliced.inputs_embeds, prefill.past_key_values
    lengths = torch.tensor([cache.get_seq_length(i) for i in range(model.config.num_hidden_layers)])
    count = torch.tensor(embeds.shape[1] - int((question.ids[0] >= 0).sum()))
    out = {
        "inputs_embeds": embeds,
        "llm_input": embeds[:, :: question.params.get("llm_input_stride", 1)],
        **dict.fromkeys(LOGITS, prefill.logits[:, -1]),
        **dict.fromkeys(IDS, generated.sequences),
        **dict.fromkeys(("gen_logits", "step_logits"), torch.cat(generated.logits)),
        **dict.fromkeys(("n_visual", "visual_tokens", "num_visual_tokens"), count),
        **dict.fromkeys(("kv_len_prefill", "kv_len_per_layer", "kv_length_per_layer"), lengths),
    }
    if spliced.position_ids is not None:
        out["positions"] = spliced.position_ids
    # a batch of one has its axis in some recordings only
    single = {k for k, v in out.items() if v.dim() and len(v) == 1 and len(expected.get(k, ())) == v.dim() - 1}
    return {name: value[0] if name in single else value for name, value in out.items()}
