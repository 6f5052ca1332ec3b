"""Image processors of the two vision towers, bit for bit as the official code resizes.

The checkpoints were trained on Pillow's bicubic resize of uint8 images. transformers' default processors resize with
torchvision, which differs by up to one grey level, so everything here stays on Pillow.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature

DEFAULT_SIGLIP_SIDE = 384  # google/siglip-so400m-patch14-384; every other tower passes its own side
_CONFIG_FILE = "preprocessor_config.json"


class SigLipImageProcessor:
    """RGB, bicubic resize straight to `size` (the aspect ratio is not kept), / 255, normalise.

    Args:
        image_mean, image_std: per channel, in units of the [0, 1] image.
        size: (height, width) of the output, or one side for a square.
        crop_size: {"height", "width"} of an any-resolution tile; `size` when None.
        resample: Pillow filter.
        rescale_factor: what a grey level is multiplied with.
    """

    def __init__(
        self,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        size: int | Sequence[int] = DEFAULT_SIGLIP_SIDE,
        crop_size: Mapping[str, int] | None = None,
        resample: int = Image.Resampling.BICUBIC,
        rescale_factor: float = 1 / 255,
    ) -> None:
        height, width = (size, size) if isinstance(size, int) else size
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)
        self.size = (height, width)
        self.crop_size = dict(crop_size) if crop_size is not None else {"height": height, "width": width}
        self.resample = Image.Resampling(resample)
        self.rescale_factor = rescale_factor

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> SigLipImageProcessor:
        """Read mean, std, size, filter and scale from <folder>/preprocessor_config.json.

        Raises:
            FileNotFoundError: no such file.
        """
        settings = _read_config(folder)
        size = settings.get("size", DEFAULT_SIGLIP_SIDE)
        if isinstance(size, dict):
            size = (size["height"], size["width"])
        names = ("image_mean", "image_std", "resample", "rescale_factor")
        return cls(size=size, **{name: settings[name] for name in names if settings.get(name) is not None})

    def preprocess(self, images: Any, return_tensors: str | None = "pt") -> BatchFeature:
        """Turn images into model input.

        Args:
            images: one PIL image or HxWx3 array, or a list or [T,H,W,3] array of them. Arrays and tensors hold 0..255
                (any dtype) or fractions 0..1 (floating), channels last or first.
            return_tensors: "pt" (torch) or "np" / None (numpy).
        Returns:
            {"pixel_values": [N, 3, height, width] float32}
        Raises:
            ValueError: no image, an array that is not RGB or not in range, or an unknown return_tensors.
        """
        if return_tensors not in ("pt", "np", None):
            raise ValueError(f"return_tensors={return_tensors!r}: expected 'pt' or 'np'")
        height, width = self.size
        resized = [
            image if image.size == (width, height) else image.resize((width, height), self.resample)
            for image in _pil_images(images)
        ]
        table = self._level_table()
        pixels = np.empty((len(resized), len(table), height, width), dtype=np.float32)
        for out, image in zip(pixels, resized, strict=True):
            levels = np.asarray(image)
            for c, values in enumerate(table):
                np.take(values, levels[:, :, c], out=out[c])
        return BatchFeature({"pixel_values": torch.from_numpy(pixels) if return_tensors == "pt" else pixels})

    __call__ = preprocess

    def _level_table(self) -> np.ndarray:
        """[3, 256]: the float32 value of every grey level. Looking up gives the bits of the arithmetic, but faster."""
        levels = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        mean = np.asarray(self.image_mean, dtype=np.float32)[:, None]
        std = np.asarray(self.image_std, dtype=np.float32)[:, None]
        return (levels - mean) / std

    def __repr__(self) -> str:
        return f"{type(self).__name__}(size={self.size}, image_mean={self.image_mean}, image_std={self.image_std})"


def load_clip_image_processor(folder: str | os.PathLike[str]) -> Any:
    """CLIP processor of a tower folder: resize the short edge (Pillow bicubic), centre crop, normalise.

    Args:
        folder: local folder or hub id with preprocessor_config.json.
    Returns:
        a transformers processor on the Pillow backend; `preprocess(images, return_tensors="pt")["pixel_values"]` is
        [N,3,S,S].
    """
    import transformers

    # The Pillow-backed class has a name of its own; where a release lacks it, the plain class takes a backend.
    pil_class = getattr(transformers, "CLIPImageProcessorPil", None)
    if pil_class is not None:
        return pil_class.from_pretrained(folder)
    return transformers.CLIPImageProcessor.from_pretrained(folder, backend="pil")


def clip_image_processor(side: int, mean: Sequence[float], std: Sequence[float]) -> Any:
    """:func:`load_clip_image_processor` for a tower that has no files of its own: square views of ``side`` pixels."""
    import transformers

    settings = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    settings |= {"image_mean": list(mean), "image_std": list(std), "resample": Image.Resampling.BICUBIC}
    pil_class = getattr(transformers, "CLIPImageProcessorPil", None)
    if pil_class is not None:
        return pil_class(**settings)
    return transformers.CLIPImageProcessor(**settings, backend="pil")


def load_image_processor(folder: str | os.PathLike[str]) -> Any:
    """The processor that a local tower folder's preprocessor_config.json asks for, SigLIP's or CLIP's.

    Raises:
        FileNotFoundError: the folder has no preprocessor_config.json.
    """
    settings = _read_config(folder)
    kind = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "")
    load = SigLipImageProcessor.from_pretrained if "siglip" in kind.lower() else load_clip_image_processor
    return load(folder)


def _read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    path = Path(folder) / _CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {_CONFIG_FILE} in {os.fspath(folder)}")
    return json.loads(path.read_text(encoding="utf-8"))


def _pil_images(images: Any) -> list[Image.Image]:
    """Any accepted input as a non-empty list of RGB PIL images."""
    if isinstance(images, Image.Image) or (isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 3):
        images = [images]
    pil = [image.convert("RGB") if isinstance(image, Image.Image) else _from_array(image) for image in images]
    if not pil:
        raise ValueError("no image to process: the list is empty")
    return pil


def _from_array(image: Any) -> Image.Image:
    array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if array.ndim == 3 and array.shape[-1] != 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[-1] != 3:
        raise ValueError(f"expected an RGB image [height, width, 3], got an array of shape {tuple(array.shape)}")
    if array.dtype != np.uint8:
        low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
        if not 0 <= low <= high <= 255:  # also false for NaN
            raise ValueError(f"pixel values must lie in 0..255 or 0..1, got {low}..{high}")
        # Fractions are a [0, 1] image; whole numbers are grey levels whatever their dtype.
        scale = 255 if high <= 1 and not np.array_equal(array, np.round(array)) else 1
        array = np.round(array * scale).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array))
