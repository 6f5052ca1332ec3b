"""LLaVA-1.5 and LLaVA-NeXT (1.6) of transformers: CLIP tower, one view or any-resolution tiles per image."""

from __future__ import annotations

import dataclasses
import itertools
import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from accelerate_methods.engine.devices import moved
from accelerate_methods.engine.encoder_attention import Encoded
from accelerate_methods.hosts.anyres import get_anyres_image_grid_shape
from accelerate_methods.hosts.layouts import flat_item, image_item, shortened_item, tile_grid
from accelerate_methods.hosts.native.family import Call, Family, ItemRows, Seen, expected, locate_items, views_of
from accelerate_methods.hosts.native.prompt import PromptItem
from accelerate_methods.hosts.native.tower import ClipTower
from accelerate_methods.hosts.native.wrapping import Wrappers
from accelerate_methods.hosts.text_tower import text_tower_name
from accelerate_methods.registry import families
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.stages.compress import VisualItem
from accelerate_methods.stages.encode import EncodeMethod, PatchMap
from accelerate_methods.stages.errors import MethodError


class Llava(Family):
    """LLaVA-1.5: every image is one view, without newlines."""

    about = families.LLAVA_1_5_HF
    views = frozenset({"image"})

    def __init__(self, model: nn.Module):
        super().__init__(model)
        with expected(model):
            tower, _ = model.model.vision_tower, model.model.multi_modal_projector
        number = self.config.vision_feature_layer
        self.tower = ClipTower(tower, number)
        if self.tower.joined:
            self.views = frozenset()
            self.signal_limits = f"Its features (vision_feature_layer={number}) are not those of one encoder layer."
        strategy = self.config.vision_feature_select_strategy
        if strategy != ("default" if self.tower.special else "full"):
            raise MethodError(
                f"vision_feature_select_strategy={strategy!r} with a {self.tower.config.model_type} tower: the rows of "
                "its output would not be its patches one for one."
            )

    @property
    def signals(self) -> frozenset[str]:
        return self.tower.signals

    def prepare(self, wanted: frozenset[str]) -> None:
        self.tower.ask(wanted)

    def text_tower_name(self, pipeline: Pipeline) -> str | None:
        if self.tower.joined or not self.tower.is_clip:
            return None
        return pipeline.text_tower or text_tower_name(None, self.config.name_or_path or None, self.tower.config)

    def watch(self, seen: Any) -> list[Any]:
        return self.tower.watch(seen)

    def take_over(self, method: EncodeMethod, wrappers: Wrappers, seen: Any, seeing: Any) -> None:
        dense, videos = lambda patches: self._dense(patches, seeing()), lambda: self._video_frames(seeing())
        self.tower.take_over(method, wrappers, seen, dense, videos)

    def _dense(self, patches: int, seen: Seen | None) -> int:
        """Tokens that the language model gets of a view of so many patches."""
        return patches

    def _video_frames(self, seen: Seen | None) -> list[int] | None:
        """Frames of each video that is being encoded, None for images."""
        return None

    def project(self, tokens: Tensor) -> Tensor:
        return self.model.model.multi_modal_projector(tokens).to(tokens.device)

    def items(self, call: Call) -> list[PromptItem]:
        return self._images(call, call.seen["image"]) if "image" in call.seen else []

    def _encoded(self, seen: Seen) -> Encoded:
        """The one run of the tower, whose patches are what the projector got."""
        for name, read in (
            ("vision_feature_layer", self.tower.layer_numbers),
            ("vision_feature_select_strategy", lambda strategy: strategy),
        ):
            given, own = seen.arguments.get(name), getattr(self.config, name)
            if given is not None and read(given) != read(own):
                raise MethodError(f"{name}={given!r}: only that of the checkpoint ({own!r}) is supported.")
        if len(seen.encoded) != 1:
            raise MethodError(f"the vision tower ran {len(seen.encoded)} times for one prompt; one run was expected.")
        return seen.encoded[0]

    def _read(self, encoded: Encoded, wanted: frozenset[str]) -> dict[str, Tensor]:
        """Signals over the patches of all views."""
        found = self.tower.read(encoded, wanted)
        if "image_embeds" in wanted and self.text_tower is not None:
            norm = self.model.model.vision_tower.post_layernorm
            found["image_embeds"] = self.text_tower.embed_patches(encoded.patches, norm)
        return found

    def _image_layouts(self, seen: Seen, features: Tensor) -> list[tuple[int, VisualItem, Any]]:
        """(views, layout, tile grid) of each image; tokens and newlines hold no numbers yet."""
        return [(1, flat_item(view[None], view.shape[0]), None) for view in features]

    def _images(self, call: Call, seen: Seen) -> list[PromptItem]:
        encoded = self._encoded(seen)
        device = call.embeds.device
        layouts = self._image_layouts(seen, dense_patches(encoded).to(device))
        ends = list(itertools.accumulate(views for views, _, _ in layouts))
        signals = moved(self._read(encoded, call.wanted), device)
        lengths = [item.length for _, item, _ in layouts]
        out = []
        for at in locate_items(call.ids, self.config.image_token_id, lengths, "image", device):
            views, layout, tiles = layouts[at.number]
            here = slice(ends[at.number] - views, ends[at.number])
            own = {name: value[here] for name, value in signals.items()}
            if encoded.shortened:
                out.append(self._without_grid(encoded[here], layout, at, own))
                continue
            item = filled(layout, call.embeds[at.sample, at.rows])
            if "image" in call.on_views:
                side = math.isqrt(encoded.patches.shape[1])
                seen_views = moved(encoded[here], device)
                item.views = views_of(seen_views, own, (side, side), tiles, lambda item=item: item, self.project)
            else:
                item.signals = {name: _on_tokens(value, item) for name, value in own.items()}
            out.append(PromptItem(at.sample, at.rows, at.start, at.end, item))
        return out

    def _without_grid(
        self, encoded: Encoded, layout: VisualItem, at: ItemRows, signals: dict[str, Tensor]
    ) -> PromptItem:
        """An image or video of whose views an encode method has left tokens without a grid.

        Args:
            layout: of the dense model.
        """
        device = at.rows.device
        newline = None if layout.newlines is None else self.model.model.image_newline.to(device)
        item = shortened_item(moved(self.project(encoded.patches), device), layout.modality, newline)
        side = math.isqrt(encoded.merged.tokens.owner.shape[1])
        item.patches = moved(PatchMap.of(encoded.merged.tokens, (side, side)), device)
        item.full_tokens, item.full_length = layout.num_tokens, layout.length
        item.signals = signals
        return PromptItem(at.sample, at.rows[: item.length], at.start, at.end, item, dense_rows=at.rows)


