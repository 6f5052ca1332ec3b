"""In which pieces a prompt is read, and how many summary tokens each leaves: plain numbers, known before anything runs.

Follows ``Memory`` of `VectorSpaceLab/Video-XL@6e3dc89` (``videoxl/model/language_model/modeling_beacon.py``), where the
summary tokens are called beacons; section 3.2 of arXiv 2409.14485 calls them visual summarization tokens. There the
pieces of one request depend on the requests before it; here each request begins anew.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from accelerate_methods.stages.errors import MethodError
from llava.model.checkpoint import CheckpointError

#: config key -> what a released checkpoint says and this code does
_FIXED = {
    "beacon_attn": "full-coverage",
    "beacon_attend_prev": True,
    "beacon_sink_size": 0,
    "beacon_pos": "interleave",
    "beacon_parallel_window": 1,
    "beacon_accum": True,
}
_PROJECTIONS = ("q", "k", "v")
_MIXES = ("step-random", "instance-random", "sequence")
_ADAPTS = re.compile(r"adapt-(\d+)")
_SEED = 42  # of the generator that draws ratios, as released


@dataclasses.dataclass(frozen=True)
class Settings:
    """How prompts are read.

    Attributes:
        window: visual tokens of a piece; ratios: visual tokens for each summary token, of which one is chosen for each
            window by ``mix`` where there are several.
        projections: those that summary tokens have of their own, out of "q", "k", "v".
        positions: for which the language model was trained.
    """

    window: int = 1024
    ratios: tuple[int, ...] = (2, 4, 8, 16, 32)
    mix: str = "step-random"
    projections: tuple[str, ...] = ()
    positions: int = 32768

    @classmethod
    def of(cls, config: Any) -> Settings:
        """Out of a checkpoint's config, by the keys ``beacon_*``.

        Raises:
            CheckpointError: values that no released checkpoint has and that mean something else than is done here.
        """
        for key, value in _FIXED.items():
            if getattr(config, key, value) != value:
                raise CheckpointError(f"config.{key} is {getattr(config, key)!r}; only {value!r} is supported.")
        window = getattr(config, "beacon_window", cls.window)
        stride = getattr(config, "beacon_stride", window)
        projections = tuple(getattr(config, "beacon_param", None) or ())
        if isinstance(window, bool) or not isinstance(window, int) or window < 1 or stride != window:
            raise CheckpointError(
                f"config.beacon_window {window!r} and beacon_stride {stride!r}: one whole number of at least 1, the "
                "same for both, is supported."
            )
        wrong = sorted(set(projections) - set(_PROJECTIONS))
        if wrong:
            raise CheckpointError(f"config.beacon_param names {wrong[0]!r}; supported: {', '.join(_PROJECTIONS)}.")
        mix = getattr(config, "beacon_ratio_mix", None) or cls.mix
        if mix not in _MIXES and not _ADAPTS.fullmatch(mix):
            raise CheckpointError(f"config.beacon_ratio_mix {mix!r} is not one of {', '.join(_MIXES)}, adapt-<tokens>.")
        ratios = checked_ratios(getattr(config, "beacon_ratio", None) or cls.ratios)
        positions = getattr(config, "max_position_embeddings", None) or cls.positions
        return cls(window, ratios, mix, tuple(p for p in _PROJECTIONS if p in projections), positions)


def checked_ratios(ratios: Any) -> tuple[int, ...]:
    """One ratio or several as a tuple; :class:`MethodError` if they are no whole numbers of at least 1."""
    several = tuple(ratios) if isinstance(ratios, (list, tuple)) else (ratios,)
    if not several or any(isinstance(r, bool) or not isinstance(r, int) or r < 1 for r in several):
        raise MethodError(f"beacon_ratio must be a whole number of at least 1, or a list of such, got {ratios!r}.")
    return several


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows of a prompt that go through the decoder together.

    Attributes:
        start, rows: which rows of the prompt.
        cached: entries of the KV cache before it.
        ratio: visual tokens for each summary token; None: text, which is kept whole.
        offset: visual tokens in front of it that no summary token has followed yet.
        closes: whether it is the last one of an image or video.
    """

    start: int
    rows: int
    cached: int
    ratio: int | None = None
    offset: int = 0
    closes: bool = False

    @property
    def summaries(self) -> int:
        """Summary tokens among its inputs; all that it leaves in the cache if it is not text."""
        return 0 if self.ratio is None else (self.rows + self.offset) // self.ratio

    @property
    def slots(self) -> slice:
        """Where they stand among its ``rows + summaries`` inputs: behind every ``ratio`` visual tokens."""
        if not self.summaries:
            return slice(0, 0)
        return slice(self.ratio - self.offset, self.rows + self.summaries, self.ratio + 1)

    @property
    def left(self) -> int:
        """Entries that it leaves in the cache."""
        return self.rows if self.ratio is None else self.summaries


