"""Encode methods in the vision encoders of Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

Frames of all images and videos come as one row of patches, in blocks of 2 x 2 that the merger makes one token each.
These blocks are what methods see as tokens: they are merged, kept or dropped whole. Frames of one size run together.
A token keeps the rotary position of the place where it stands. In blocks of Qwen2.5-VL that attend within windows, a
token belongs to the window in which it stands, so that windows grow empty unevenly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from accelerate_methods.engine.encoder_block import EncoderBlock
from accelerate_methods.engine.encoder_blocks import BlockRun, acting_blocks
from accelerate_methods.ops.select import on_device
from accelerate_methods.stages.encode import EncodeMethod, TokenMap
from accelerate_methods.stages.frames import FrameMap


@dataclasses.dataclass
class FrameShape:
    """Frames of one size.

    Attributes:
        order: [N] raster index of each token of a frame, in the order in which they come; windows: [N] window of each,
            sizes: tokens of each window; None and empty where nothing attends within windows.
    """

    order: Tensor
    windows: Tensor | None = None
    sizes: Sequence[int] = ()

    def on(self, device: torch.device) -> FrameShape:
        windows = None if self.windows is None else on_device(self.windows, device)
        return FrameShape(on_device(self.order, device), windows, self.sizes)


class QwenBlock(EncoderBlock):
    """A vision block on frames of one size.

    Args:
        rotary: tables [N * u, d] of a frame; shape: its windows, None for a block that attends to whole frames.
    """

    taken_apart = True

    def __init__(self, block: nn.Module, rotary: tuple[Tensor, Tensor], shape: FrameShape | None, unit: int):
        self._block, self._rotary, self._unit = block, rotary, unit
        self.scale = block.attn.scaling
        if shape is not None:
            self.windows, self.window_sizes = shape.windows, shape.sizes

    def project(self, hidden: Tensor, tokens: TokenMap) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        attention = self._block.attn
        projected = attention.qkv(self._block.norm1(hidden)).unflatten(-1, (3, attention.num_heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        inside = torch.arange(self._unit, device=hidden.device)
        places = (tokens.places()[..., None] * self._unit + inside).flatten(1)
        cos, sin = (table[places][:, None] for table in self._rotary)
        return rotated(query, cos, sin), rotated(key, cos, sin), value, key

    def attended(self, hidden: Tensor, output: Tensor) -> Tensor:
        return hidden + self._block.attn.proj(output)

    def feed_forward(self, hidden: Tensor) -> Tensor:
        return hidden + self._block.mlp(self._block.norm2(hidden))

    def whole(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError  # it takes frames of all sizes


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[..., d] with tables that fit, in float32 as the encoder does it."""
    full = states.float()
    first, second = full.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (full * cos.float() + turned * sin.float()).to(states.dtype)


class QwenRun:
    """All frames of one call through the blocks.

    Args:
        blocks: of the encoder; whole: those that attend to whole frames, None: all.
        unit: patches per token; keep: blocks whose output the model reads on its way (deepstack).
        shape_of: (rows, columns) of a frame's tokens -> their order and windows.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        method: EncodeMethod,
        *,
        whole: Collection[int] | None,
        unit: int,
        keep: Collection[int],
        shape_of: Callable[[int, int], FrameShape],
    ):
        self._blocks, self._method, self._whole = blocks, method, whole
        self._unit, self._keep, self._shape_of = unit, keep, shape_of
        acting_blocks(method, len(blocks))

    def __call__(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], grids: Sequence[tuple[int, int, int]], videos: bool
    ) -> tuple[Callable[[int], Tensor], list[TokenMap | FrameMap | None]]:
        """
        Args:
            hidden: [S, C] all patches; rotary: tables [S, d].
            grids: (frames, rows, columns) of each image or video, in tokens; videos: whether these are videos.

        Returns:
            What each block gives, every patch in its place; where the tokens of each image or video are, by raster, or
            its frames; None where every patch is in its place.
        """
        slices, first = [], 0
        for frames, rows, columns in grids:
            slices.append(slice(first, first + frames * rows * columns * self._unit))
            first = slices[-1].stop
        last = len(self._blocks) - 1
        outputs = {number: torch.empty_like(hidden) for number in {*self._keep, last}}
        maps: list[TokenMap | FrameMap | None] = [None] * len(grids)
        for size in dict.fromkeys(grid[1:] for grid in grids):
            own = [number for number, grid in enumerate(grids) if grid[1:] == size]
            per_frame, shape = size[0] * size[1] * self._unit, self._shape_of(*size)
            frames = torch.cat([hidden[slices[number]].unflatten(0, (-1, per_frame)) for number in own])
            start = slices[own[0]].start
            tables = tuple(table[start : start + per_frame] for table in rotary)
            shape = shape.on(hidden.device)
            run = BlockRun(
                self._of(tables, shape), self._method, depth=len(self._blocks), unit=self._unit,
                videos=[grids[number][0] for number in own] if videos else None,
            )  # fmt: skip
            encoded = run(frames, outputs=outputs)
            back, done = torch.argsort(shape.order), 0
            for number in own:
                here = slice(done, done + grids[number][0])
                done = here.stop
                for block, output in outputs.items():
                    output[slices[number]] = run.outputs[block][here].flatten(0, 1)
                if encoded.frames is not None:
                    (video,) = encoded[here].frames
                    values = {name: value[:, back] for name, value in video.values.items()}
                    maps[number] = dataclasses.replace(video, values=values)
                elif not encoded.grid:
                    maps[number] = _in_raster(encoded[here].tokens, shape.order, back)
        return (lambda number: outputs[number] if number in outputs else outputs[last]), maps

    def _of(self, rotary: tuple[Tensor, Tensor], shape: FrameShape) -> list[QwenBlock]:
        whole = range(len(self._blocks)) if self._whole is None else self._whole
        return [
            QwenBlock(block, rotary, None if number in whole else shape, self._unit)
            for number, block in enumerate(self._blocks)
        ]


def _in_raster(tokens: TokenMap, order: Tensor, back: Tensor) -> TokenMap:
    """Over places in the order in which they come -> over places by raster."""
    stands = torch.where(tokens.stands >= 0, order[tokens.stands.clamp(min=0)], -1)
    return TokenMap(tokens.owner[:, back], stands, tokens.sizes)
