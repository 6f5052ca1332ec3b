"""Methods that drop tokens of images by their pixels, in the vision encoders of Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

The encoder's own code and blocks run. From the first block that gets fewer on, each is given the patches that are left,
their rotary tables and the lengths of what attends to each other; windows in which nothing is left are none. A merger
gets blocks of 2 x 2 patches as ever, and its tokens go to the rows at which the model expects them, with zeros where
nothing is left: those rows leave the prompt.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from accelerate_methods.hosts.native.encoding import chosen
from accelerate_methods.hosts.native.qwen_encoding import FrameShape
from accelerate_methods.hosts.native.wrapping import Wrappers
from accelerate_methods.ops.select import on_device
from accelerate_methods.stages.pixels import PixelCells, PixelMethod


@dataclasses.dataclass
class Layout:
    """How a processor and an encoder of this family lay out patches.

    Attributes:
        side: patches of a token in each direction; frames: times that a patch holds.
        mean, scale: per channel, pixels in [0, 1] are ``scale`` times the pixel values, plus ``mean``.
        whole: blocks that attend to whole frames, None: all.
        shape_of: (rows, columns) of a frame's tokens -> their order and windows.
    """

    side: int
    frames: int
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    whole: Sequence[int] | None
    shape_of: Callable[[int, int], FrameShape]

    @property
    def unit(self) -> int:
        return self.side**2

    def cells(self, pixels: Tensor, grids: Sequence[tuple[int, int, int]]) -> list[list[PixelCells]]:
        """The pixels of each frame of each image.

        Args:
            pixels: [S, W] patches of all; grids: (frames, rows, columns) of each, in tokens.
        """
        counts = [rows * columns * self.unit for _, rows, columns in grids]
        sizes = [count for (frames, _, _), count in zip(grids, counts, strict=True) for _ in range(frames)]
        parts = iter(pixels.split(sizes))
        made = functools.partial(PixelCells.of_patches, unit=self.unit, frames=self.frames, scale=self.scale)
        return [[made(next(parts), (rows, columns)) for _ in range(frames)] for frames, rows, columns in grids]


@dataclasses.dataclass
class Cut:
    """What is left of all images of one call.

    Attributes:
        tokens: [K] numbers of the tokens in the order of the encoder; patches: [K * u] those of their patches.
        total: tokens before.
        whole, windows: [n + 1] int32 ends of what attends to each other, of frames and of windows (None: no windows).
        rotary: tables of the patches that are left, once known.
    """

    tokens: Tensor
    patches: Tensor
    total: int
    whole: Tensor
    windows: Tensor | None
    rotary: tuple[Tensor, ...] | None = None

    def short(self, states: Tensor) -> Tensor:
        """[S, C] or [K * u, C] patches -> those that are left."""
        return states if len(states) == len(self.patches) else states[self.patches]

    def put_back(self, tokens: Tensor) -> Tensor:
        """[K, D] -> [S / u, D], zeros where nothing is left."""
        return tokens.new_zeros(self.total, tokens.shape[-1]).index_copy_(0, self.tokens, tokens)


class PixelTower:
    """One vision encoder under a method that looks at pixels.

    Args:
        seen: gets [frames, tokens] bool of each image, on the host, which of its tokens stay; None where all do.
        seeing: gives what the vision side was called with (:class:`.family.Seen`), None outside of the model.

    Raises:
        MethodError: a block that the encoder does not have.
    """

    def __init__(
        self, visual: nn.Module, method: PixelMethod, layout: Layout, wrappers: Wrappers,
        seen: Callable[[list[Tensor | None]], None], seeing: Callable[[], Any],
    ):  # fmt: skip
        self._method, self._layout, self._seen, self._seeing = method, layout, seen, seeing
        self._first = method.first_block(len(visual.blocks))
        #: of the run that is going on
        self._cut: ContextVar[Cut | None] = ContextVar("accelerate_pixel_cut", default=None)
        self._visual = wrappers.wrap(visual, "forward", self._forward)
        if self._first is None:
            return
        self._blocks = [
            wrappers.wrap(block, "forward", functools.partial(self._block, number))
            for number, block in enumerate(visual.blocks)
        ]
        mergers = [visual.merger, *getattr(visual, "deepstack_merger_list", ())]
        self._mergers = [
            wrappers.wrap(merger, "forward", functools.partial(self._merge, number))
            for number, merger in enumerate(mergers)
        ]

    def _forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        """In the place of the encoder's ``forward``."""
        call, side = self._seeing(), self._layout.side
        if call is None:  # not for a prompt: nobody could leave out the rows
            return self._visual(hidden_states, grid_thw, **kwargs)
        grids = [(frames, rows // side, columns // side) for frames, rows, columns in grid_thw.tolist()]
        if call.kind not in self._method.modalities:
            self._seen([None] * len(grids))
            return self._visual(hidden_states, grid_thw, **kwargs)
        masks = self._choose(call.arguments.get("pixel_values", hidden_states), grids)
        self._seen([None if bool(mask.all()) else mask for mask in masks])
        cut = None
        if self._first is not None and not all(bool(mask.all()) for mask in masks):
            cut = self._made(masks, grids, hidden_states.device)
        token = self._cut.set(cut)
        try:
            return self._visual(hidden_states, grid_thw, **kwargs)
        finally:
            self._cut.reset(token)

    def _choose(self, pixels: Tensor, grids: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        """[frames, tokens] bool of each image, by raster, on the host: one read."""
        cells = self._layout.cells(pixels, grids)
        read = iter(chosen(self._method, [frame for image in cells for frame in image]))
        return [torch.stack([next(read).flatten() for _ in range(frames)]) for frames, _, _ in grids]

    def _made(self, masks: Sequence[Tensor], grids: Sequence[tuple[int, int, int]], device: torch.device) -> Cut:
        stays, frames, windows = [], [], []
        for mask, (_, rows, columns) in zip(masks, grids, strict=True):
            shape = self._layout.shape_of(rows, columns)
            own = mask[:, shape.order]
            stays.append(own.flatten())
            frames += own.sum(1).tolist()
            if shape.windows is not None:
                for row in own:
                    windows += torch.bincount(shape.windows[row], minlength=len(shape.sizes)).tolist()
        tokens = torch.cat(stays).nonzero().squeeze(1)
        unit = self._layout.unit
        patches = (tokens[:, None] * unit + torch.arange(unit)).flatten()
        return Cut(
            tokens=on_device(tokens, device),
            patches=on_device(patches, device),
            total=sum(map(len, stays)),
            whole=_ends(frames, unit, device),
            windows=_ends(windows, unit, device) if windows else None,
        )

    def _block(self, number: int, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """In the place of a block's ``forward``."""
        cut = self._cut.get()
        if cut is not None and number >= self._first:
            hidden_states = cut.short(hidden_states)
            if cut.rotary is None:
                cut.rotary = tuple(table[cut.patches] for table in kwargs["position_embeddings"])
            attends = self._layout.whole is None or number in self._layout.whole
            kwargs["position_embeddings"] = cut.rotary
            kwargs["cu_seqlens"] = cut.whole if attends else cut.windows
        return self._blocks[number](hidden_states, *args, **kwargs)

    def _merge(self, number: int, states: Tensor) -> Tensor:
        """In the place of a merger's ``forward``."""
        cut = self._cut.get()
        if cut is None:
            return self._mergers[number](states)
        return cut.put_back(self._mergers[number](cut.short(states)))


def _ends(counts: Sequence[int], unit: int, device: torch.device) -> Tensor:
    """Cumulative patches of ``counts`` tokens, those without any left out."""
    ends = itertools.accumulate((count * unit for count in counts if count), initial=0)
    return on_device(torch.tensor(list(ends), dtype=torch.int32), device)
