"""Token cells over a picture: kept ones clear and framed, merged ones dim, dropped ones dark."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from accelerate_methods.stages.errors import MethodError, one_line
from accelerate_methods.visualize.cells import DROPPED, KEPT, LEFT, MERGED, NOWHERE, Cells, Overlay

if TYPE_CHECKING:
    from accelerate_methods.visualize.cells import Panel

#: how much of the picture's brightness is left
SHADE = {DROPPED: 0.18, MERGED: 0.45, KEPT: 1.0}
#: around the area of kept cells
FRAME = (255, 204, 0)
#: tint of tokens that left inside the LLM, from its first layer to its last; drawn over the picture at these weights
LAYER_COLOURS = ((76, 60, 170), (170, 50, 130), (226, 88, 80), (250, 160, 90))
TINT, UNDER_TINT = 0.5, 0.4
EMPTY = (232, 232, 232)
INK, GREY, PAPER = (24, 24, 27), (100, 100, 108), (255, 255, 255)


def layer_colour(layer: int, num_layers: int) -> tuple[int, int, int]:
    """Colour of tokens that left before decoder layer ``layer``."""
    place = min(1.0, layer / max(1, num_layers - 1)) * (len(LAYER_COLOURS) - 1)
    low = min(int(place), len(LAYER_COLOURS) - 2)
    mixed = np.array(LAYER_COLOURS[low]) * (low + 1 - place) + np.array(LAYER_COLOURS[low + 1]) * (place - low)
    return tuple(np.rint(mixed).astype(int).tolist())


def paint(
    panel: Panel, cells: Cells, size: tuple[int, int], num_layers: int, layer: int | None = None, frame: bool = True
) -> Image.Image:
    """The panel with its cells, ``size`` (width, height) pixels.

    Args:
        layer: decoder layer whose tokens count as kept; None: the last one.
        frame: draw the frame around kept cells, and thin lines between tokens. False for what is untouched.
    """
    width, height = size
    pixels = np.asarray(panel.picture.convert("RGB").resize(size, Image.Resampling.LANCZOS), dtype=np.float32)
    states = cells.at(num_layers - 1 if layer is None else layer)
    xs, ys = np.rint(cells.xs * width).astype(int), np.rint(cells.ys * height).astype(int)
    scale = np.ones((*states.shape, 1), dtype=np.float32)
    added = np.zeros((*states.shape, 3), dtype=np.float32)
    for state, shade in SHADE.items():
        scale[states == state] = shade
    for gone in np.unique(cells.left[states == LEFT]):
        here = (states == LEFT) & (cells.left == gone)
        scale[here], added[here] = UNDER_TINT, TINT * np.array(layer_colour(int(gone), num_layers))
    scale[states == NOWHERE], added[states == NOWHERE] = 0.0, EMPTY
    row, column = (np.repeat(np.arange(len(e) - 1), np.diff(e)) for e in (ys, xs))
    out = np.empty((height, width, 3), dtype=np.float32)
    out[:] = EMPTY
    inside = slice(ys[0], ys[-1]), slice(xs[0], xs[-1])
    out[inside] = pixels[inside] * scale[row][:, column] + added[row][:, column]
    if frame:
        _draw_lines(out, states, cells.owner, xs, ys)
    return Image.fromarray(out.clip(0, 255).astype(np.uint8))


def _draw_lines(out: np.ndarray, states: np.ndarray, owner: np.ndarray, xs: np.ndarray, ys: np.ndarray) -> None:
    """Frame kept areas, and part neighbouring tokens that different output tokens hold by thin lines."""
    kept = np.pad(states == KEPT, 1)
    held = np.pad(np.where((states == KEPT) | (states == MERGED), owner, -1), 1, constant_values=-1)
    least = min(int(np.diff(xs).min(initial=99)), int(np.diff(ys).min(initial=99)))
    thick = 1 if least < 12 else 2 if least < 40 else 3
    for flip in (False, True):  # lines between rows, then between columns
        k, h, picture = (kept.T, held.T, out.swapaxes(0, 1)) if flip else (kept, held, out)
        along, across = (ys, xs) if flip else (xs, ys)
        parts = (h[1:] != h[:-1]) & (h[1:] >= 0) & (h[:-1] >= 0)
        for r, c in zip(*np.nonzero(parts[:, 1:-1]), strict=True):
            line = picture[across[r] : across[r] + 1, along[c] : along[c + 1]]
            line += 0.28 * (255 - line)
    limits = out.shape[1], out.shape[0]
    for flip in (False, True):
        k, picture = (kept.T, out.swapaxes(0, 1)) if flip else (kept, out)
        along, across, limit = (ys, xs, limits[0]) if flip else (xs, ys, limits[1])
        for r, c in zip(*np.nonzero((k[1:] != k[:-1])[:, 1:-1]), strict=True):
            # inside the kept cell, so that the frame belongs to it
            start = across[r] if k[r + 1, c + 1] else across[r] - thick
            start = min(max(0, start), limit - thick)
            picture[start : start + thick, max(0, along[c]) : along[c + 1]] = FRAME


def overlay_paint(
    overlay: Overlay, panels: Sequence[Panel], index: int, size: tuple[int, int], layer: int | None = None
):
    """Panel ``index`` of an overlay; nothing is drawn on what the method left as it is."""
    return paint(panels[index], overlay.cells[index], size, overlay.num_layers, layer, frame=not overlay.untouched)


# -- text --------------------------------------------------------------------------------------------------------------


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans if matplotlib (which brings it) is there, for other letters than Latin; else Pillow's own font."""
    try:
        import matplotlib

        name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
        return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}", size)
    except (ImportError, OSError):
        return ImageFont.load_default(size)


