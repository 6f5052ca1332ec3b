"""Video-XL: windows and what they leave in the cache, and whole models on a video and on the tiles of an image."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accelerate_methods.engine.sequences import compressed_sequence
from accelerate_methods.hosts.layouts import flat_item
from llava.model.architectures import architecture_of
from llava.model.checkpoint import read_config
from llava.model.generation import MultimodalGeneration
from llava.model.splice import Prompts

_NEW = 8
_KEYS = ("beacon_ratio", "beacon_window", "beacon_stride", "beacon_ratio_mix")


@lru_cache(maxsize=2)
def _load(folder: Path) -> Any:
    """The checkpoint in float32."""
    model_class = architecture_of(read_config(folder))
    return model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


@contextlib.contextmanager
def _model(params: dict[str, Any], context: Any) -> Iterator[Any]:
    """The model of a case, with the settings of the case."""
    model = _load(context.checkpoint(params["checkpoint"]))
    before = {key: getattr(model.config, key) for key in _KEYS}
    for key in _KEYS:
        setattr(model.config, key, params.get(key, before[key]))
    try:
        yield model
    finally:
        for key, value in before.items():
            setattr(model.config, key, value)


def _unrotated(model: Any, keys: Tensor, start: int) -> Tensor:
    """[G, n, d] cached keys from position ``start`` on, as they were before rotation."""
    decoder = model.get_model()
    positions = torch.arange(start, start + keys.shape[1])[None]
    cos, sin = decoder.rotary_emb(keys, positions)
    first, second = keys.chunk(2, dim=-1)
    return keys * cos - torch.cat([-second, first], dim=-1) * sin


def _read(model: Any, spliced: Any, every: int) -> dict[str, Tensor]:
    """What the prompt leaves, and the answer; every so many of the summary tokens' entries."""
    (pieces,) = spliced.pieces
    read = model.get_model().read(spliced.inputs_embeds, spliced.layout)
    first, *_ = (piece.cached for piece in pieces if piece.ratio is not None)
    kept = sum(piece.summaries for piece in pieces)
    cache, last = read.cache, model.config.num_hidden_layers - 1
    suffix = cache.get_seq_length() - first - kept
    out = {
        "steps": torch.tensor([[piece.rows, piece.summaries, piece.cached] for piece in pieces]),
        "kv_sizes": torch.tensor([first, kept, suffix]),
        "prefill_logits": model.lm_head(read.states[0][-1:]),
    }
    name = "" if every == 1 else f"_every{every}"
    for layer in (0, last):
        keys, values = (
            part[0, :, first : first + kept] for part in (cache.layers[layer].keys, cache.layers[layer].values)
        )
        out[f"beacon_k_l{layer}{name}"] = _unrotated(model, keys, first)[:, ::every]
        out[f"beacon_v_l{layer}{name}"] = values[:, ::every]
    answer = super(MultimodalGeneration, model).generate(
        **model.begin(spliced, None), do_sample=False, max_new_tokens=_NEW, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True,
    )  # fmt: skip
    grown = answer.past_key_values.get_seq_length() - first - kept
    return out | {"greedy_ids": answer.sequences, "kv_sizes_after_generation": torch.tensor([first, kept, grown])}


def beacon_prefill(inputs, params, context):
    with _model(params, context) as model:
        sequence = compressed_sequence(flat_item(inputs["visual"].float()[None], None), None, model.project)
        return _read(model, model.embed(Prompts(inputs["input_ids"], padding_side="left"), [sequence]), every=1)


def e2e(inputs, params, context):
    pixels = inputs["coarse"].float().repeat_interleave(14, 2).repeat_interleave(14, 3)
    size = params.get("image_size")
    asked = {"images": [pixels], "modalities": [params["modality"]], "image_sizes": [size] if size else None}
    ids = inputs["input_ids"]
    with _model(params, context) as model:
        spliced = model.prepare_multimodal(ids, None, None, **asked)
        ((span,),) = spliced.spans
        features = spliced.inputs_embeds[0, span.start : span.end]
        out = _read(model, spliced, every=8)
        generated = model.generate(
            ids, **asked, do_sample=False, max_new_tokens=_NEW, eos_token_id=None, pad_token_id=0
        )
        logits = model(input_ids=ids, **asked).logits[:, -1]
    return out | {"visual_features_every16": features[::16], "greedy_ids": generated, "prefill_logits": logits}


ADAPTERS = {("video_xl", "beacon_prefill"): beacon_prefill, ("video_xl", "e2e"): e2e}
