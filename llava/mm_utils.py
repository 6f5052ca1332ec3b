"""Images to model inputs and prompts to ids, with the names and signatures of LLaVA-NeXT's `llava.mm_utils`.

Sizes are (width, height) throughout. What the functions follow: docs/llava_tree.md, "Layouts of images" and "Texts".
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteria

from accelerate_methods.hosts.anyres import (
    GridPinpoints,
    candidate_resolutions,
    get_anyres_image_grid_shape,  # noqa: F401 (official name)
    select_best_resolution,
)
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX


def resize_and_pad_image(image: Image.Image, target_resolution: tuple[int, int]) -> Image.Image:
    """Scale an image into (width, height) keeping its aspect ratio, centred on black."""
    width, height = target_resolution
    scale_w, scale_h = width / image.width, height / image.height
    if scale_w < scale_h:
        new_size = (width, min(math.ceil(image.height * scale_w), height))
    else:
        new_size = (min(math.ceil(image.width * scale_h), width), height)
    canvas = Image.new("RGB", (width, height), (0, 0, 0))
    canvas.paste(image.resize(new_size), ((width - new_size[0]) // 2, (height - new_size[1]) // 2))
    return canvas


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Cut an image into square tiles, row by row."""
    return [
        image.crop((x, y, x + patch_size, y + patch_size))
        for y in range(0, image.height, patch_size)
        for x in range(0, image.width, patch_size)
    ]


# -- processors --------------------------------------------------------------------------------------------------------


def _field(size: Any, name: str) -> int | None:
    """A field of a processor's size: a dict, or transformers 5's SizeDict (not a dict; absent fields are None)."""
    return size.get(name) if isinstance(size, dict) else getattr(size, name, None)


def _base_side(processor: Any) -> int:
    """Side of the square overview of an any-resolution image."""
    size = processor.size
    if isinstance(size, int):
        return size
    if isinstance(size, (tuple, list)):
        return min(size)
    shortest = _field(size, "shortest_edge")
    return shortest if shortest is not None else min(_field(size, "height"), _field(size, "width"))


def _pixels(processor: Any, images: list[Image.Image]) -> torch.Tensor:
    """[N, 3, S, S] of images that all come out of the processor with one size."""
    return processor.preprocess(images, return_tensors="pt")["pixel_values"]


def process_anyres_image(image: Image.Image, processor: Any, grid_pinpoints: GridPinpoints) -> torch.Tensor:
    """Overview and tiles of one image.

    Args:
        image: RGB.
        processor: its crop_size["height"] is the tile side.
        grid_pinpoints: candidate canvases, as in the model config.
    Returns:
        [1 + columns * rows, 3, S, S]; view 0 is the whole image squeezed to a square (the aspect ratio is lost, as the
        checkpoints were trained), then the tiles row by row.
    """
    side = _base_side(processor)
    canvas = select_best_resolution(image.size, candidate_resolutions(grid_pinpoints, side))
    tiles = divide_to_patches(resize_and_pad_image(image, canvas), processor.crop_size["height"])
    return _pixels(processor, [image.resize((side, side)), *tiles])