def pieces_of(length: int, visuals: Sequence[tuple[int, int]], settings: Settings) -> list[Piece]:
    """The pieces of a prompt of ``length`` rows, in the order in which they are read.

    The text in front of the first image or video is one piece, other text comes in pieces of at most a window. Each
    image or video is cut into windows, the last of which may be short; ``visuals`` are their (first row, rows).

    Raises:
        MethodError: none of several ratios divides a window.
    """
    pieces: list[Piece] = []
    ratios = _Ratios(settings, length)
    row = 0

    def text(end: int) -> None:
        size = settings.window if pieces else max(end, 1)
        for start in range(row, end, size):
            pieces.append(Piece(start, min(size, end - start), entries_of(pieces)))

    for first, rows in visuals:
        text(first)
        offset = 0
        for start in range(0, rows, settings.window):
            own = min(settings.window, rows - start)
            ratio, closes = ratios.of(own), start + own == rows
            pieces.append(Piece(first + start, own, entries_of(pieces), ratio, offset, closes))
            offset = (own + offset) % ratio
        row = first + rows
    text(length)
    return pieces


def entries_of(pieces: Sequence[Piece]) -> int:
    """Entries of the cache when these pieces have been read."""
    return pieces[-1].cached + pieces[-1].left if pieces else 0


def summaries_of(pieces: Sequence[Piece]) -> list[int]:
    """Summary tokens of each image or video."""
    counts, count = [], 0
    for piece in pieces:
        count += piece.summaries
        if piece.closes:
            counts.append(count)
            count = 0
    return counts


class _Ratios:
    """Chooses the ratio of each window of one request of ``length`` rows."""

    def __init__(self, settings: Settings, length: int):
        self._settings, self._length = settings, length
        self._drawing = np.random.default_rng(_SEED)
        self._following: Iterator[int] | None = None

    def of(self, window: int) -> int:
        """The ratio of the next window, of so many visual tokens."""
        ratios, mix = self._settings.ratios, self._settings.mix
        if len(ratios) == 1:
            return ratios[0]
        if self._following is not None:
            return next(self._following)
        fitting = [ratio for ratio in ratios if window >= ratio and window % ratio == 0]
        if not fitting:
            raise MethodError(
                f"none of the ratios {', '.join(map(str, ratios))} divides a window of {window} visual tokens; give "
                "one number as beacon_ratio, which then counts on over the windows."
            )
        if mix == "step-random":
            return int(self._drawing.choice(fitting))
        if mix == "sequence":
            self._following = itertools.cycle(fitting)
        elif mix == "instance-random":
            self._following = itertools.repeat(int(self._drawing.choice(fitting)))
        else:
            self._following = itertools.repeat(self._smallest(fitting))
        return next(self._following)

    def _smallest(self, ratios: Sequence[int]) -> int:
        """The smallest ratio with which the positions hold the prompt and the answer, or else the largest."""
        positions, window = self._settings.positions, self._settings.window
        wanted = self._length + int(_ADAPTS.fullmatch(self._settings.mix)[1])
        holding = [ratio for ratio in ratios if (positions - window) * ratio + window >= wanted]
        return min(holding, default=max(ratios))
