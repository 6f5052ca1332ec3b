"""Where the host waits for the GPU between the tower and the first logits. CUDA only."""

from __future__ import annotations

import collections
import os
import warnings
from typing import Any

import torch

from accelerate_methods.bench.measure import Bench, Row


@torch.inference_mode()
def synchronisations(bench: Bench, row: Row) -> list[str]:
    """``file:line (times)`` of every synchronisation in the compress and prefill stages of one request.

    The vision tower, the text embedding and sampling are those of any model and are left out.
    """
    model, inputs = bench.model, bench.inputs
    found: list[str] = []
    with bench.caught(row), bench.attached(row), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tower = model.get_vision_tower()
        look = tower.look

        def quiet(*args: Any) -> Any:  # the tower's own pass is not looked at
            torch.cuda.set_sync_debug_mode("default")
            try:
                return look(*args)
            finally:
                torch.cuda.set_sync_debug_mode("warn")

        own = tower.__dict__.get("look")
        tower.look = quiet
        try:
            torch.cuda.set_sync_debug_mode("warn")
            spliced = model.prepare_multimodal(inputs.ids, None, None, padding_side="left", **inputs.arguments())
            # as generate calls it; a dense model takes no layout
            extra = {} if model.acceleration is None else {"layout": spliced.layout}
            model(
                inputs_embeds=spliced.inputs_embeds,
                attention_mask=spliced.mask.long(),
                position_ids=spliced.position_ids,
                use_cache=True,
                logits_to_keep=1,
                **extra,
            )
        finally:
            torch.cuda.set_sync_debug_mode("default")
            if own is None:
                del tower.look
            else:
                tower.look = own
        for warning in caught:
            if "synchron" in str(warning.message):
                found.append(f"{os.path.relpath(warning.filename)}:{warning.lineno}")
    return [f"{place} ({times}x)" for place, times in collections.Counter(found).most_common()]
