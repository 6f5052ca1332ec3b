"""Images and videos of a document, or an error that says which file of which document could not be read.

Pillow, the video readers, the processors and the tasks' own code raise whatever they like for a file that is damaged,
too large or of a strange shape. :func:`reading` makes one error of all of them, the one that ``on_error=skip`` skips.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from accelerate_methods.stages.errors import MethodError
from llava.frame_choice import Candidates, FrameSampler
from llava.media_kind import PICTURE_SUFFIXES, VIDEO_SUFFIXES, is_picture, kind_of
from llava.video_utils import Video, load_video, uniform_frame_indices

#: frames per second of videos given as single frames (mvbench, as in lmms-eval's llava_vid)
FRAME_FOLDER_FPS = 3

_EMBEDDED = "an embedded image"
#: long side / short side from which a picture is a strip; Qwen-VL's processors refuse it
_STRIP = 200
#: side that processors scale a picture's short side to, about
_SHORT_SIDE = 384
#: pixels that a strip may become when it is padded to a square or scaled by its short side: 1.5 GiB
_MOST_PIXELS = 1 << 29


class VisualError(RuntimeError):
    """An image or a video of a document cannot be used. The message is one line with document and file."""


class UnsupportedVisual(VisualError, TypeError):
    """A document holds media of a kind that the model does not read."""


#: errors that say nothing new about a document: it is told of already, a setting, a missing package, a full GPU
OF_THE_RUN = (VisualError, MethodError, ImportError, torch.OutOfMemoryError)


@contextlib.contextmanager
def reading(where: str, what: str, doing: str = "read") -> Iterator[None]:
    """Whatever goes wrong inside is a :class:`VisualError`: ``<where>: cannot <doing> <what>: <reason>``."""
    try:
        yield
    except OF_THE_RUN:
        raise
    except Exception as error:
        raise VisualError(f"{where}: cannot {doing} {what}: {reason(error)}") from error


def document_visuals(doc_to_visual: Callable, documents: Any, doc_id: Any, where: str) -> list[Any]:
    """PIL images and file paths (videos, or several pictures that are the frames of one) of one document; empty for
    text. A single path of a picture is read.

    Raises:
        VisualError: reading failed, also in the task's own code (several tasks call ``sys.exit`` for a missing file).
    """
    visuals, files = from_document(doc_to_visual, documents, doc_id, where)
    visuals = visuals or []
    visuals = [v for v in (visuals if isinstance(visuals, (list, tuple)) else [visuals]) if v is not None]
    for visual in visuals:
        if isinstance(visual, Image.Image):
            decoded(from_file(visual, files), where)
        elif not isinstance(visual, (str, os.PathLike)):
            kind = type(visual).__name__
            raise UnsupportedVisual(f"{where}: a visual is a {kind}; expected PIL images or file paths.")
    visuals = [v if isinstance(v, Image.Image) else os.fspath(v) for v in visuals]
    paths = [v for v in visuals if isinstance(v, str)]
    if len(paths) > 1 and frame_files(paths) is not None:
        return visuals
    return [read_image(v, where) if isinstance(v, str) and kind_of(v) == "picture" else v for v in visuals]


def from_document(make: Callable, documents: Any, doc_id: Any, where: str) -> tuple[Any, str]:
    """What ``make`` (a task's own code) makes of one document, and the media files that the document mentions.

    Raises:
        VisualError: it failed.
    """
    document: Any = {}
    try:
        document = documents[doc_id]
        return make(document), _files(document)
    except (Exception, SystemExit) as error:
        files = _files(document) or _files(_undecoded(documents, doc_id))
        named = f" ({files})" if files else ""
        raise VisualError(f"{where}: cannot load its image or video{named}: {reason(error)}") from error


def without_media(documents: Any, doc_id: Any) -> Any:
    """A document whose media cannot be read, for code that wants its other columns: media columns hold None.

    ``documents`` is a data set of ``datasets``, or a collection that decodes nothing by itself.
    """
    try:
        return documents[doc_id]
    except Exception:
        row = _undecoded(documents, doc_id)
        if not row:
            raise
        media = {name for name, feature in documents.features.items() if "Image(" in repr(feature)}
        return {name: None if name in media else value for name, value in row[0].items()}


def read_image(image: Any, where: str) -> Image.Image:
    """A picture as RGB; ``image`` is one, or the path of one. What is transparent becomes white.

    The result's ``filename`` is the file that it came from, for messages.
    """
    name = file_name(image)
    with reading(where, f"image {name}"):
        if not isinstance(image, Image.Image):
            image = Image.open(os.fspath(image))
        image = decoded(image, where)
        if image.mode == "RGBA":
            made = Image.new("RGB", image.size, (255, 255, 255))
            made.paste(image, mask=image.getchannel("A"))
        else:
            made = image.convert("RGB")
    return from_file(made, name)


class Choosing:
    """What chooses the frames of one document's videos, and how many it left of each.

    Attributes:
        thinned: (frames without the method, frames) of each video, in the order in which they are read.
    """

    def __init__(self, sampler: FrameSampler):
        self._sampler = sampler
        self.selects = sampler.selects
        self.thinned: list[tuple[int, int]] = []

    def count(self, count: int) -> int:
        return self._sampler.count(count)

    def pick(self, video: Candidates, question: str | None, count: int) -> list[int]:
        return self._sampler.pick(video, question, count)


def read_video(path: str, where: str, **how: Any) -> Video:
    """``llava.video_utils.load_video``; every failure is a :class:`VisualError` that names file and document."""
    with reading(where, f"video {path}"):
        video = load_video(path, **how)
    if how.get("sampler") is not None:
        there = len(video.sample.indices)
        how["sampler"].thinned.append((video.sample.of or there, there))
    return video


def frame_files(paths: list[str]) -> list[str] | None:
    """Picture files of a video that is given as frames: several paths of pictures, or one folder of them; else None."""
    if len(paths) == 1 and os.path.isdir(paths[0]):
        paths = sorted(str(p) for p in Path(paths[0]).iterdir())
    if len(paths) < 2 or kind_of(paths[0]) in ("video", "animation"):
        return None
    # A folder may hold thousands: a usual suffix is believed, a file of another one is looked into.
    return paths if all(_suffix(p) in PICTURE_SUFFIXES or is_picture(p) for p in paths) else None


def videos_of(paths: list[str]) -> list[list[str]]:
    """One list of paths per video: several image files are the frames of one."""
    return [paths] if frame_files(paths) is not None else [[path] for path in paths]


def read_frames(
    paths: list[str], num_frames: int, where: str, sampler: Choosing | None = None, group: int = 1
) -> tuple[np.ndarray, list[int]]:
    """``num_frames`` evenly spaced of the given frame files: [T, H, W, 3], and their indices.

    ``sampler`` may want fewer of them, a multiple of ``group``.
    """
    if sampler is not None:
        wanted = max(group, sampler.count(num_frames) // group * group)
        sampler.thinned.append((num_frames, wanted))
        num_frames = wanted
    indices = uniform_frame_indices(len(paths), num_frames)
    frames: dict[int, np.ndarray] = {}
    for index in dict.fromkeys(indices):
        with reading(where, f"frame {paths[index]}"), Image.open(paths[index]) as image:
            frames[index] = np.asarray(decoded(image, where).convert("RGB"))
    first = indices[0]
    other = next((i for i in frames if frames[i].shape != frames[first].shape), None)
    if other is not None:
        sizes = [f"{paths[i]} is {frames[i].shape[1]} x {frames[i].shape[0]}" for i in (first, other)]
        raise VisualError(f"{where}: the frames of a video differ in size: {', '.join(sizes)}.")
    return np.stack([frames[index] for index in indices]), indices


def decoded(image: Image.Image, where: str) -> Image.Image:
    """``image``, read completely.

    Raises:
        VisualError: it cannot be read, or is a strip that no processor could make anything of.
    """
    with reading(where, f"image {file_name(image)}"):
        image.load()  # PIL opens lazily: a damaged file shows itself here, not in the middle of preprocessing
    short, long = sorted(image.size)
    if not short:
        raise VisualError(f"{where}: image {file_name(image)} is empty ({image.width} x {image.height}).")
    if long > _STRIP * short and max(long**2, _SHORT_SIDE**2 * long // short) > _MOST_PIXELS:
        raise VisualError(
            f"{where}: image {file_name(image)} is {image.width} x {image.height}: padded or scaled, such a strip "
            "would fill the memory."
        )
    return image


def from_file(image: Image.Image, name: str) -> Image.Image:
    """``image``, with the file that it was made from, unless it knows that itself."""
    if name not in ("", _EMBEDDED) and file_name(image) == _EMBEDDED:
        image.filename = name
    return image


def file_name(image: Any) -> str:
    """The file of an image, for messages; a path is its own."""
    if not isinstance(image, Image.Image):
        return str(image)
    return os.fspath(getattr(image, "filename", "") or "") or _EMBEDDED


def names_of(visuals: Iterable[Any]) -> str:
    """The files of a document's visuals, for messages."""
    return ", ".join(dict.fromkeys(file_name(visual) for visual in visuals)) or "no file"


def reason(error: BaseException) -> str:
    """Kind and message of an error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _files(document: Any) -> str:
    """Media files that a document mentions, with commas between them."""
    try:
        names = [text for text in _texts(document) if _suffix(text) in PICTURE_SUFFIXES | VIDEO_SUFFIXES]
    except Exception:  # a dataset row may decode media when its values are read, and fail again
        return ""
    return ", ".join(dict.fromkeys(names))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for inner in value.values() for text in _texts(inner))
    elif isinstance(value, (list, tuple)):
        yield from (text for inner in value for text in _texts(inner))


def _undecoded(documents: Any, doc_id: Any) -> Any:
    """A row of a data set whose media are not decoded but named; nothing for other collections."""
    try:
        return documents.with_format("arrow")[doc_id].to_pylist()
    except Exception:  # only to name a file, in an error that is raised anyway
        return []
