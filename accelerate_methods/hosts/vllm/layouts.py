"""How many rows an image or video takes, told from its size: what vLLM's front end and its workers both compute.

A layout is a ``VisualItem`` whose tokens hold no numbers yet, made by the functions that lay out real features
(``hosts.layouts``), so that the two cannot differ.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from accelerate_methods.engine.sequences import compressed_sequence
from accelerate_methods.hosts.anyres import get_anyres_image_grid_shape
from accelerate_methods.hosts.layouts import flat_item, image_item, pool_2d, tile_grid, video_item
from accelerate_methods.hosts.native.llava import unpadded
from accelerate_methods.hosts.vllm.served import Served, ServedViews
from accelerate_methods.stages.compress import VisualItem
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.shapes import ItemShape
from accelerate_methods.stages.signals import LAYER_SIGNALS, OF_QUESTION, Signal
from accelerate_methods.stages.views import Views

_WIDTH = 8  # of made-up features


@dataclasses.dataclass(frozen=True)
class Layout:
    """One image or video before it is encoded.

    Attributes:
        item: its tokens, [F, N, 1], without numbers.
        views: how often the tower sees it: an image's views, a video's frames.
        patches: (rows, columns) of a view's patches.
        tiles: (columns, rows) in which views 1.. of an image tile it.
        on_views: whether methods for views act on it before the projector.
    """

    item: VisualItem
    views: int
    patches: tuple[int, int]
    tiles: tuple[int, int] | None = None
    on_views: bool = False

    def shape_for(self, method: Served) -> ItemShape:
        """What ``method.count`` is asked."""
        if not self.before_projector(method):
            return self.item.shape
        rows, columns = self.patches
        item = self.item
        return ItemShape(self.views, rows * columns, self.patches, item.length, on_views=True, dense=item.num_tokens)

    def before_projector(self, method: Served) -> bool:
        return self.on_views and isinstance(method, ServedViews)


def rows_of(method: Served, layout: Layout) -> int:
    """Rows of the prompt that an item takes under ``method``: what the worker's tokens have to come to.

    Raises:
        MethodError: the number depends on the content, or a signal that tokens of this item do not have.
    """
    item, on_views = layout.item, layout.before_projector(method)
    if item.modality not in method.modalities:
        return item.length
    per_layer = any(Signal(name).name in LAYER_SIGNALS for name in method.signals)
    if item.layout == "anyres" and item.source is None and per_layer and not on_views:
        raise MethodError(
            f"{method.name}: this image is shrunk to the checkpoint's token limit; its tokens are mixtures of patches, "
            "which have no attention or keys of their own. Send it smaller, or use a method that reads features only."
        )
    count = method.count(layout.shape_for(method))
    if count is None:
        raise MethodError(method.why_unknown(layout.shape_for(method)))
    newlines = item.length - item.num_tokens
    if newlines == 0 or (newlines == 1 and not on_views):
        return count + newlines
    return _tried(method, layout, count)


def _tried(method: Served, layout: Layout, count: int) -> int:
    """:func:`rows_of` where the method decides about newlines: it is shown an item of this form, with made-up content.

    Only sizes decide about them, as about the count.
    """
    key = (layout.item.length, layout.item.num_tokens, layout.views, layout.patches, layout.tiles, count)
    return _tried_once(method, key, _Hidden(layout))


class _Hidden:
    """A value that takes no part in a cache's key."""

    def __init__(self, layout: Layout):
        self.layout = layout

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hidden)

    def __hash__(self) -> int:
        return 0


@functools.lru_cache(maxsize=1024)
def _tried_once(method: Served, key: tuple, hidden: _Hidden) -> int:
    layout, count = hidden.layout, key[-1]
    sequence = compressed_sequence(made_up(method, layout), method, lambda tokens: tokens)
    rows, content = sequence.tokens.shape[0], sequence.num_content
    if content != count:
        raise MethodError(
            f"{method.name} says {count} tokens for an item of {key[0]} rows, but gives {content}: a fault "
            "of the method."
        )
    return rows


