"""Whole tiny Qwen-VL models under a method: what the ``e2e_qwen`` cases of video methods share."""

from __future__ import annotations

from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

import accelerate_methods
from accelerate_methods.stages.compress import Compressed, VisualItem
from accelerate_methods.stages.method import Method
from tests.conformance.adapters.whole_models import IDS, LOGITS


@lru_cache(maxsize=2)
def _load(folder: str) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def _counted_as_recorded(model: Any) -> Any:
    """Text behind a video goes on behind the video's largest position, as transformers 4.57 counted.

    Later versions go on behind the sides of a frame, which are less where the moments of Qwen2.5-VL's videos reach far.
    """
    before = model.model.get_rope_index

    def get_rope_index(input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        positions, deltas = before(input_ids, *args, **kwargs)
        behind = int((input_ids[0] == model.config.video_token_id).nonzero().max()) + 1
        more = positions[..., :behind].max() + 1 - positions[..., behind].max()
        positions[..., behind:] += more
        return positions, deltas + more

    return mock.patch.object(model.model, "get_rope_index", get_rope_index)


def answered(
    inputs: dict[str, Tensor], params: dict[str, Any], context: Any, method: Method
) -> tuple[dict[str, Any], VisualItem, Compressed]:
    """What the model says of one video, and what the method saw and made of it.

    Pixels are recorded small, [T*h*w, 24] = (3 channels, 2 frames, 2, 2), each repeated 2 x 2. What enters the decoder
    is read where the loop is called.
    """
    model = _load(str(context.checkpoint(params["checkpoint"])))
    small = inputs["patches_small"].float().view(-1, 3, 2, 2, 2)
    ids = inputs["input_ids"][None]
    asked = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": small.repeat_interleave(2, 3).repeat_interleave(2, 4).flatten(1),
        "video_grid_thw": inputs["video_grid_thw"].view(1, 3),
        "mm_token_type_ids": (ids == model.config.video_token_id).long() * 2,
    }
    seen: dict[str, Any] = {}
    with torch.no_grad(), _counted_as_recorded(model), accelerate_methods.accelerate(model, method):
        state = model.acceleration
        run, sequence = state._run, state._sequence

        def watched(kwargs: Any, embeds: Tensor, **more: Any) -> Any:
            out = run(kwargs, embeds, **more)
            if "run" not in seen:  # the prompt
                seen["run"] = embeds, more, out, state._now.get().cut.source[0]
            return out

        state._run = watched
        state._sequence = lambda item: seen.setdefault("item", item) and sequence(item)
        logits = model(**asked).logits[0, -1]
        embeds, more, out, keep = seen["run"]
        delta = model.model.rope_deltas.view(-1)
        generated = model.generate(
            **asked, do_sample=False, max_new_tokens=params["max_new_tokens"], eos_token_id=None, pad_token_id=0,
            return_dict_in_generate=True,
        )  # fmt: skip
        compressed = method.compress(seen["item"])
    rows, cache = torch.arange(embeds.shape[1]), generated.past_key_values
    layers = range(model.config.text_config.num_hidden_layers)
    visual, added = more["layout"].visual[0], more["layout"].added
    found = {
        "index": compressed.positions.sort().values,
        "counts": torch.bincount(
            compressed.positions // seen["item"].tokens_per_frame, minlength=seen["item"].num_frames
        ),
        "keep": keep,
        "position_ids": more["position_ids"][-3:, 0],
        "visual_tokens": embeds[0, visual],
        "llm_keep": rows if out.kept is None else out.kept[0],
        "kv_len_end": torch.tensor([cache.get_seq_length(layer) for layer in layers]),
        "rope_delta": delta,
        **dict.fromkeys(LOGITS, logits),
        **dict.fromkeys(IDS, generated.sequences[0, ids.shape[1] :]),
    }
    if added:
        found["deepstack"] = torch.stack([part[0, visual][:: params["deepstack_stride"]] for part in added])
    return found, seen["item"], compressed
