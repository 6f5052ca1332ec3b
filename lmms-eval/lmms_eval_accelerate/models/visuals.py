"""Images and videos of a document, or an error that says which file of which document could not be read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava.video_utils import Video, load_video, uniform_frame_indices

_IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
_VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".flv"})

#: frames per second of videos given as single frames (mvbench, as in lmms-eval's llava_vid)
FRAME_FOLDER_FPS = 3


class VisualError(RuntimeError):
    """An image or a video of a document cannot be read."""


def document_visuals(doc_to_visual: Callable, documents: Any, doc_id: Any, where: str) -> list[Any]:
    """PIL images and file paths of one document; empty for text.

    Raises:
        VisualError: reading failed in the task's own code (several tasks call ``sys.exit`` for a missing file).
    """
    visuals = from_document(doc_to_visual, documents, doc_id, where) or []
    visuals = [v for v in (visuals if isinstance(visuals, (list, tuple)) else [visuals]) if v is not None]
    for visual in visuals:
        if isinstance(visual, Image.Image):
            decoded(visual, where)
        elif not isinstance(visual, (str, os.PathLike)):
            raise TypeError(f"{where}: a visual is a {type(visual).__name__}; expected PIL images or file paths.")
    return [v if isinstance(v, Image.Image) else os.fspath(v) for v in visuals]


def from_document(make: Callable, documents: Any, doc_id: Any, where: str) -> Any:
    """What ``make`` (a task's own code) makes of one document.

    Raises:
        VisualError: it failed.
    """
    document: Mapping[str, Any] = {}
    try:
        document = documents[doc_id]
        return make(document)
    except (Exception, SystemExit) as error:
        raise VisualError(f"{where}: cannot load its image or video{_files(document)}: {_reason(error)}") from error


def read_image(image: Any, where: str) -> Image.Image:
    """A picture as RGB; ``image`` is one, or the path of one. What is transparent becomes white."""
    if not isinstance(image, Image.Image):
        try:
            image = Image.open(os.fspath(image))
        except (OSError, TypeError) as error:
            raise VisualError(f"{where}: cannot read image {image}: {_reason(error)}") from error
    image = decoded(image, where)
    if image.mode != "RGBA":
        return image.convert("RGB")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def read_video(path: str, where: str, **how: Any) -> Video:
    """``llava.video_utils.load_video``; every failure is a :class:`VisualError` that names file and document."""
    try:
        return load_video(path, **how)
    except (OSError, ValueError) as error:
        raise VisualError(f"{where}: cannot read video {path}: {_reason(error)}") from error


def frame_files(paths: list[str]) -> list[str] | None:
    """Image files of a video that is given as frames: several image paths, or one folder of images; else None."""
    if len(paths) == 1 and os.path.isdir(paths[0]):
        paths = sorted(str(p) for p in Path(paths[0]).iterdir())
    if len(paths) > 1 and all(Path(p).suffix.lower() in _IMAGE_SUFFIXES for p in paths):
        return paths
    return None


def read_frames(paths: list[str], num_frames: int, where: str) -> tuple[np.ndarray, list[int]]:
    """``num_frames`` evenly spaced of the given frame files: [T, H, W, 3], and their indices."""
    indices = uniform_frame_indices(len(paths), num_frames)
    frames = []
    for index in indices:
        try:
            with Image.open(paths[index]) as image:
                frames.append(np.asarray(image.convert("RGB")))
        except OSError as error:
            raise VisualError(f"{where}: cannot read frame {paths[index]}: {_reason(error)}") from error
    return np.stack(frames), indices


def decoded(image: Image.Image, where: str) -> Image.Image:
    """``image``, read completely."""
    try:
        image.load()  # PIL opens lazily: a damaged file shows itself here, not in the middle of preprocessing
        return image
    except Exception as error:
        name = getattr(image, "filename", "") or "an embedded image"
        raise VisualError(f"{where}: cannot read image {name}: {_reason(error)}") from error


def _files(document: Mapping[str, Any]) -> str:
    """Media file names that a document mentions."""
    known = _IMAGE_SUFFIXES | _VIDEO_SUFFIXES
    try:
        values = [v if isinstance(v, (list, tuple)) else [v] for v in document.values()]
        texts = [text for value in values for text in value if isinstance(text, str)]
    except Exception:  # a dataset row may decode media when its values are read, and fail again
        return ""
    names = [t for t in texts if Path(t).suffix.lower() in known]
    return f" ({', '.join(names)})" if names else ""


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
