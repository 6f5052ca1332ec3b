"""PixelPrune: the choice of tokens, positions of what is left, the vision tower on it, and a whole model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

import accelerate_methods
from accelerate_methods.pixelprune import PixelPrune, kept_positions
from accelerate_methods.stages.pixels import PixelCells
from tests.conformance import vocabulary

PARAMETERS = {"method": "scan"}


def _levels(inputs: dict[str, Tensor]) -> list[Tensor]:
    sizes = inputs["grid_thw"].prod(1).tolist()
    return [part.float() / 255 for part in inputs["levels"].split(sizes)]


def select(inputs, params, context):
    method, merge, kept = vocabulary.method_of(context, params), params["merge"], []
    frames = 2 if params["layout"] == "qwen_pixel_values" else 1
    for levels, (_, rows, columns) in zip(_levels(inputs), inputs["grid_thw"].tolist(), strict=True):
        pixels, scale = (levels, 1.0) if frames == 1 else ((levels - 0.5) / 0.5, 0.5)
        grid = (rows // merge, columns // merge)
        cells = PixelCells.of_patches(pixels, grid, merge**2, frames, (scale,) * 3)
        kept.append(method.choose(cells).flatten().nonzero().squeeze(1))
    return {"keep": torch.cat(kept), "counts": torch.tensor([len(one) for one in kept])}


def _keep(inputs: dict[str, Tensor]) -> list[Tensor]:
    return list(inputs["keep"].split(inputs["counts"].tolist()))


def positions(inputs, params, context):
    merge = params["merge"]
    grids = [(frames, rows // merge, columns // merge) for frames, rows, columns in inputs["grid_thw"].tolist()]
    found, delta, rows = kept_positions(
        inputs["input_ids"], params["image_token"], grids, _keep(inputs), params["variant"]
    )
    return {"position_ids": found, "rope_delta": torch.tensor([delta]), "keep_rows": rows}


def _pixels(inputs: dict[str, Tensor]) -> Tensor:
    """[N, 96] as the processor gives them; every recorded pixel stands for 2 x 2 of both times."""
    small = ((inputs["levels"].float() / 255 - 0.5) / 0.5).view(-1, 3, 1, 2, 2)
    return small.repeat_interleave(2, 3).repeat_interleave(2, 4).repeat(1, 1, 2, 1, 1).flatten(1)


@lru_cache(maxsize=1)
def _model(folder: str) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@contextlib.contextmanager
def _counted(model: Any) -> Iterator[list[int]]:
    """Patches that enter each block."""
    counts: list[int] = []
    handles = [
        block.norm1.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
        for block in model.model.visual.blocks
    ]
    yield counts
    for handle in handles:
        handle.remove()


class _Forced(PixelPrune):
    """Keeps what it is told to, image after image."""

    def choose(self, cells):
        kept = self.forced.pop(0)
        mask = torch.zeros(cells.grid, dtype=torch.bool).flatten()
        return mask.index_fill(0, kept, True).view(cells.grid)


def tower(inputs, params, context):
    model = _model(str(context.checkpoint(params["checkpoint"])))
    method = _Forced(vit_layer=params["vit_layer"])
    object.__setattr__(method, "forced", _keep(inputs))
    with torch.no_grad(), accelerate_methods.accelerate(model, method), _counted(model) as counts:
        out = model.model.get_image_features(_pixels(inputs), inputs["grid_thw"])
    kept = _keep(inputs)

    def left(parts: Any) -> Tensor:
        return torch.cat([part[rows] for part, rows in zip(parts, kept, strict=True)])

    return {
        "visual_tokens": left(out.pooler_output),
        "deepstack": torch.stack([left(level) for level in out.deepstack_features]),
        "patches_per_block": torch.tensor(counts),
    }


def e2e_qwen(inputs, params, context):
    """What enters the decoder is read where the loop is called."""
    model, ids = _model(str(context.checkpoint(params["checkpoint"]))), inputs["input_ids"][None]
    image = ids == params["image_token"]
    asked = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": _pixels(inputs),
        "image_grid_thw": inputs["grid_thw"],
        "mm_token_type_ids": image.long(),
    }
    calls: list[tuple[Tensor, dict[str, Any]]] = []
    with torch.no_grad(), accelerate_methods.accelerate(model, vocabulary.method_of(context, params)):
        state = model.acceleration
        run, cut = state._run, []

        def watched(kwargs: Any, embeds: Tensor, **more: Any) -> Any:
            calls.append((embeds, more))
            cut.append(state._now.get().cut)
            return run(kwargs, embeds, **more)

        state._run = watched
        logits = model(**asked).logits[0, -1]
        delta = model.model.rope_deltas.view(-1)
        generated = model.generate(
            **asked, do_sample=False, max_new_tokens=params["max_new_tokens"], eos_token_id=None, pad_token_id=0,
            return_dict_in_generate=True,
        )  # fmt: skip
    (embeds, more), rows, cache = calls[0], cut[0].source[0], generated.past_key_values
    visual, added = more["layout"].visual[0], more["layout"].added
    sizes = (inputs["grid_thw"].prod(1) // 4).tolist()
    kept = torch.isin(image[0].nonzero().squeeze(1), rows).split(sizes)
    return {
        "keep": torch.cat([one.nonzero().squeeze(1) for one in kept]),
        "counts": torch.tensor([int(one.sum()) for one in kept]),
        "keep_rows": rows,
        "position_ids": more["position_ids"][-3:, 0],
        "rope_delta": delta,
        "decode_position_ids": torch.cat([more["position_ids"][-3:, 0] for _, more in calls[2:]], dim=1),
        "visual_tokens": embeds[0, visual],
        "deepstack": torch.stack([part[0, visual][:: params["deepstack_stride"]] for part in added]),
        "logits": logits,
        "generated": generated.sequences[0, ids.shape[1] :],
        "kv_len_end": torch.tensor(
            [cache.get_seq_length(layer) for layer in range(model.config.text_config.num_hidden_layers)]
        ),
    }


ADAPTERS = {
    ("pixelprune", "select"): select,
    ("pixelprune", "positions"): positions,
    ("pixelprune", "tower"): tower,
    ("pixelprune", "e2e_qwen"): e2e_qwen,
}
