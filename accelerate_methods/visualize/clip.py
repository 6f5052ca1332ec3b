"""The clip with its tokens, one row per method: a video."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from accelerate_methods.stages.errors import MethodError, one_line
from accelerate_methods.visualize.cells import Overlay, Panel
from accelerate_methods.visualize.painting import (
    GREY,
    INK,
    PAPER,
    draw_legend,
    fitted,
    font,
    overlay_paint,
    wrapped,
    writing,
)
from accelerate_methods.visualize.sheet import share

RATE = 10  # pictures per second of the file; a frame stays for as many as it needs
MARGIN, GAP = 20, 14
PICTURE_WIDTH, TEXT_WIDTH = 480, 440
ROW_HEIGHT = 300  # most of a picture
TEXT_HEIGHT = 150
TITLE, TEXT = 24, 18


def write_clip(panels: Sequence[Panel], overlays: Sequence[Overlay], path: str | Path, title: str = "") -> Path:
    """Save the frames that the model saw, each for as long as it stands for, with the cells of every method.

    Raises:
        MethodError: neither PyAV nor imageio is installed, or neither can write the file.
    """
    writer = _writer(path)
    pictures = (_picture(panels, overlays, index, title) for index in range(len(panels)))
    holds = _holds(panels)
    with writing(path):
        writer(Path(path), pictures, holds)
    return Path(path)


def _holds(panels: Sequence[Panel]) -> list[int]:
    """For how many pictures of the file each frame stays: until the next one; the last as long as the one before."""
    seconds = [p.seconds for p in panels]
    if len(panels) < 2 or any(s is None for s in seconds):
        return [RATE // 2] * len(panels)  # frames without times: two a second
    ticks = [round(s * RATE) for s in seconds]
    gaps = [b - a for a, b in itertools.pairwise(ticks)]
    return [max(1, gap) for gap in [*gaps, gaps[-1]]]


def _picture(panels: Sequence[Panel], overlays: Sequence[Overlay], index: int, title: str) -> Image.Image:
    picture = panels[index].picture
    height = max(120, round(PICTURE_WIDTH * picture.height / picture.width))
    width = PICTURE_WIDTH
    if height > ROW_HEIGHT:
        height, width = ROW_HEIGHT, round(ROW_HEIGHT * picture.width / picture.height)
    wide = 2 * MARGIN + width + GAP + TEXT_WIDTH
    page = Image.new("RGB", (wide + wide % 2, 4000), PAPER)
    draw = ImageDraw.Draw(page)
    y = MARGIN
    for line in wrapped(title, font(TITLE - 4, bold=True), wide - 2 * MARGIN, lines=2):
        draw.text((MARGIN, y), line, font=font(TITLE - 4, bold=True), fill=INK)
        y += int(TITLE * 1.3)
    y += draw_legend(draw, (MARGIN, y + 4), overlays, TEXT - 3, wide - 2 * MARGIN) + 12
    for overlay in overlays:
        page.paste(overlay_paint(overlay, panels, index, (width, height)), (MARGIN, y))
        _text(draw, overlay, (MARGIN + width + GAP, y), f"{panels[index].caption}: {share(overlay, index)} tokens")
        y += max(height, TEXT_HEIGHT) + GAP
    y += MARGIN - GAP
    return page.crop((0, 0, page.width, y + y % 2))  # encoders want even sides


def _text(draw: ImageDraw.ImageDraw, overlay: Overlay, at: tuple[int, int], frame: str) -> None:
    x, y = at
    draw.text((x, y), fitted(overlay.label, font(TITLE, bold=True), TEXT_WIDTH), font=font(TITLE, bold=True), fill=INK)
    y += int(TITLE * 1.5)
    lines = wrapped(overlay.counts(), font(TEXT), TEXT_WIDTH, lines=2)
    lines += wrapped(f"answer: {overlay.answer}", font(TEXT), TEXT_WIDTH, lines=2) if overlay.answer else []
    for text, colour in [*((line, INK) for line in lines), (frame, GREY)]:
        draw.text((x, y), fitted(text, font(TEXT), TEXT_WIDTH), font=font(TEXT), fill=colour)
        y += int(TEXT * 1.4)


_Writer = Callable[[Path, "Sequence[Image.Image]", "list[int]"], None]


def _writer(path: str | Path) -> _Writer:
    if find_spec("av"):
        return _with_av
    if find_spec("imageio"):
        return _with_imageio
    raise MethodError(f"cannot write {path}: pip install av (or imageio[ffmpeg]); .png and .html need neither.")


def _with_av(path: Path, pictures: Sequence[Image.Image], holds: list[int]) -> None:
    import av

    codec = next((name for name in ("libx264", "mpeg4") if name in av.codecs_available), None)
    if codec is None:
        raise MethodError(f"cannot write {path}: this PyAV has neither libx264 nor mpeg4.")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.pix_fmt = "yuv420p"
        if codec == "libx264":
            stream.options = {"crf": "16"}
        else:
            stream.bit_rate = 8_000_000
        for picture, hold in zip(pictures, holds, strict=True):
            stream.width, stream.height = picture.size
            pixels = np.asarray(picture)
            for _ in range(hold):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def _with_imageio(path: Path, pictures: Sequence[Image.Image], holds: list[int]) -> None:
    import imageio.v2 as imageio

    try:
        with imageio.get_writer(path, fps=RATE, macro_block_size=2) as file:
            for picture, hold in zip(pictures, holds, strict=True):
                for _ in range(hold):
                    file.append_data(np.asarray(picture))
    except (ValueError, ImportError, OSError) as error:
        raise MethodError(f"cannot write {path} with imageio: {one_line(error)}") from error
