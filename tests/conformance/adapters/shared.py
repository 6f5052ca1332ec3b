"""Adapters that serve every method: a case of one of these stages needs no file of its method.

The method is built from the case's parameters and given the case's inputs; the outputs go by all the names that golden
files have for them, what a method says about itself (``Compressed.info``) by its own. A stage that a method's file
lists comes before the one here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from accelerate_methods.engine.sequences import assemble
from accelerate_methods.stages.compress import CompressMethod, ViewCompressMethod, VisualItem
from accelerate_methods.stages.decode import DecodeMethod
from accelerate_methods.stages.method import Method
from accelerate_methods.stages.prefill import PrefillMethod
from tests.conformance import vocabulary
from tests.conformance.adapters import whole_models

INDEX = ("index", "indices", "kept", "kept_index", "keep_index", "keep_idx", "keep")


def compress(inputs, params, context):
    """Views of an image for a method that acts there, else an item; whatever the case calls its outputs."""
    method = vocabulary.method_of(context, params)
    if isinstance(method, ViewCompressMethod) and context.stage != "video":
        return compressed_views(method, inputs, params)
    return compressed_item(method, vocabulary.item_of(method, inputs, params), context)


def compressed_item(method: CompressMethod, item: VisualItem, context: Any) -> dict[str, Any]:
    """Outputs of ``compress``. Indices are those of the layout; [F, K] where the case counts within each frame."""
    compressed = method.compress(item)
    sequence = assemble(item, compressed)
    stands, frames = sequence.stands, item.num_frames
    positions, tokens = sequence.positions, sequence.tokens
    shape = next((context.expected[name] for name in INDEX if name in context.expected), ())
    if len(shape) == 2:  # counted within each frame
        positions = compressed.positions.view(frames, -1) - item.positions[:, :1]
    if len(context.expected.get("tokens", ())) == 3:
        tokens = compressed.tokens.view(frames, -1, compressed.tokens.shape[-1])
    counts = stands.sum(1)
    said = {name: _tensor(value) for name, value in compressed.info.items()}
    return {
        "tokens": tokens,
        "positions": positions,
        **dict.fromkeys(INDEX, positions),
        "mask": stands.flatten().to(torch.uint8),
        "counts": counts,
        "per_frame": counts,
        "count": counts.sum().reshape(1),
        **{name: value for name, value in said.items() if value is not None},
    }


def compressed_views(method: ViewCompressMethod, inputs: dict[str, Tensor], params: dict[str, Any]) -> dict[str, Any]:
    """Outputs of ``compress_views``, view by view: indices [V, K] of the patches that stay, ascending."""
    views = vocabulary.views_of(method, inputs, params)
    count, patches, width = views.features.shape
    compressed = method.compress_views(views)
    if compressed is None:
        kept, tokens = torch.arange(patches).expand(count, -1), views.features
    else:
        kept, tokens = compressed.patch.view(count, -1), compressed.tokens.view(count, -1, width)
    mask = torch.zeros(count, patches, dtype=torch.uint8).scatter_(1, kept.clamp(min=0), 1)
    return {"tokens": tokens, "mask": mask, **dict.fromkeys(INDEX, kept)}


def _tensor(value: Any) -> Tensor | None:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def prefill(inputs, params, context):
    """One step of the method's prefill stage on a prompt of which the last row's attention was recorded."""
    method = vocabulary.method_of(context, params)
    step = vocabulary.prefill_step(inputs, params)
    selection = method.prefill(step)
    kept = vocabulary.rows_that_go_on(step, selection)
    states = step.hidden_states if selection is None or selection.hidden_states is None else selection.hidden_states
    return {
        **dict.fromkeys(INDEX, kept),
        "hidden": states[0, kept],
        "position_ids": step.position_ids[0, kept],
        "key_mask": torch.zeros(step.visual.shape[1], dtype=torch.long).index_fill(0, kept, 1),
    }


def decode(inputs, params, context):
    """Which keys each of some decode steps sees."""
    method = vocabulary.method_of(context, params)
    masks = [method.decode(step) for step in vocabulary.decode_steps(inputs, params)]
    return visible_keys(masks, params["first_kv_length"], inputs["attention"].shape[-1])


def visible_keys(masks: list[Tensor | None], first: int, width: int) -> dict[str, Tensor]:
    """[T, width] of what ``decode`` returned in each step for one sample with ``first`` keys at first; the counts."""
    seen = [torch.ones(first + t, dtype=torch.bool) if m is None else m[0] for t, m in enumerate(masks)]
    padded = torch.stack([nn.functional.pad(m, (0, width - len(m))) for m in seen])
    return {"keep_mask": padded, "num_keys": padded.sum(1)}


def e2e(inputs, params, context):
    """The whole model under the method."""
    return whole_models.answered(whole_models.ask(inputs, params, context))


#: stage of a case -> (stage class that the method must have, adapter)
ADAPTERS: dict[str, list[tuple[type[Method], Any]]] = {
    "compress": [(CompressMethod, compress)],
    "select": [(CompressMethod, compress), (PrefillMethod, prefill)],
    "video": [(CompressMethod, compress)],
    "prefill": [(PrefillMethod, prefill)],
    "decode": [(DecodeMethod, decode)],
    "e2e": [(Method, e2e)],
}
