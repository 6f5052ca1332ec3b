"""Made-up images and videos with every signal there is, for tests of what every method must keep to."""

import pytest
import torch
from hypothesis import strategies as st

import accelerate_methods
from accelerate_methods.earlytom import ATTENTION
from accelerate_methods.hosts.layouts import flat_item, image_item, video_item
from accelerate_methods.registry import method_class
from accelerate_methods.stages.frames import FrameMap
from accelerate_methods.stages.signals import SIGNALS, Signal
from accelerate_methods.stages.views import Views
from tests.support.configured import variants
from tests.support.shares import examples_of

WIDTH = 16
LAYOUTS = ("one_token", "grid", "frame", "no_token", "flat video", "flat", "anyres")
FEATURES = ("random", "constant", "zero", "ties", "large")


def features_of(kind, shape, generator):
    if kind == "constant":
        return torch.full(shape, 0.5)
    if kind == "zero":
        return torch.zeros(shape)
    values = torch.randn(shape, generator=generator)
    return values.sign() if kind == "ties" else values * 30 if kind == "large" else values


def pixels(model, views):
    """[views, 3, S, S] of the size that the model's tower takes; the same for the same number."""
    side = model.get_vision_tower().image_size
    return torch.randn(views, 3, side, side, generator=torch.Generator().manual_seed(views))


def of_other_layers(signals, generator):
    """The same signals, shuffled, as those of the encoder layers that any method asks for."""
    asked = {s for n in accelerate_methods.available() for s in method_class(n).signals if Signal(s) != Signal(s).name}
    asked |= {str(Signal("received_attention", Signal(s).layer, Signal(s).heads)) for s in asked}
    found = {}
    for name in sorted(asked):
        value = signals[Signal(name).name]
        found[name] = value[:, torch.randperm(value.shape[1], generator=generator)]
    return found


def make_item(layout, frames, side, kind, dtype, seed):
    """An item with every signal there is, drawn from a seed."""
    generator = torch.Generator().manual_seed(seed)
    newline = torch.randn(WIDTH, generator=generator).to(dtype)
    if layout == "anyres":
        config = type("Config", (), {
            "mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres",
            "image_grid_pinpoints": [[2 * side, 2 * side]],
        })  # fmt: skip
        views = features_of(kind, (5, side * side, WIDTH), generator).to(dtype)
        item = image_item(views, newline, (2 * side, 2 * side - 1), side, config)
    elif layout == "flat":
        item = flat_item(features_of(kind, (1, side * side, WIDTH), generator).to(dtype), side * side)
    else:
        pooled = features_of(kind, (frames, side * side, WIDTH), generator).to(dtype)
        merge = "flat" if layout == "flat video" else "spatial_unpad"
        item = video_item(pooled, newline, "one_token" if merge == "flat" else layout, merge)
    count, per_frame = item.num_frames, item.tokens_per_frame
    shapes = {
        "frame_features": (count, 8), "key_states": (count, per_frame, 8), "image_embeds": (count, per_frame, 8),
        "text_embeds": (2, 8), "prompt_mean": (WIDTH,), "question_rows": (3, WIDTH),
        "prompt_rows": (7, WIDTH), "encoder_tokens": (count, per_frame, 8),
    }  # fmt: skip
    item.signals = {
        name: features_of(kind, shapes.get(name, (count, per_frame)), generator).to(dtype) for name in SIGNALS
    }
    for name in ("pooling_attention", "cls_attention", "received_attention"):
        item.signals[name] = item.signals[name].float().softmax(-1).to(dtype)
    item.signals |= of_other_layers(item.signals, generator)
    if item.modality == "video":  # as if a method inside the encoder had seen it
        groups = [(first, min(first + 3, count - 1)) for first in range(0, count, 4)]
        item.frames = FrameMap(torch.eye(count), {"groups": groups})
        item.signals[ATTENTION] = item.signals["received_attention"]
    return item


items = st.builds(
    make_item,
    layout=st.sampled_from(LAYOUTS),
    frames=st.sampled_from([1, 2, 3, 7, 8]),
    side=st.sampled_from([1, 2, 3, 5]),
    kind=st.sampled_from(FEATURES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 5),
)
ratios = st.sampled_from([1e-6, 0.01, 0.1, 0.25, 0.37, 0.5, 0.9, 0.99])
examples = examples_of(60)


ANYRES = type("Config", (), {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"})


def make_views(tiles, side, special, kind, dtype, seed):
    """The views of an image and its layout in the language model (of one channel, as a method before it gets it)."""
    generator = torch.Generator().manual_seed(seed)
    across, down = tiles or (0, 0)
    shape = (1 + across * down, side * side)
    features = features_of(kind, (*shape, WIDTH), generator).to(dtype)
    views = Views(
        features=features,
        grid=(side, side),
        special=features_of(kind, (shape[0], 1, WIDTH), generator).to(dtype) if special else None,
        tiles=tiles,
        signals={
            name: features_of(kind, size, generator).to(dtype)
            for name, size in {
                "cls_attention": shape, "received_attention": shape, "key_states": (*shape, 8),
                "image_embeds": (*shape, 8), "text_embeds": (2, 8), "prompt_mean": (WIDTH,),
                "question_rows": (3, WIDTH), "prompt_rows": (7, WIDTH),
            }.items()
        },
        project=lambda tokens: tokens,
    )
    views.signals |= of_other_layers(views.signals, generator)
    newline = torch.randn(1, generator=generator).to(dtype)
    config = type("Config", (ANYRES,), {"image_grid_pinpoints": [[across * side, down * side]]})
    size = (max(1, across * side - 1), max(1, down * side)) if tiles else None
    return views, image_item(features[..., :1], newline, size, side, config)


view_items = st.builds(
    make_views,
    tiles=st.sampled_from([None, (2, 1), (1, 3), (2, 2)]),
    side=st.sampled_from([2, 3, 5]),
    special=st.booleans(),
    kind=st.sampled_from(FEATURES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 5),
)


def each_variant(*stages):
    return pytest.mark.parametrize(
        ("name", "params"),
        [pytest.param(n, p, id=",".join([n, *(f"{k}={v}" for k, v in p.items())])) for n, p in variants(*stages)],
    )


def with_budget(name, ratio):
    """The method at a ratio, or with its defaults if it has no free budget."""
    free = "retention_ratio" in method_class(name).parameters()
    return accelerate_methods.get(name, **({"retention_ratio": ratio} if free else {}))


def acts_on(method, item):
    return item.modality in method.modalities
