"""What is fed to the model: pixels, a prompt, and features that look like a video where the weights are random."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from accelerate_methods.bench.features import video_like_patches

_BEFORE = 14  # text tokens in front of the visual ones: the system prompt of Qwen2


@dataclasses.dataclass
class Inputs:
    """One request, on the device already: copying from the host is not part of any measurement.

    Attributes:
        ids: [B, n] with placeholders; pixels: per sample [V, 3, S, S]; sizes: (width, height) per sample for images.
        modality: "video" or "image"; text_tokens: n without the placeholder.
        source: where the pixels come from; features: where the features that methods see come from.
        patches: [V, P, M] made-up tower output, or None for the tower's own.
        call: run parameters of a trained architecture, further arguments of ``generate``.
    """

    ids: Tensor
    pixels: list[Tensor]
    sizes: list[tuple[int, int]] | None
    modality: str
    frames: int
    text_tokens: int
    source: str
    features: str
    patches: Tensor | None
    call: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def batch(self) -> int:
        return self.ids.shape[0]

    def thinned(self, frames: int) -> Inputs:
        """The same with ``frames`` of a video's frames, spread evenly."""
        if self.modality != "video" or frames >= self.frames:
            return self
        keep = torch.linspace(0, self.frames - 1, frames, device=self.ids.device).long()
        pixels = [views[keep] for views in self.pixels]
        patches = self.patches
        if patches is not None:
            patches = patches.unflatten(0, (-1, self.frames))[:, keep.to(patches.device)].flatten(0, 1)
        return dataclasses.replace(self, pixels=pixels, patches=patches, frames=frames)

    def arguments(self) -> dict[str, Any]:
        """For ``prepare_multimodal`` and ``generate`` of the LLaVA tree."""
        asked = ["What is shown, and what happens?"] * self.batch
        return {
            "images": self.pixels, "modalities": [self.modality] * self.batch, "image_sizes": self.sizes,
            "questions": asked, **self.call,
        }  # fmt: skip


def make_inputs(
    model: Any,
    *,
    modality: str,
    frames: int,
    image_size: tuple[int, int],
    text_tokens: int,
    batch: int,
    pixels: Tensor | None = None,
    source: str | None = None,
) -> Inputs:
    """Inputs for ``model``; without ``pixels`` (of the clip ``source``) everything is made up."""
    from llava.constants import IMAGE_TOKEN_INDEX

    tower = model.get_vision_tower()
    device, dtype = tower.device, tower.dtype
    views = frames if modality == "video" else 1
    if modality == "image" and "anyres" in getattr(model.config, "image_aspect_ratio", "pad"):
        from llava.mm_utils import get_anyres_image_grid_shape

        columns, rows = get_anyres_image_grid_shape(image_size, model.config.image_grid_pinpoints, tower.image_size)
        views = 1 + columns * rows
    if pixels is None:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(views, 3, tower.image_size, tower.image_size, generator=generator)
    patches = None
    if source is None:
        side = tower.num_patches_per_side
        scenes = max(1, min(4, views // 8)) if modality == "video" else 1
        patches = video_like_patches(views, side, tower.hidden_size, scenes=scenes)
        patches = patches.to(device, dtype).repeat(batch, 1, 1)
    ids = torch.randint(3, model.config.vocab_size, (text_tokens,), generator=torch.Generator().manual_seed(0))
    before = min(_BEFORE, text_tokens)
    ids = model.made_up_ids(torch.cat([ids[:before], torch.tensor([IMAGE_TOKEN_INDEX]), ids[before:]]))
    return Inputs(
        ids=ids.repeat(batch, 1).to(device),
        pixels=[pixels.to(device, dtype) for _ in range(batch)],
        sizes=None if modality == "video" else [image_size] * batch,
        modality=modality,
        frames=len(pixels) if modality == "video" else 1,
        text_tokens=text_tokens,
        source=source or "made up",
        features="made up, video-like" if source is None else "of the model's tower",
        patches=patches,
    )


def read_clip(path: str, frames: int, model: Any, image_processor: Any) -> Tensor:
    """[F, 3, S, S] evenly spaced frames of a video file, as the model's own preprocessing gives them."""
    from llava.video_utils import load_video

    return image_processor.preprocess(load_video(path, frames).frames, return_tensors="pt")["pixel_values"]


@contextlib.contextmanager
def fed(model: Any, inputs: Inputs) -> Iterator[None]:
    """Within the block the tower does all of its work and then answers with ``inputs.patches``.

    So a tower with random weights takes its time, and methods see what a video would show them. Attention of the tower
    (a signal of some methods) stays its own.
    """
    tower = model.get_vision_tower()
    if inputs.patches is None:
        yield
        return
    look = tower.look

    def answer(images: Tensor, keep: Any = (), method: Any = None, *more: Any) -> Any:
        encoded = look(images, keep, method, *more)
        if method is not None:  # it acted inside the tower: what came of the tower's own states stays
            return encoded
        views = len(encoded.patches)  # a model may look at its views some at a time, or at more of its own
        times = -(-views // len(inputs.patches))
        made_up = (inputs.patches if times == 1 else inputs.patches.repeat(times, 1, 1))[:views]
        if made_up.shape[1] != encoded.patches.shape[1]:  # a sample stage made the input smaller
            made_up = _smaller(made_up, encoded.patches.shape[1])
        parts = [made_up] if encoded.special is None else [encoded.special, made_up]
        return dataclasses.replace(encoded, hidden=torch.cat(parts, dim=1))

    tower.look = answer
    try:
        yield
    finally:
        del tower.look


def _smaller(patches: Tensor, count: int) -> Tensor:
    """[V, P, M] -> [V, count, M] by taking every so-many-th row and column."""
    side, new = math.isqrt(patches.shape[1]), math.isqrt(count)
    index = torch.arange(new, device=patches.device) * side // new
    return patches.unflatten(1, (side, side))[:, index][:, :, index].flatten(1, 2)