def made_up(method: Served, layout: Layout) -> VisualItem:
    """An item of this form with made-up features and signals."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    item, patches = layout.item, math.prod(layout.patches)
    on_views = layout.before_projector(method)
    frames, tokens = (layout.views, patches) if on_views else item.features.shape[:2]
    signals: dict[str, Tensor] = {}
    wide = {"frame_features": (frames,), "prompt_mean": (), **dict.fromkeys(OF_QUESTION | {"prompt_rows"}, (2,))}
    wide |= dict.fromkeys(("key_states", "image_embeds", "encoder_tokens"), (frames, tokens))
    for name in method.signals | frozenset(method.substitutes.values()):
        kind = Signal(name).name
        signals[name] = made(*wide[kind], _WIDTH) if kind in wide else made(frames, tokens)
    newlines = None if item.newlines is None else item.newlines.new_zeros(item.newlines.shape[0], _WIDTH)
    dense = dataclasses.replace(item, features=made(*item.features.shape[:2], _WIDTH), newlines=newlines)
    if not on_views:
        return dataclasses.replace(dense, signals=signals)
    views = Views(
        features=made(frames, patches, _WIDTH),
        special=made(frames, 1, _WIDTH) if "cls_attention" in {Signal(name).name for name in signals} else None,
        grid=layout.patches,
        tiles=layout.tiles,
        signals=signals,
        uncompressed=lambda: dense,
        project=lambda given: given,
    )
    return dataclasses.replace(dense, views=views)


class LlavaLayouts:
    """Images of LLaVA-1.5: one view, no newlines."""

    def __init__(self, config: Any):
        vision = config.vision_config
        self.config, self.size = config, vision.image_size
        self.side = vision.image_size // vision.patch_size

    @property
    def patches(self) -> tuple[int, int]:
        return self.side, self.side

    def image(self, height: int, width: int) -> Layout:
        features = torch.zeros(1, self.side**2, 1)
        return Layout(self.image_item(features, None, (width, height)), 1, self.patches, on_views=True)

    def image_item(self, features: Tensor, newline: Tensor | None, size: tuple[int, int]) -> VisualItem:
        """[V, P, D] projected views of an image of ``size`` (width, height) -> its tokens."""
        return flat_item(features, features.shape[1])


class LlavaNextLayouts(LlavaLayouts):
    """Images of LLaVA-NeXT: the whole image and tiles, unpadded, with a newline after every row."""

    aspect = "anyres"

    def __init__(self, config: Any):
        super().__init__(config)
        self._tree = SimpleNamespace(
            mm_patch_merge_type="spatial_unpad",
            image_aspect_ratio=self.aspect_of(config),
            # (width, height) here, (height, width) in transformers
            image_grid_pinpoints=[tuple(point[::-1]) for point in config.image_grid_pinpoints],
        )

    def aspect_of(self, config: Any) -> str:
        return self.aspect

    def image(self, height: int, width: int) -> Layout:
        return _anyres_layout(self, height, width)

    def image_item(self, features: Tensor, newline: Tensor | None, size: tuple[int, int]) -> VisualItem:
        return image_item(features, newline, size, self.size, self._tree, unpadded)

    def tiles(self, size: tuple[int, int]) -> tuple[int, int]:
        """(columns, rows) of the tiles of an image of (width, height)."""
        return get_anyres_image_grid_shape(size, self._tree.image_grid_pinpoints, self.size)

    def tile_grid(self, views: int, size: tuple[int, int]) -> tuple[int, int] | None:
        return tile_grid(views, size, self.size, self._tree)


class LlavaOnevisionLayouts(LlavaNextLayouts):
    """The same of LLaVA-OneVision, and its videos: frames pooled to a quarter, one newline at the end."""

    def aspect_of(self, config: Any) -> str:
        return config.vision_aspect_ratio

    def video(self, frames: int) -> Layout:
        item = self.video_item(self.pooled(torch.zeros(frames, self.side**2, 1)), torch.zeros(1))
        return Layout(item, frames, self.patches)

    def pooled(self, patches: Tensor) -> Tensor:
        """[F, P, ...] -> [F, N, ...], features and signals alike."""
        if patches.ndim == 2:
            return pool_2d(patches[..., None], "bilinear")[..., 0]
        return pool_2d(patches, "bilinear")

    def video_item(self, pooled: Tensor, newline: Tensor) -> VisualItem:
        return video_item(pooled, newline, "one_token", "spatial_unpad")


@functools.lru_cache(maxsize=256)
def _anyres_layout(layouts: LlavaNextLayouts, height: int, width: int) -> Layout:
    size = (width, height)
    columns, rows = layouts.tiles(size)
    views = 1 + columns * rows
    item = layouts.image_item(torch.zeros(views, layouts.side**2, 1), torch.zeros(1), size)
    return Layout(item, views, layouts.patches, layouts.tile_grid(views, size), on_views=True)
