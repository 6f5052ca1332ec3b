"""The images and videos of a request, as the vision side gets them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX

_MODALITIES = ("image", "video", "text")


@dataclasses.dataclass(frozen=True)
class VisualInput:
    """One image or video of a request.

    Attributes:
        kind: "video", "image", or "plain": an image out of a tensor [N, 3, S, S], whose tokens are the patches of its
            one view, whatever the config says of layouts.
        size: (width, height) of the original, which any-resolution layouts need; None if not given.
        views: which of the request's views (frames of a video, tiles of an image) are its own.
    """

    kind: str
    size: tuple[int, int] | None
    views: slice

    @property
    def num_views(self) -> int:
        return self.views.stop - self.views.start


def gather_visuals(
    images: Any, modalities: list[str], image_sizes: Any, device: torch.device
) -> tuple[Tensor, list[VisualInput]]:
    """All views of a request as one batch [V, 3, S, S] on ``device``, and whose they are.

    Args:
        images: [N, 3, S, S] (N plain images), or a list / 5-D tensor of items, each [3, S, S] or [V, 3, S, S].
        modalities: "image", "video" or "text" per item; items beyond the list are images.
        image_sizes: (width, height) per item, or None. Read of images only: LLaVA-NeXT's video scripts give
            ``frame.size`` of numpy frames, which is a number, and one of each frame.
    """
    listed = kinds_of(modalities, len(images))
    plain = isinstance(images, Tensor) and images.ndim == 4
    views = [images] if plain else [v[None] if v.ndim == 3 else v for v in images]
    pixels = torch.cat([v.to(device) for v in views])
    counts = [1] * len(pixels) if plain else [len(v) for v in views]
    kinds = ["plain"] * len(counts) if plain else listed
    sizes = list(image_sizes) if isinstance(image_sizes, Iterable) else []
    sizes += [None] * (len(counts) - len(sizes))
    visuals = [
        VisualInput(kind, None if kind == "video" else _size_of(size), slice(end - count, end))
        for kind, size, count, end in zip(kinds, sizes, counts, itertools.accumulate(counts), strict=False)
    ]
    return pixels, visuals


def kinds_of(modalities: Sequence[str], count: int) -> list[str]:
    """The modality of each of ``count`` items; those beyond the list are images.

    Raises:
        ValueError: a modality that is not known.
    """
    for value in modalities:
        if value not in _MODALITIES:
            raise ValueError(f"modality {value!r} is not known; allowed: {', '.join(_MODALITIES)}.")
    return [*modalities, *["image"] * count][:count]


def _size_of(size: Any) -> tuple[int, int] | None:
    """(width, height) as plain integers (the grid arithmetic is that of python floats); None if it is no such pair."""
    edges = size.tolist() if hasattr(size, "tolist") else size
    if isinstance(edges, (list, tuple)) and len(edges) == 2:
        return int(edges[0]), int(edges[1])
    return None


def by_kind(visuals: Sequence[VisualInput]) -> list[list[int]]:
    """Numbers of the images, and of the videos; a kind that is not there is left out."""
    videos = [number for number, visual in enumerate(visuals) if visual.kind == "video"]
    images = [number for number, visual in enumerate(visuals) if visual.kind != "video"]
    return [numbers for numbers in (images, videos) if numbers]


def subset(pixels: Tensor, visuals: Sequence[VisualInput], numbers: Sequence[int]) -> tuple[Tensor, list[VisualInput]]:
    """The views [V', 3, S, S] of some of the images and videos, and these with their views counted among those."""
    if len(numbers) == len(visuals):
        return pixels, list(visuals)
    own = [visuals[number] for number in numbers]
    ends = list(itertools.accumulate(visual.views.stop - visual.views.start for visual in own))
    slices = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    moved = [dataclasses.replace(visual, views=views) for visual, views in zip(own, slices, strict=True)]
    return torch.cat([pixels[visual.views] for visual in own]), moved


def meta_tokens(views: int, width: int, tower: Any, side: int) -> Tensor:
    """A meta tensor shaped as the tokens [V, P, D] of views of ``side`` pixels are without a method."""
    rows, columns = patch_grid(tower, side)
    front = tower.special_tokens if tower.select_feature == "cls_patch" else 0
    return torch.empty(views, rows * columns + front, width, device="meta")


def patch_grid(tower: Any, side: int) -> tuple[int, int]:
    """(rows, columns) of the patches of a view of ``side`` pixels."""
    return (side // tower.hub_config.patch_size,) * 2


def has_images(images: Any) -> bool:
    return images is not None and len(images) > 0


def brings_images(input_ids: Tensor, images: Any, decoding: bool) -> bool:
    """Whether a call of ``forward`` has images to splice in; those of a decode step are in the cache already.

    Raises:
        ValueError: placeholders, but nothing to put in their place.
    """
    if has_images(images):
        return not decoding or input_ids.shape[1] > 1
    if not decoding and input_ids is not None:
        count = int((input_ids == IMAGE_TOKEN_INDEX).sum())
        if count:
            raise ValueError(f"the prompts hold {count} <image> placeholders but 0 images or videos were given.")
    return False