def expand2square(pil_img: Image.Image, background_color: int | tuple[int, ...]) -> Image.Image:
    """Centre an image on a square of its long side; a square image is returned as it is."""
    width, height = pil_img.size
    if width == height:
        return pil_img
    side = max(width, height)
    square = Image.new(pil_img.mode, (side, side), background_color)
    square.paste(pil_img, ((side - width) // 2, (side - height) // 2))
    return square


def process_images(
    images: Sequence[Image.Image], image_processor: Any, model_cfg: Any
) -> torch.Tensor | list[torch.Tensor]:
    """Model input of a list of images, by `model_cfg.image_aspect_ratio`.

    "pad": padded to a square with the processor's mean colour; "anyres" or "anyres_max_N": overview and tiles
    (`model_cfg.image_grid_pinpoints`); any other name: the processor alone.

    Returns:
        one tensor if all images give the same shape ([N,3,S,S], or [N,V,3,S,S] for any-resolution), else a list of
        [V,3,S,S].
    Raises:
        ValueError: no image, the mode is not set, or it is one of the old modes that no released checkpoint uses.
    """
    if len(images) == 0:
        raise ValueError("process_images needs at least one image, got an empty list")
    mode = getattr(model_cfg, "image_aspect_ratio", None)
    if mode is None:
        raise ValueError(
            "the model config has no image_aspect_ratio; set it to 'pad', 'anyres', 'anyres_max_<N>', or 'square' to "
            "leave images to the processor (LLaVA-1.5: pad, LLaVA-1.6: anyres, OneVision: anyres_max_9)"
        )
    if mode in ("highres", "crop_split"):
        raise ValueError(
            f"image_aspect_ratio {mode!r} is not supported; use 'pad', 'anyres', 'anyres_max_<N>' or 'square'"
        )

    images = [image if image.mode == "RGB" else image.convert("RGB") for image in images]
    if mode == "anyres" or "anyres_max" in mode:
        items = [process_anyres_image(image, image_processor, model_cfg.image_grid_pinpoints) for image in images]
        return torch.stack(items) if len({item.shape for item in items}) == 1 else items
    if mode == "pad":
        background = tuple(int(mean * 255) for mean in image_processor.image_mean)
        images = [expand2square(image, background) for image in images]
    return _pixels(image_processor, images)


def process_highres_image(image: Image.Image, processor: Any, grid_pinpoints: str) -> torch.Tensor:
    """Overview and square tiles of one image, as LLaVA-NeXT's "highres" mode cuts them.

    The image is padded to a square in the processor's mean colour and brought to the smallest of the offered sides that
    is not below its own long side (else to the largest).

    Args:
        grid_pinpoints: the sides on offer in pixels, "336,672,1008".
    Returns:
        [1 + n * n, 3, S, S]; view 0 is the whole image squeezed to a square. Tiles that would not be whole are
        left out.
    """
    sides = sorted(int(side) for side in grid_pinpoints.split(","))
    side = next((side for side in sides if side >= max(image.size)), sides[-1])
    tile = _base_side(processor)
    square = expand2square(image, tuple(int(mean * 255) for mean in processor.image_mean)).resize((side, side))
    return _pixels(processor, [image.resize((tile, tile)), *_whole_tiles(square, tile)])


def process_highres_image_crop_split(image: Image.Image, data_args: Any, processor: Any = None) -> torch.Tensor:
    """Square tiles of the middle of one image, as LLaVA-NeXT's "crop_split" mode cuts them.

    Args:
        data_args: ``image_crop_resolution``: side to which the short edge is brought, and of the square that is cut out
            of the middle; ``image_split_resolution``: side of a tile; ``image_processor`` where no processor is given.
    Returns:
        [n * n, 3, S, S]; tiles that would not be whole are left out.
    """
    side = data_args.image_crop_resolution
    ratio = image.width / image.height
    large = (int(side * ratio), side) if ratio > 1 else (side, int(side / ratio))
    left, top = (large[0] - side) // 2, (large[1] - side) // 2
    square = image.resize(large, Image.Resampling.LANCZOS).crop((left, top, left + side, top + side))
    processor = data_args.image_processor if processor is None else processor
    return _pixels(processor, _whole_tiles(square, data_args.image_split_resolution))


def _whole_tiles(image: Image.Image, side: int) -> list[Image.Image]:
    """Tiles of one side, row by row, without those that the image cuts short."""
    whole = (image.width // side * side, image.height // side * side)
    return divide_to_patches(image.crop((0, 0, *whole)), side)


def load_image_from_base64(image: str | bytes) -> Image.Image:
    """Open an image file given as base64 text, with or without a "data:image/...;base64," header.

    Raises:
        ValueError: not base64, or no image inside.
    """
    text = image.decode("ascii") if isinstance(image, bytes) else image
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return Image.open(io.BytesIO(base64.b64decode(text)))
    except (binascii.Error, OSError) as error:
        raise ValueError(f"not an image in base64: {error}") from error


# -- text --------------------------------------------------------------------------------------------------------------


def tokenizer_image_token(
    prompt: str, tokenizer: Any, image_token_index: int = IMAGE_TOKEN_INDEX, return_tensors: str | None = None
) -> list[int] | torch.Tensor:
    """Tokenise a prompt with one `image_token_index` in place of every "<image>".

    The text between placeholders is tokenised piece by piece, as in training; of the BOS that each piece gets, only the
    first stays.

    Returns:
        list of ids, or with return_tensors="pt" a LongTensor [L].
    Raises:
        ValueError: any other return_tensors.
    """
    if return_tensors not in (None, "pt"):
        raise ValueError(f"return_tensors={return_tensors!r}: expected 'pt' or None")
    chunks = [list(tokenizer(text).input_ids) for text in prompt.split(DEFAULT_IMAGE_TOKEN)]
    bos = chunks[0][:1] if chunks[0] and chunks[0][0] == tokenizer.bos_token_id else []
    ids = list(bos)
    for i, chunk in enumerate(chunks):
        ids += [image_token_index] * (i > 0) + chunk[len(bos) :]
    return torch.tensor(ids, dtype=torch.long) if return_tensors == "pt" else ids


def load_pretrained_model(model_path: str, **kwargs: Any) -> Any:
    """:func:`llava.model.builder.load_pretrained_model`, which Yi-VL's tree keeps here; options by keyword only."""
    from llava.model import builder

    return builder.load_pretrained_model(model_path, **kwargs)


def get_model_name_from_path(model_path: str) -> str:
    """Last part of a path or hub id; a "checkpoint-N" folder is named after its parent too."""
    parts = model_path.strip("/").split("/")
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stop generating when a keyword stands at the end of the ids, or in the text of the last few new tokens.

    The text check leaves special tokens out, as in the official code: those stop by their ids. It finds a keyword
    that the model spelt with other tokens than the tokenizer would.

    Args:
        keywords: texts to stop at; empty ones are ignored.
        tokenizer: of the model.
        input_ids: prompt ids [B, L]. The ids generated later may or may not repeat them (they do not when the prompt
            went in as embeddings).
    """

    def __init__(self, keywords: Sequence[str], tokenizer: Any, input_ids: torch.Tensor) -> None:
        self.keywords = [keyword for keyword in keywords if keyword]
        self.tokenizer = tokenizer
        self.input_ids = input_ids
        self.keyword_ids: list[list[int]] = []
        for keyword in self.keywords:
            ids = list(tokenizer(keyword).input_ids)
            if len(ids) > 1 and ids[0] == tokenizer.bos_token_id:
                ids = ids[1:]
            self.keyword_ids.append(ids)
        # A keyword of n bytes spans at most n tokens (byte fallback); one more, as it may begin inside a token.
        self._window = max((len(keyword.encode()) + 1 for keyword in self.keywords), default=0)

    def _generated(self, output_ids: torch.Tensor) -> torch.Tensor:
        length = self.input_ids.shape[-1]
        prompt = (self.input_ids if self.input_ids.ndim == 2 else self.input_ids[None]).to(output_ids.device)
        if output_ids.shape[1] < length or len(prompt) != len(output_ids):
            return output_ids
        return output_ids[:, length:] if torch.equal(output_ids[:, :length], prompt) else output_ids

    def _row_stops(self, ids: list[int]) -> bool:
        if any(keyword == ids[-len(keyword) :] for keyword in self.keyword_ids if keyword):
            return True
        tail = self.tokenizer.decode(ids[-self._window :], skip_special_tokens=True)
        return any(keyword in tail for keyword in self.keywords)

    def __call__(
        self, output_ids: torch.LongTensor, scores: torch.FloatTensor | None = None, **kwargs: Any
    ) -> bool | torch.BoolTensor:
        """Which rows of output_ids [B, n] end here: a bool for B = 1, else a BoolTensor [B], row by row."""
        if not self.keywords:
            stops = [False] * len(output_ids)
        else:
            stops = [self._row_stops(row) for row in self._generated(output_ids)[:, -self._window :].tolist()]
        return stops[0] if len(stops) == 1 else torch.tensor(stops, dtype=torch.bool, device=output_ids.device)
