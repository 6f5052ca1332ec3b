"""Pictures and videos as LLaVA-Mini reads them: sub-images for high resolution, one frame per second."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image


def split_image(image: Image.Image, ratio: int) -> list[Image.Image]:
    """``ratio`` x ``ratio`` equal crops from the top left in raster order, then the whole image; the image for 1.

    Pixels that remain at the right and bottom are in no crop (`split_image` of `llavamini/eval/run_llava_mini.py`).

    Raises:
        ValueError: an image with fewer pixels than crops on a side.
    """
    if ratio == 1:
        return [image]
    width, height = image.width // ratio, image.height // ratio
    if not width or not height:
        raise ValueError(f"an image of {image.width} x {image.height} pixels cannot be cut into {ratio} x {ratio}.")
    corners = [(width * column, height * row) for row in range(ratio) for column in range(ratio)]
    return [*(image.crop((left, top, left + width, top + height)) for left, top in corners), image]


def sample_frames(total: int, fps: float, max_frames: int | None = None) -> list[int]:
    """Numbers of the frames that stand for a video: the middles of as many equal stretches as it has seconds.

    Rounding halves goes to even numbers, as in the official code, which fails on a video shorter than a second; here
    that is one frame.

    Args:
        total: frames of the video; fps: its average rate; max_frames: at most so many.
    """
    count = min(total, max(1, int(total // fps)))
    if max_frames is not None:
        count = min(count, max_frames)
    stretch = (total - 1) / count
    return [(round(stretch * number) + round(stretch * (number + 1))) // 2 for number in range(count)]


def squeezed(frames: np.ndarray, side: int) -> list[Image.Image]:
    """uint8 [F, H, W, 3] frames of any shape as pictures of ``side`` x ``side`` pixels, by nearest neighbours."""
    pixels = torch.from_numpy(np.array(frames)).permute(0, 3, 1, 2)
    if pixels.shape[2:] != (side, side):
        pixels = torch.nn.functional.interpolate(pixels, (side, side))
    return [Image.fromarray(frame) for frame in pixels.permute(0, 2, 3, 1).contiguous().numpy()]
