"""Where on the input picture each visual token comes from, for pictures of what a method does.

Nothing is assumed about the layout: the coordinates of the patch centres go through the model's own layout code
(pooling, stitching of tiles, unpadding, shrinking) in place of features, and come out as the centres of the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from accelerate_methods.engine.recording import ItemRecord
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.visualize import Cells, Panel, cells_of
from llava.image_processing import SigLipImageProcessor
from llava.mm_utils import (
    _base_side,
    candidate_resolutions,
    expand2square,
    resize_and_pad_image,
    select_best_resolution,
)


def is_anyres(mode: Any) -> bool:
    """Whether an ``image_aspect_ratio`` cuts an image into an overview and tiles."""
    return mode == "anyres" or "anyres_max" in str(mode)


def seen(picture: Image.Image, processor: Any) -> Image.Image:
    """The part of a picture that an image processor shows to the tower.

    SigLIP's squeezes all of it into a square; CLIP's resizes the short edge and cuts out the central square.
    """
    if isinstance(processor, SigLipImageProcessor) or not getattr(processor, "do_center_crop", True):
        return picture
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def image_panels(image: Image.Image, processor: Any, mode: str | None, pinpoints: Any, name: str = "") -> list[Panel]:
    """What the model is shown of an image, in the geometry of the original: one panel, or overview and tiles.

    Args:
        mode, pinpoints: ``image_aspect_ratio`` and ``image_grid_pinpoints`` with which the image was processed.
        name: put before the captions, to tell several images apart.
    """
    image = image.convert("RGB")
    before = f"{name}: " if name else ""
    if is_anyres(mode):
        side = _base_side(processor)
        canvas = select_best_resolution(image.size, candidate_resolutions(pinpoints, side))
        tile = processor.crop_size["height"]
        tiles = (canvas[0] // tile, canvas[1] // tile)
        return [
            Panel(before + "overview", image),
            Panel(f"{before}{tiles[0]} x {tiles[1]} tiles", resize_and_pad_image(image, canvas), tiles=tiles),
        ]
    if mode == "pad":
        square = expand2square(image, tuple(int(mean * 255) for mean in processor.image_mean))
        return [Panel(name or "image, padded", square)]
    return [Panel(name or "image", seen(image, processor))]


def frame_panels(frames: np.ndarray, processor: Any, seconds: Sequence[float] | None = None) -> list[Panel]:
    """One panel per frame of a video [F, H, W, 3] uint8."""
    panels = []
    for number, frame in enumerate(frames):
        time = None if seconds is None else float(seconds[number])
        caption = f"frame {number}" + ("" if time is None else f", {time:.1f} s")
        panels.append(Panel(caption, seen(Image.fromarray(frame), processor), seconds=time))
    return panels


def token_cells(
    model: Any, item: ItemRecord, panels: list[Panel], kind: str, size: tuple[int, int] | None = None
) -> list[Cells]:
    """The cells of one item on its panels, with what became of each token.

    Args:
        model: as it was during the request: a method that makes the input smaller is still attached.
        panels: those of this item.
        kind: "plain", "image" or "video", as in :class:`llava.model.vision.VisualInput`.
        size: (width, height) of the image, for the any-resolution layout.

    Tokens that have no place (``MediaInputs.tokens_have_places``) are drawn in rows, in the order of the prompt.
    """
    if not model.tokens_have_places and item.owner is not None:
        return cells_of(item, _rows_of_tokens(item.owner.numel(), len(panels)), len(panels))
    centres = _patch_centres(model, panels, kind)
    views = centres.shape[0]
    if item.owner is None:
        raise MethodError("the request has no provenance; run it inside accelerate_methods.record().")
    if item.owner.shape[0] != views or views == 1 or kind == "video":  # tokens of the language model
        centres = model.lay_out(centres, kind, size).features.flatten(0, 1)
    else:  # a method that acts on views: its tokens are patches
        centres = centres.flatten(0, 1)
    if len(centres) != item.owner.numel():
        raise MethodError(
            f"the item has {item.owner.numel()} tokens, but the model's layout gives {len(centres)}; was it processed "
            "with other settings than the model's config has now?"
        )
    # (a, -a) went through together: where tokens are maxima over patches (max pooling), this is the middle of the range
    places = ((centres[:, :3] - centres[:, 3:]) / 2).numpy()
    return cells_of(item, places, len(panels))


def _rows_of_tokens(tokens: int, panels: int) -> np.ndarray:
    """[tokens, 3] (panel, x, y): the tokens in order, spread over the panels evenly, in rows of a near square."""
    panel = np.arange(tokens) * panels // tokens
    found = []
    for number in range(panels):
        count = int((panel == number).sum())
        columns = math.ceil(math.sqrt(count)) or 1
        row, column = np.divmod(np.arange(count), columns)
        rows = -(-count // columns)
        found.append(np.stack([np.full(count, number), (column + 0.5) / columns, (row + 0.5) / max(rows, 1)], axis=1))
    return np.concatenate(found)


def _patch_centres(model: Any, panels: list[Panel], kind: str) -> Tensor:
    """[V, P, 6] (panel, x, y, -panel, -x, -y) of the patches; x and y as fractions of the panel."""
    tower = model.get_vision_tower()
    patch, side = tower.hub_config.patch_size, tower.image_size
    sample = model.acceleration.pipeline.sample if model.acceleration is not None else None
    if sample is not None:
        side = sample.input_side(side, patch)
    middle = (torch.arange(side // patch, dtype=torch.float64) + 0.5) * patch / side
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    whole = torch.stack([x.flatten(), y.flatten()], dim=-1)
    views = []
    for number, panel in enumerate(panels):
        columns, rows = panel.tiles or (1, 1)
        for tile in range(columns * rows):
            corner = torch.tensor([tile % columns, tile // columns], dtype=torch.float64)
            place = (whole + corner) / torch.tensor([columns, rows], dtype=torch.float64)
            views.append(torch.cat([torch.full((len(place), 1), float(number), dtype=torch.float64), place], dim=1))
    stacked = torch.stack(views)
    return torch.cat([stacked, -stacked], dim=-1)
