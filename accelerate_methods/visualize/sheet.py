"""The contact sheet: every panel, once per method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from accelerate_methods.stages.errors import MethodError
from accelerate_methods.visualize.cells import KEPT, NOWHERE, Overlay, Panel, even_cells
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

if TYPE_CHECKING:
    from accelerate_methods.engine.recording import ItemRecord

WIDTH, MARGIN, GAP = 2000, 36, 10
BETWEEN = 44  # blocks
SMALLEST_CELL = 12  # pixels
MAX_HEIGHT = 700  # of a panel
TITLE, TEXT, SMALL = 30, 23, 17
SEPARATOR = "  \N{MIDDLE DOT}  "


def draw_sheet(
    panels: Sequence[Panel],
    overlays: Sequence[Overlay],
    path: str | Path,
    title: str = "",
    columns: int | None = None,
    captions: bool = True,
) -> Path:
    """Save a picture with one block per overlay: method, what it kept, the answer, and all panels.

    Args:
        title: e.g. the question; in front of everything.
        columns: most panels in a row; by default 8, or 4 where that makes the cells too small. Blocks of one
            or two panels stand side by side.
    """
    for overlay in overlays:
        if len(overlay.cells) != len(panels):
            raise MethodError(f"{len(panels)} frames given for the {len(overlay.cells)} frames of the item.")
    abreast = _blocks_abreast(len(panels), len(overlays))
    inner = WIDTH - 2 * MARGIN
    width = (inner - BETWEEN * (abreast - 1)) // abreast
    columns = columns or _columns(panels, overlays, width)
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    height = min(MAX_HEIGHT, *(int((width - GAP * (len(r) - 1)) / _aspects(r)) for r in rows))
    stripes = []
    for stripe in (overlays[i : i + abreast] for i in range(0, len(overlays), abreast)):
        most = max(sum(_step(face) for _, face, _ in _heading(overlay, width)) for overlay in stripe)
        stripes.append([_block(panels, overlay, width, height, columns, captions, most) for overlay in stripe])
    lines = wrapped(title, font(TITLE + 4, bold=True), inner)
    head = len(lines) * int(TITLE * 1.6) + int(TEXT * 5)  # legends take two rows at most; what is unused is cut
    page = Image.new(
        "RGB", (WIDTH, head + sum(max(b.height for b in s) + BETWEEN for s in stripes) + 2 * MARGIN), PAPER
    )
    draw = ImageDraw.Draw(page)
    y = MARGIN
    for line in lines:
        draw.text((MARGIN, y), line, font=font(TITLE + 4, bold=True), fill=INK)
        y += int(TITLE * 1.6)
    y += draw_legend(draw, (MARGIN, y + 6), overlays, TEXT - 2, inner) + 28
    right = 0
    for stripe in stripes:
        for number, block in enumerate(stripe):
            x = MARGIN + number * (width + BETWEEN)
            page.paste(block, (x, y))
            right = max(right, x + max(int(height * _aspects(r)) + GAP * (len(r) - 1) for r in rows))
        y += max(b.height for b in stripe) + BETWEEN
    page = page.crop((0, 0, max(right, WIDTH * 3 // 5) + MARGIN, y - BETWEEN + MARGIN))
    with writing(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        page.save(path)
    return Path(path)


def _columns(panels: Sequence[Panel], overlays: Sequence[Overlay], width: int) -> int:
    most = max(len(c.ys) - 1 for o in overlays for c in o.cells)
    cell = width / 8 / max(p.picture.width / p.picture.height for p in panels) / most
    return 4 if cell < SMALLEST_CELL else 8


def _aspects(row: Sequence[Panel]) -> float:
    return sum(p.picture.width / p.picture.height for p in row)


def _blocks_abreast(panels: int, overlays: int) -> int:
    """How many methods stand beside each other."""
    most = {1: 4, 2: 2}.get(panels, 1)
    if overlays <= most:
        return max(1, overlays)
    return min(range(max(1, most - 1), most + 1), key=lambda n: (-overlays % n, -n))  # fewest empty places


def _heading(overlay: Overlay, width: int) -> list[tuple[str, ImageFont.FreeTypeFont, tuple[int, int, int]]]:
    """Lines above a block, with font and colour: method, counts and answer, notes."""
    big, text, small = font(TITLE, bold=True), font(TEXT), font(TEXT - 3)
    facts = [overlay.counts(), *([f"answer: {overlay.answer}"] if overlay.answer else [])]
    if text.getlength(SEPARATOR.join(facts)) <= width:
        facts = [SEPARATOR.join(facts)]
    lines = [(line, big, INK) for line in wrapped(overlay.label.replace(",", ", "), big, width)]
    lines += [(line, text, INK) for fact in facts for line in wrapped(fact, text, width)]
    return lines + [(line, small, GREY) for note in overlay.notes() for line in wrapped(note, small, width)]


def _step(face: ImageFont.FreeTypeFont) -> int:
    return int(face.size * 1.4)


def _block(
    panels: Sequence[Panel], overlay: Overlay, width: int, height: int, columns: int, captions: bool, top: int
) -> Image.Image:
    """Heading (``top`` pixels high) and panels of one method."""
    small = font(SMALL)
    step = height + GAP + (int(SMALL * 1.5) if captions else 0)
    top, y = top + 10, 0
    block = Image.new("RGB", (width, top + -(-len(panels) // columns) * step), PAPER)
    draw = ImageDraw.Draw(block)
    for line, face, colour in _heading(overlay, width):
        draw.text((0, y), line, font=face, fill=colour)
        y += _step(face)
    x = 0
    for index, panel in enumerate(panels):
        if index % columns == 0:
            x = 0
        y = top + index // columns * step
        size = max(1, int(panel.picture.width / panel.picture.height * height)), height
        block.paste(overlay_paint(overlay, panels, index, size), (x, y))
        if captions:
            caption = fitted(f"{panel.caption}: {share(overlay, index)}", small, size[0])
            draw.text((x, y + height + 3), caption, font=small, fill=GREY)
        x += size[0] + GAP
    return block


def share(overlay: Overlay, index: int) -> str:
    """Tokens that stand in a panel at the end, of all that it has."""
    cells = overlay.cells[index]
    states = cells.at(overlay.num_layers - 1)
    total, kept = int((states != NOWHERE).sum()), int((states == KEPT).sum())
    return f"{kept}" if kept == total else f"{kept} of {total}"


def draw_kept_tokens(frames: np.ndarray, item: ItemRecord, path: str | Path, title: str = "", columns: int = 8) -> Path:
    """Save a PNG of ``frames`` [F, H, W, 3] uint8: kept cells as they are, merged ones dim, dropped ones dark."""
    panels = [Panel(f"frame {number}", Image.fromarray(frame)) for number, frame in enumerate(frames)]
    overlay = Overlay(
        label="",
        tokens_before=item.tokens_before,
        tokens_after=item.tokens_after,
        num_layers=item.num_layers,
        cells=even_cells(item),
    )
    return draw_sheet(panels, [overlay], path, title, columns=columns)
