"""Images and videos as the stock chat classes of lmms-eval 0.7.3 hand them to a processor."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from qwen_vl_utils import vision_process as qwen
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from llava.video_utils import FrameSample
from lmms_eval_accelerate.models.visuals import (
    FRAME_FOLDER_FPS,
    UnsupportedVisual,
    file_name,
    frame_files,
    from_file,
    read_frames,
    read_video,
    reading,
)


@dataclasses.dataclass(frozen=True)
class Clip:
    """Frames of a video, [T, 3, H, W] of 0..255, what processors want to know about them, and their file.

    ``of``: how many frames there would be without a method that wants fewer.
    """

    frames: Tensor
    metadata: dict[str, Any]
    filename: str = ""
    of: int | None = None


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Which frames, and how large.

    Attributes:
        frames: how many, evenly spaced; with ``fps``: the most.
        fps: frames per second, or None.
        min_pixels, max_pixels, total_pixels: limits of a frame and of all frames, as qwen-vl-utils understands them;
            None: its own.
        patch: pixels per side of a patch; None: frames keep their size.
        middles: the middle frame of each of ``frames`` equal parts, instead of frames from the first to the last.
        backend: "auto", "decord" or "pyav".
    """

    frames: int | None
    fps: float | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    patch: int | None = None
    backend: str = "auto"
    middles: bool = False

    @property
    def limits(self) -> dict[str, int]:
        """The limits that are set."""
        names = ("min_pixels", "max_pixels", "total_pixels")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def read_clip(video: Any, how: Sampling, where: str, choosing: Mapping[str, Any] | None = None) -> Clip:
    """A video of a message: a path, a folder of frames, a list of frame files, or a mapping with a time range.

    ``choosing``: a method's ``sampler`` of frames and the ``question``, for ``load_video``.

    Raises:
        VisualError: it cannot be read.
    """
    span = {}
    if isinstance(video, Mapping):
        span = {key: video[key] for key in ("video_start", "video_end") if video.get(key) is not None}
        video = next((video[key] for key in ("url", "path", "video") if video.get(key)), None)
    if not isinstance(video, (str, os.PathLike, list, tuple)):
        raise UnsupportedVisual(f"{where}: a video is a {type(video).__name__}; expected a path.")
    sources = video if isinstance(video, (list, tuple)) else [video]
    strange = next((source for source in sources if not isinstance(source, (str, os.PathLike))), None)
    if strange is not None or not sources:
        raise UnsupportedVisual(f"{where}: a video is a list of {type(strange).__name__}; expected paths of frames.")
    paths = [os.fspath(source).removeprefix("file://") for source in sources]
    files = frame_files(paths)
    if files is None and len(paths) > 1:
        raise UnsupportedVisual(f"{where}: a video is a list of files that are not all pictures: {', '.join(paths)}.")
    if files is None:
        clip = _from_file(paths[0], how, span, where, choosing or {})
    else:
        count = how.frames or len(files)
        group = 1 if how.patch is None else qwen.FRAME_FACTOR
        count = count if how.patch is None else _even(count, len(files))
        frames, indices = read_frames(files, count, where, (choosing or {}).get("sampler"), group)
        clip = Clip(_planes(frames), _metadata(float(FRAME_FOLDER_FPS), indices, len(files)), of=count)
    clip = dataclasses.replace(clip, filename=paths[0])
    if how.patch is None:
        return clip
    with reading(where, f"video {paths[0]}", "use"):
        return dataclasses.replace(clip, frames=fitted(clip.frames, how, clip.of))


def _from_file(
    path: str, how: Sampling, span: dict[str, float], where: str, choosing: Mapping[str, Any]
) -> Clip:
    """A number of frames: as qwen-vl-utils, llava_hf or InternVL's processor count and round. A rate: as the first."""
    counts: list[int] = []

    def choose(total: int, rate: float) -> FrameSample:
        first, last, count = qwen.calculate_video_frame_range(span, total, rate)
        counts[:] = [count]
        if how.fps is None and how.total_pixels is None:
            if how.middles:
                part = count / min(how.frames, count)
                indices = (first + torch.arange(part / 2, count, part).int()).tolist()
            elif how.patch is None:
                indices = np.linspace(first, last, how.frames, dtype=int).tolist()
            else:
                indices = _spread(first, last, _even(how.frames, count))
        else:
            element = {"fps": how.fps, "max_frames": how.frames}
            element = {key: value for key, value in element.items() if value is not None}
            indices = _spread(first, last, qwen.smart_nframes(element, total_frames=count, video_fps=rate))
        group = 1 if how.patch is None else qwen.FRAME_FACTOR
        return FrameSample(indices, [index / rate for index in indices], total / rate, group)

    read = read_video(path, where, backend=how.backend, choose=choose, **choosing)
    return Clip(_planes(read.frames), _metadata(read.avg_fps, read.sample.indices, counts[0]), of=read.sample.of)


def _spread(first: int, last: int, number: int) -> list[int]:
    return torch.linspace(first, last, number).round().long().tolist()


def _even(wanted: int, there: int) -> int:
    """The stock classes round down to pairs of frames; a shorter video repeats its only frame."""
    return max(2, min(wanted, there) // qwen.FRAME_FACTOR * qwen.FRAME_FACTOR)


def fitted(frames: Tensor, how: Sampling, of: int | None = None) -> Tensor:
    """[T, 3, H, W] resized within the limits of a frame and of the whole video, as ``fetch_video`` does it.

    ``of``: the number of frames that share the limit of the video, if a method left some of them out: the others do not
    become larger.
    """
    factor = how.patch * qwen.SPATIAL_MERGE_SIZE
    count, _, height, width = frames.shape
    count = of or count
    least = how.limits.get("min_pixels", qwen.VIDEO_MIN_TOKEN_NUM * factor**2)
    total = how.limits.get("total_pixels", qwen.MODEL_SEQ_LEN * factor**2 * 0.9)
    most = max(min(qwen.VIDEO_MAX_TOKEN_NUM * factor**2, total / count * qwen.FRAME_FACTOR), int(least * 1.05))
    most = min(how.limits.get("max_pixels", most), most)
    size = qwen.smart_resize(height, width, factor=factor, min_pixels=least, max_pixels=most)
    return resize(frames, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True).float()


def fitted_image(image: Image.Image, how: Sampling, where: str = "a document") -> Image.Image:
    """An image resized to whole tokens, within the limits if there are any, as ``fetch_image`` does it.

    Raises:
        VisualError: qwen-vl-utils refuses it, as one that is 200 times as long as wide.
    """
    limits = {key: value for key, value in how.limits.items() if key != "total_pixels"}
    with reading(where, f"image {file_name(image)}", "use"):
        made = qwen.fetch_image({"image": image, **limits}, image_patch_size=how.patch)
    return from_file(made, file_name(image))


def _planes(frames: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)


def _metadata(rate: float, indices: list[int], total: int) -> dict[str, Any]:
    return {"fps": rate, "frames_indices": list(indices), "total_num_frames": total, "video_backend": "decord"}