def fitted(text: str, face: ImageFont.FreeTypeFont, width: float) -> str:
    """``text`` in one line of at most ``width`` pixels, cut with dots."""
    if len(text) <= width and face.getlength(text) <= width:  # no letter is narrower than a pixel
        return text
    counts = range(1, min(len(text), int(width)) + 1)
    count = bisect.bisect_right(counts, width, key=lambda n: face.getlength(text[:n] + "..."))
    return text[:count].rstrip() + "..."


def wrapped(text: str, face: ImageFont.FreeTypeFont, width: float, lines: int = 3) -> list[str]:
    """``text`` broken at spaces into at most ``lines`` lines of ``width`` pixels."""
    out: list[str] = []
    words = text.split()
    while words and len(out) < lines - 1:
        count = 1
        while count < len(words) and face.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        out.append(fitted(" ".join(words[:count]), face, width))
        words = words[count:]
    return [*out, fitted(" ".join(words), face, width)] if words else out


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Errors of writing a picture name it.

    Raises:
        MethodError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise MethodError(f"cannot write {path}: {error.strerror or one_line(error)}") from error


def legend(overlays: Sequence[Overlay]) -> list[tuple[tuple[int, int, int], bool, str]]:
    """(colour, framed, text) for every state that occurs."""
    states = {int(s) for o in overlays for c in o.cells for s in np.unique(c.at(o.num_layers - 1))}
    grey = 205
    entries = []
    if not all(o.untouched for o in overlays):
        entries.append(((grey,) * 3, True, "kept"))
    if MERGED in states:
        entries.append(((int(grey * SHADE[MERGED]),) * 3, False, "merged into a kept token"))
    if DROPPED in states:
        entries.append(((int(grey * SHADE[DROPPED]),) * 3, False, "dropped before the LLM"))
    for layer, num_layers in sorted({(layer, o.num_layers) for o in overlays for layer in o.drops}):
        colour = np.array(layer_colour(layer, num_layers)) * TINT + grey * UNDER_TINT
        text = f"dropped in the LLM, before layer {layer} (of 0 to {num_layers - 1})"
        entries.append((tuple(int(c) for c in colour), False, text))
    if NOWHERE in states:
        entries.append((EMPTY, False, "no token"))
    return entries


def draw_legend(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], overlays: Sequence[Overlay], size: int, width: int
) -> int:
    """Draw the legend from ``at`` on, wrapping after ``width`` pixels; the height that it took."""
    face = font(size)
    x, y = at
    for colour, framed, text in legend(overlays):
        need = int(size * 1.7 + face.getlength(text) + size * 1.6)
        if x + need > at[0] + width and x > at[0]:
            x, y = at[0], y + int(size * 1.8)
        box = (x, y, x + int(size * 1.2), y + int(size * 1.2))
        draw.rectangle(box, fill=colour, outline=FRAME if framed else colour, width=max(2, size // 8))
        draw.text((x + int(size * 1.7), y + int(size * 0.6)), text, font=face, fill=GREY, anchor="lm")
        x += need
    return y - at[1] + int(size * 1.8)