class LlavaNext(Llava):
    """LLaVA-NeXT: the whole image, then tiles, unpadded, with a newline after every row."""

    about = families.LLAVA_NEXT_HF
    aspect = "anyres"

    def _image_layouts(self, seen: Seen, features: Tensor) -> list[tuple[int, VisualItem, Any]]:
        newline = features.new_zeros(1)
        config = SimpleNamespace(
            mm_patch_merge_type="spatial_unpad",
            image_aspect_ratio=self.aspect,
            # the official code says (width, height) where transformers says (height, width)
            image_grid_pinpoints=[tuple(point[::-1]) for point in self.config.image_grid_pinpoints],
        )
        sizes = [tuple(reversed(size)) for size in torch.as_tensor(seen.arguments["image_sizes"]).tolist()]
        counts = self._views(seen, sizes, config, len(features))
        out, first = [], 0
        for count, size in zip(counts, sizes, strict=True):
            item = image_item(features[first : first + count], newline, size, self.tower.side, config, unpadded)
            out.append((count, item, tile_grid(count, size, self.tower.side, config)))
            first += count
        return out

    def _views(self, seen: Seen, sizes: list[tuple[int, int]], config: Any, total: int) -> list[int]:
        """How many views each image has."""
        counts = []
        for size in sizes:
            columns, rows = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, self.tower.side)
            counts.append(1 + columns * rows)
        if sum(counts) != total:
            raise MethodError(f"{len(sizes)} images should have {counts} views, but the vision tower saw {total}.")
        return counts


def dense_patches(encoded: Encoded) -> Tensor:
    """[V, P, 1] shaped as the patches of the dense model; the numbers mean nothing after an encode method."""
    if not encoded.shortened:
        return encoded.patches[..., :1]
    return encoded.hidden.new_zeros(*encoded.merged.tokens.owner.shape, 1)


def filled(layout: VisualItem, rows: Tensor) -> VisualItem:
    """A layout with the tokens that its rows [length, D] of the prompt hold."""
    newlines = None if layout.newline_positions is None else rows[layout.newline_positions]
    return dataclasses.replace(layout, features=rows[layout.positions], newlines=newlines, signals={})


def unpadded(features: Tensor, size: tuple[int, int]) -> Tensor:
    """``hosts.layouts.unpad_image`` as transformers rounds: a whole number of cells that float arithmetic puts
    just below itself stays whole (352 x 836 pixels in 48 x 24 cells, for example)."""
    width, height = size
    rows, columns = features.shape[1:]
    if width / height > columns / rows:
        pad = (rows - int(round(height * (columns / width), 7))) // 2
        return features[:, pad : rows - pad]
    pad = (columns - int(round(width * (rows / height), 7))) // 2
    return features[:, :, pad : columns - pad]


def _on_tokens(signal: Tensor, item: VisualItem) -> Tensor:
    """[V, P, ...] over patches -> [1, N, ...] over the tokens of an image."""
    if item.source is None:
        raise MethodError(
            "this image was shrunk to the checkpoint's token limit: its tokens are mixtures of patches, which have no "
            "signals of their own."
        )
    return signal.flatten(0, 1)[item.source][None]
