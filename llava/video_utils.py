"""Reading the frames of a video that are looked at; which these are is said in :mod:`.frame_choice`.

Reading needs decord or PyAV; neither is imported before a video is read.
Moving GIF, WebP, PNG and AVIF files are read by Pillow. Frames come upright with every reader (`video_rotation`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import Image

from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.printing import ShapesShown
from llava.frame_choice import (
    Candidates,
    FrameSample,
    FrameSampler,
    Read,
    chosen_frames,
    evenly_spaced,
    fewer_frames,
    sample_frames,
    uniform_frame_indices,  # noqa: F401 (its name here)
)
from llava.media_kind import kind_of
from llava.video_rotation import rotation_of, upright

# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Video(ShapesShown):
    """Frames read from a file, uint8 RGB [T, height, width, 3], and where they stand in it."""

    frames: np.ndarray
    sample: FrameSample
    total_frames: int
    avg_fps: float


Choose = Callable[[int, float], FrameSample]  # (total frames, frames per second) -> frames to read
#: the same, with what reads the video; called while it is open
_Pick = Callable[[int, float, Read], FrameSample]


def load_video(
    path: str | os.PathLike[str],
    num_frames: int | None = None,
    fps: float | None = None,
    force_sample: bool = False,
    backend: str = "auto",
    choose: Choose | None = None,
    sampler: FrameSampler | None = None,
    question: str | None = None,
) -> Video:
    """Read sampled frames of a video file.

    Args:
        path: the file.
        num_frames: alone: exactly that many frames, evenly spaced. Together with fps: the most frames to read.
        fps: frames per second to read.
        force_sample: with both, spread num_frames frames evenly even if fps gives fewer.
        backend: "decord", "pyav", or "auto": decord if installed, PyAV if not or if decord cannot read the file (it
            has no AV1). A moving picture (GIF, WebP, PNG, AVIF) is read by Pillow with each of them.
        choose: in place of the three: (total frames, frames per second of the file) -> which to read.
        sampler: wants fewer frames, or chooses that many by looking at some (``accelerate(model, ...).frame_sampler``).
            It is shown candidates a few at a time, and only those that it takes are read for good.
        question: what will be asked, for the sampler.
    Raises:
        ValueError: nothing says which frames to read, or an unknown backend.
        ImportError: the backend (for "auto": every backend) is not installed.
        FileNotFoundError: no such file. OSError: it cannot be read, has no frames, or is a still picture. Every message
            names the file.
    """
    if num_frames is None and fps is None and choose is None:
        raise ValueError("load_video needs num_frames, fps, or both")
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    if fps is not None and fps <= 0:
        raise ValueError(f"fps must be positive, got {fps}")
    if backend != "auto" and backend not in _READERS:
        raise ValueError(f"unknown video backend {backend!r}: expected 'auto', {' or '.join(map(repr, _READERS))}")
    path = os.fspath(path)
    kind = kind_of(path)
    if kind == "picture":
        raise OSError(f"cannot read video {path}: it is a still picture")
    wanted = list(_READERS) if backend == "auto" else [backend]
    readers = {name: _READERS[name][1] for name in wanted if find_spec(_READERS[name][0])}
    if kind == "animation":
        readers = {"pillow": _read_pillow}
    if not readers:
        packages = " or ".join(_READERS[name][0] for name in wanted)
        raise ImportError(f"cannot read video {path}: pip install {packages}")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no such video file: {path}")

    def by_count_or_rate(total_frames: int, avg_fps: float) -> FrameSample:
        if fps is None:
            return evenly_spaced(total_frames, num_frames, avg_fps)
        return sample_frames(total_frames, avg_fps, fps, num_frames or 0, force_sample)

    def pick(total_frames: int, avg_fps: float, read: Read) -> FrameSample:
        sample = (choose or by_count_or_rate)(total_frames, avg_fps)
        if sampler is None:
            return sample
        if not sampler.selects:
            return fewer_frames(sample, sampler.count(len(sample.indices)), avg_fps)
        span = (0, total_frames - 1) if choose is None else (min(sample.indices), max(sample.indices))
        state = os.stat(path)
        key = (os.path.abspath(path), state.st_mtime_ns, state.st_size)
        count = sampler.count(num_frames or len(sample.indices))
        selected = sampler.pick(Candidates(key, total_frames, avg_fps, span, read), question, count)
        return chosen_frames(selected, count, total_frames, avg_fps, fps or 1, None if choose is None else sample)

    failures = []
    for name, read in readers.items():
        try:
            return read(path, pick)
        except MethodError:  # of the sampler: no other reader would help
            raise
        except Exception as error:  # each reader raises its own types; the caller gets one, with all the reasons
            failures.append((name, error))
    reasons = "; ".join(f"{name}: {type(error).__name__}: {str(error).strip()[:300]}" for name, error in failures)
    raise OSError(f"cannot read video {path} ({reasons})") from failures[-1][1]


def _read_decord(path: str, pick: _Pick) -> Video:
    import decord

    reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
    total, avg_fps = len(reader), float(reader.get_avg_fps())

    def frames_of(indices: list[int]) -> np.ndarray:
        batch = reader.get_batch(indices)
        # Inside someone's decord.bridge setting the batch is that framework's tensor.
        return batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch)

    sample = pick(total, avg_fps, frames_of)
    return Video(frames_of(sample.indices), sample, total, avg_fps)


def _read_pyav(path: str, pick: _Pick) -> Video:
    import av

    with av.open(path) as container:
        stream = _stream(container)
        rate, index = stream.average_rate or stream.guessed_rate, stream.index
        degrees = rotation_of(path, stream.metadata, stream.id)
        # Headers may lie about the number of frames; counting packets costs no decoding and is what decord does.
        packets = [packet for packet in container.demux(stream) if packet.size]
        hidden = sum(getattr(packet, "is_discard", False) for packet in packets)  # cut away by the file's edit list
        total = len(packets)
    if not rate:
        raise ValueError("the file does not tell its frame rate")
    sample = pick(total, float(rate), _in_one_pass(path, index, degrees))
    frames, seen = _decode_pyav(path, index, sample.indices)
    if seen <= max(sample.indices) and seen < total - hidden:  # damaged: fewer frames come out than packets went in
        total = seen
        sample = pick(total, float(rate), _in_one_pass(path, index, degrees))
        frames, seen = _decode_pyav(path, index, sample.indices)
    # decord counts hidden packets too. So that both readers choose the same indices we do as well; the last frame
    # stands in.
    stack = np.stack([frames[min(i, seen - 1)] for i in sample.indices])
    return Video(upright(stack, degrees), sample, total, float(rate))


def _stream(container: Any) -> Any:
    """The video stream that FFmpeg, and so decord, takes for the main one: not the cover of a film."""
    if not container.streams.video:
        raise ValueError("the file has no video stream")
    best = getattr(container.streams, "best", None)  # PyAV 13 and later
    return (best("video") if best is not None else None) or container.streams.video[0]


def _decode_pyav(path: str, index: int, indices: list[int]) -> tuple[dict[int, np.ndarray], int]:
    """Decode up to the last wanted frame. Returns wanted frames (and the last one) by index, and how many came out."""
    import av

    wanted, last, frames, seen, frame = set(indices), max(indices), {}, 0, None
    with av.open(path) as container:
        stream = container.streams[index]
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            if seen in wanted:
                frames[seen] = frame.to_ndarray(format="rgb24")
            seen += 1
            if seen > last:
                break
        if frame is None:
            raise ValueError("no frame could be decoded")
        frames.setdefault(seen - 1, frame.to_ndarray(format="rgb24"))
    return frames, seen


def _in_one_pass(path: str, index: int, degrees: int) -> Read:
    """Reads ascending frame numbers, batch after batch; a damaged file gives fewer."""
    import av

    def decoded() -> Iterator[tuple[int, Any]]:
        with av.open(path) as container:
            stream = container.streams[index]
            stream.thread_type = "AUTO"
            yield from enumerate(container.decode(stream))

    numbered = decoded()

    def read(indices: list[int]) -> np.ndarray:
        wanted, found = set(indices), []
        for number, frame in numbered:
            if number in wanted:
                found.append(frame.to_ndarray(format="rgb24"))
            if number >= indices[-1]:
                break
        return upright(np.stack(found), degrees) if found else np.empty((0, 1, 1, 3), np.uint8)

    return read


def _read_pillow(path: str, pick: _Pick) -> Video:
    """A moving picture; transparent parts become white."""
    with Image.open(path) as image:
        # The picture that a PNG shows where nothing can move it is no frame.
        first = int(bool(getattr(image, "default_image", False)))
        places = range(first, image.n_frames)
        shown = []
        for place in places:
            image.seek(place)
            image.load()  # WebP tells a frame's duration only now
            shown.append(image.info.get("duration") or _UNTOLD_DURATION)
        rate = 1000 * len(places) / sum(shown)

        def frames_of(indices: list[int]) -> np.ndarray:
            found: dict[int, np.ndarray] = {}
            for i in sorted(set(indices)):
                image.seek(places[i])
                picture = image.convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                found[i] = np.asarray(Image.alpha_composite(white, picture).convert("RGB"))
            return np.stack([found[i] for i in indices])

        sample = pick(len(places), rate, frames_of)
        return Video(frames_of(sample.indices), sample, len(places), rate)


_UNTOLD_DURATION = 100  # milliseconds, as FFmpeg and browsers show a frame that says 0

# name -> (package, reader), in the order in which "auto" tries them
_READERS: dict[str, tuple[str, Callable[[str, _Pick], Video]]] = {
    "decord": ("decord", _read_decord),
    "pyav": ("av", _read_pyav),
}
