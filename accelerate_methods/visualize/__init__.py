"""Pictures of what methods do with visual tokens: a contact sheet (PNG), a page (HTML), a clip (mp4).

:mod:`.cells` says what became of every token and where on the input it lies; the other modules draw that. Nothing here
knows a model: ``llava.token_places`` tells where the tokens of a LLaVA model come from.
"""

from accelerate_methods.visualize.cells import (
    DROPPED,
    KEPT,
    LEFT,
    MERGED,
    NOWHERE,
    Cells,
    Overlay,
    Panel,
    cells_of,
    numbered_on,
    token_states,
)
from accelerate_methods.visualize.clip import write_clip
from accelerate_methods.visualize.page import write_page
from accelerate_methods.visualize.painting import paint
from accelerate_methods.visualize.sheet import draw_kept_tokens, draw_sheet

__all__ = [
    "DROPPED", "KEPT", "LEFT", "MERGED", "NOWHERE", "Cells", "Overlay", "Panel", "cells_of", "draw_kept_tokens",
    "draw_sheet", "numbered_on", "paint", "token_states", "write_clip", "write_page",
]  # fmt: skip
