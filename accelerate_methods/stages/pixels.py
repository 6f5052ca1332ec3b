"""Tokens that an image can do without by its pixels alone: chosen before or inside the vision encoder."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from accelerate_methods.stages.encode import EncodeMethod, EncodeStep, Merge
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.printing import ShapesShown


@dataclasses.dataclass(repr=False)
class PixelCells(ShapesShown):
    """The pixels of one image under each of its visual tokens.

    Attributes:
        values: [R, C, G, 3, Q] R x C tokens of G patches, Q pixels each, three channels; as the encoder gets them.
        scale: per channel, what a difference of 1 in ``values`` is among pixels in [0, 1].
    """

    values: Tensor
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @classmethod
    def of_patches(
        cls, patches: Tensor, grid: tuple[int, int], unit: int, frames: int = 1, scale: tuple[float, ...] = (1.0,) * 3
    ) -> PixelCells:
        """Of patches [R * C * unit, 3 * frames * Q], those of a token behind each other, tokens by raster.

        Args:
            grid: (R, C); frames: times that a patch holds (of an image all the same): the first is looked at.
        """
        rows, columns = grid
        parts = patches.view(rows, columns, unit, 3, frames, -1)
        return cls(parts[:, :, :, :, 0], tuple(scale))

    @property
    def grid(self) -> tuple[int, int]:
        """(R, C)."""
        return tuple(self.values.shape[:2])


class PixelMethod(EncodeMethod):
    """Drops visual tokens of images by their pixels, so that blocks of the vision encoder get fewer.

    Kept tokens have the positions that they have without it. Asks for the signal "patch_pixels": models that give it
    show :meth:`choose` the pixels of every image.
    """

    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    signals: ClassVar[frozenset[str]] = frozenset({"patch_pixels"})
    positions: ClassVar[str] = "original"

    def first_block(self, num_blocks: int) -> int | None:
        """0-based index of the first block that gets fewer; ``num_blocks``: all see everything. None: so does what
        follows them, and tokens are dropped before the language model only."""
        return 0

    def choose(self, cells: PixelCells) -> Tensor:
        """[R, C] bool: the tokens that stay, one at least."""
        raise NotImplementedError

    def encode_blocks(self, num_blocks: int) -> tuple[int, ...]:
        return ()

    def encode(self, step: EncodeStep) -> Merge | None:
        return None


def check_choice(method: str, mask: Any, cells: PixelCells) -> None:
    """
    Raises:
        MethodError: ``mask`` is no bool tensor over the cells, or (looked at on the CPU) nothing stays.
    """
    where, grid = f"{method}.choose", list(cells.grid)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or list(mask.shape) != grid:
        got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise MethodError(f"{where} must return a bool tensor {grid}, got {got}.")
    if mask.device.type == "cpu" and not bool(mask.any()):
        raise MethodError(f"{where}: nothing is left of the image; at least one token has to stay.")
