"""Which frames of a video to look at, and reading them.

The index rules are plain functions of counts. Reading needs decord or PyAV; neither is imported before a video is read.
Moving GIF, WebP, PNG and AVIF files are read by Pillow. Frames come upright with every reader (`video_rotation`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import Image

from accelerate_methods.stages.printing import ShapesShown
from llava.media_kind import kind_of
from llava.video_rotation import rotation_of, upright

# -- which frames ------------------------------------------------------------------------------------------------------


def uniform_frame_indices(total_frames: int, num_frames: int) -> list[int]:
    """`num_frames` indices from the first to the last frame, evenly spaced and rounded down.

    A video with fewer frames repeats some, so that the count is always the one asked for (lmms-eval's llava_onevision).

    Raises:
        ValueError: a count is not positive.
    """
    if total_frames < 1 or num_frames < 1:
        raise ValueError(f"cannot sample {num_frames} frames of {total_frames}: both must be at least 1")
    return np.linspace(0, total_frames - 1, num_frames, dtype=int).tolist()


@dataclass(frozen=True)
class FrameSample:
    """Sampled frames of one video: indices, their times in seconds, and the length of the video in seconds."""

    indices: list[int]
    seconds: list[float]
    video_time: float

    @property
    def frame_time(self) -> str:
        """Times as the time instruction of LLaVA-Video writes them: "0.00s,1.00s"."""
        return ",".join(f"{second:.2f}s" for second in self.seconds)


def sample_frames(
    total_frames: int, avg_fps: float, video_fps: float = 1, frames_upbound: int = 0, force_sample: bool = False
) -> FrameSample:
    """Frames at a fixed rate, unless they are too many (LLaVA-NeXT `process_video_with_decord`).

    Args:
        total_frames: frames in the file.
        avg_fps: frames per second of the file.
        video_fps: frames per second wanted: every round(avg_fps / video_fps)-th frame is taken.
        frames_upbound: if more frames than this come out, that many are spread evenly instead; 0 means no limit.
        force_sample: spread `frames_upbound` frames evenly in any case.
    Returns:
        the sample. Times count steps of the fixed rate (index / step) when the rate is kept, true seconds otherwise:
        what the checkpoints were trained with.
    Raises:
        ValueError: no frames, or a rate that is not positive.
    """
    if total_frames < 1 or avg_fps <= 0 or video_fps <= 0:
        raise ValueError(
            f"cannot sample {total_frames} frames of {avg_fps} fps at {video_fps} fps: all must be positive"
        )
    step = max(1, round(avg_fps / video_fps))  # at least 1: more frames per second than there are means all of them
    indices = list(range(0, total_frames, step))
    seconds = [i / step for i in indices]
    if frames_upbound > 0 and (force_sample or len(indices) > frames_upbound):
        indices = uniform_frame_indices(total_frames, frames_upbound)
        seconds = [i / avg_fps for i in indices]
    return FrameSample(indices, seconds, total_frames / avg_fps)


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Video(ShapesShown):
    """Frames read from a file, uint8 RGB [T, height, width, 3], and where they stand in it."""

    frames: np.ndarray
    sample: FrameSample
    total_frames: int
    avg_fps: float


Choose = Callable[[int, float], FrameSample]  # (total frames, frames per second) -> frames to read


def load_video(
    path: str | os.PathLike[str],
    num_frames: int | None = None,
    fps: float | None = None,
    force_sample: bool = False,
    backend: str = "auto",
    choose: Choose | None = None,
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
            indices = uniform_frame_indices(total_frames, num_frames)
            return FrameSample(indices, [i / avg_fps for i in indices], total_frames / avg_fps)
        return sample_frames(total_frames, avg_fps, fps, num_frames or 0, force_sample)

    failures = []
    for name, read in readers.items():
        try:
            return read(path, choose or by_count_or_rate)
        except Exception as error:  # each reader raises its own types; the caller gets one, with all the reasons
            failures.append((name, error))
    reasons = "; ".join(f"{name}: {type(error).__name__}: {str(error).strip()[:300]}" for name, error in failures)
    raise OSError(f"cannot read video {path} ({reasons})") from failures[-1][1]


def _read_decord(path: str, choose: Choose) -> Video:
    import decord

    reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
    total, avg_fps = len(reader), float(reader.get_avg_fps())
    sample = choose(total, avg_fps)
    batch = reader.get_batch(sample.indices)
    # Inside someone's decord.bridge setting the batch is that framework's tensor.
    frames = batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch)
    return Video(frames, sample, total, avg_fps)


def _read_pyav(path: str, choose: Choose) -> Video:
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
    sample = choose(total, float(rate))
    frames, seen = _decode_pyav(path, index, sample.indices)
    if seen <= max(sample.indices) and seen < total - hidden:  # damaged: fewer frames come out than packets went in
        total = seen
        sample = choose(total, float(rate))
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


def _read_pillow(path: str, choose: Choose) -> Video:
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
        sample = choose(len(places), rate)
        frames: dict[int, np.ndarray] = {}
        for i in sorted(set(sample.indices)):
            image.seek(places[i])
            picture = image.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            frames[i] = np.asarray(Image.alpha_composite(white, picture).convert("RGB"))
    return Video(np.stack([frames[i] for i in sample.indices]), sample, len(places), rate)


_UNTOLD_DURATION = 100  # milliseconds, as FFmpeg and browsers show a frame that says 0

# name -> (package, reader), in the order in which "auto" tries them
_READERS: dict[str, tuple[str, Callable[[str, Choose], Video]]] = {
    "decord": ("decord", _read_decord),
    "pyav": ("av", _read_pyav),
}
