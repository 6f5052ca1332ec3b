"""What golden files call things, and ours for it: methods, signals, items, views and steps out of a case.

Cases were recorded by different people from different releases, so that one thing has several names. A name that only
one method uses stands in its adapter file (``PARAMETERS``); the others are here.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import accelerate_methods
from accelerate_methods.hosts.layouts import video_item
from accelerate_methods.registry import method_class
from accelerate_methods.stages.compress import VisualItem
from accelerate_methods.stages.method import Method
from accelerate_methods.stages.prefill import Selection, VisualSpan
from accelerate_methods.stages.views import Views

#: parameter of a case -> the fields of ours that it may be; the first that the method has is meant
FIELDS = {
    "keep": ("tokens_per_view", "tokens_per_image"),
    "keep_per_frame": ("tokens_per_view", "tokens_per_frame"),
    "keep_ratio": ("retention_ratio",),
    "layer_k": ("k",),
    "num_tokens": ("tokens_per_view", "tokens_per_image"),
}
#: tensor of a case -> signals that it may be; those with heads are [F, H, N] and given to methods as their mean
SIGNALS = {
    "attention": ("pooling_attention", "received_attention", "cls_attention"),
    "cls_attn": ("cls_attention",),
    "global_features": ("frame_features",),
    "key_states": ("key_states",),
    "keys": ("key_states",),
    "received_attn": ("received_attention",),
    "text_embeds": ("text_embeddings",),
}
FEATURES = ("features", "frames", "x")
#: first row, and number of rows, of the visual tokens in a prompt
STARTS = ("image_start", "visual_start", "v_start", "vision_start", "img_start")
COUNTS = ("image_len", "visual_length", "n_visual", "vision_tokens", "num_visual")


def first(source: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The value of the first name that is there.

    Raises:
        NotImplementedError: none is; the case is then no job for a shared adapter.
    """
    for name in names:
        if name in source:
            return source[name]
    raise NotImplementedError(f"the case has none of {', '.join(names)}; it needs an adapter of its own")


def renamed(method: str) -> dict[str, str]:
    """``PARAMETERS`` of the method's adapter file: parameter of its cases -> field of the method."""
    module = f"tests.conformance.adapters.{method}"
    if importlib.util.find_spec(module) is None:
        return {}
    return getattr(importlib.import_module(module), "PARAMETERS", {})


def parameters_of(method: str, params: dict[str, Any]) -> dict[str, Any]:
    """A case's hyper-parameters under the names of the method's fields; everything else in ``params`` is left out."""
    known, own, found = method_class(method).parameters(), renamed(method), {}
    for name in params:
        names = (own[name],) if name in own else (name, *FIELDS.get(name, ()))
        ours = next((n for n in names if n in known), None)
        if ours is not None and params[name] is not None:
            found[ours] = params[name]
    return found


def method_of(context: Any, params: dict[str, Any], **more: Any) -> Method:
    return accelerate_methods.get(context.method, **parameters_of(context.method, params), **more)


def signals_of(method: Method, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every signal that the case holds and the method knows, its substitutes included."""
    known, found = {*method.signals, *method.substitutes.values()}, {}
    for name, candidates in SIGNALS.items():
        signal = next((c for c in candidates if c in known), None)
        if name not in inputs or signal is None:
            continue
        value = inputs[name].float()
        found[signal] = value.mean(1) if signal.endswith("attention") and value.dim() == 3 else value
    return found


def features_of(inputs: dict[str, Tensor], params: dict[str, Any], signals: dict[str, Tensor]) -> Tensor:
    """[F, N, D] float32; of width 1 where the case holds nothing but signals."""
    if signals and not set(FEATURES) & set(inputs):
        return torch.zeros(*next(iter(signals.values())).shape[:2], 1)
    features = first(inputs, FEATURES).float()
    if "tokens_per_frame" in params:
        features = features.view(-1, params["tokens_per_frame"], features.shape[-1])
    return features if features.dim() == 3 else features[None]


def item_of(method: Method, inputs: dict[str, Tensor], params: dict[str, Any]) -> VisualItem:
    """The image or video of a case. Without a newline it has content tokens only."""
    signals = signals_of(method, inputs)
    features = features_of(inputs, params, signals)
    if "newline" in inputs:
        item = video_item(features, inputs["newline"].float(), params.get("newline", "grid"), "spatial_unpad")
    else:
        positions = torch.arange(features.shape[0] * features.shape[1]).view(features.shape[:2])
        modality = "video" if "video" in method.modalities else "image"
        item = VisualItem(modality, features, positions, positions.numel())
    item.signals = signals
    return item


def views_of(method: Method, inputs: dict[str, Tensor], params: dict[str, Any]) -> Views:
    """One image's views before the projector."""
    signals = signals_of(method, inputs)
    features = features_of(inputs, params, signals)
    side = int(features.shape[1] ** 0.5)
    return Views(features, grid=(side, features.shape[1] // side), signals=signals)


class RecordedStep:
    """A prefill step of one sample whose attention is known.

    Args:
        hidden: [L, D]; start, count: rows of its visual tokens.
        weights: [H, L, L], or [H, L] for the last row alone; they are taken for those that the method asks for.
    """

    def __init__(self, hidden: Tensor, start: int, count: int, weights: Tensor, positions: Tensor | None = None):
        length = len(hidden)
        self.hidden_states, self.valid, self.rows, self.lengths = hidden[None], None, None, [length]
        self.visual = torch.zeros(1, length, dtype=torch.bool)
        self.visual[:, start : start + count] = True
        self.block = self.visual
        self.spans = [[VisualSpan(start, count, "image", count)]]
        self.position_ids = (torch.arange(length) if positions is None else positions)[None]
        self.num_heads = len(weights)
        self._weights = weights

    def attention(self, rows: Tensor, *, rotary: bool = True, causal: bool = True) -> Tensor:
        if self._weights.dim() == 3:
            return self._weights[None, :, rows]
        assert rows.tolist() == [self.hidden_states.shape[1] - 1], "only the last row was recorded"
        return self._weights[None, :, None]


def prefill_step(inputs: dict[str, Tensor], params: dict[str, Any]) -> RecordedStep:
    weights = first(inputs, ("attn_last", "attention")).float()
    hidden = inputs["hidden"] if "hidden" in inputs else torch.zeros(weights.shape[-1], 1)
    hidden, positions = hidden.view(-1, hidden.shape[-1]), inputs.get("position_ids")
    return RecordedStep(hidden, first(params, STARTS), first(params, COUNTS), weights, positions)


def rows_that_go_on(step: RecordedStep, selection: Selection | None) -> Tensor:
    """[K] rows of the step's one sample."""
    return torch.arange(step.visual.shape[1]) if selection is None else selection.indices[0]


def decode_steps(inputs: dict[str, Tensor], params: dict[str, Any]) -> list[SimpleNamespace]:
    """The decode steps of a case that records attention rows [T, H, S]; they share one memory."""
    attention, first_length = inputs["attention"].float(), params["first_kv_length"]
    start = first(params, STARTS)
    visual = torch.zeros(1, attention.shape[-1], dtype=torch.bool)
    visual[:, start : start + first(params, COUNTS)] = True
    memory: dict[str, Any] = {}
    return [
        SimpleNamespace(
            visual=visual[:, :length],
            valid=None,
            memory=memory,
            attention=lambda row=attention[t, :, :length]: row[None],
        )
        for t, length in enumerate(range(first_length, first_length + params["num_steps"]))
    ]
