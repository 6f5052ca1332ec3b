"""Which frames of a video to look at: rules of counts and rates, and what methods that choose frames are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

# -- by count and rate -------------------------------------------------------------------------------------------------


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
    """Sampled frames of one video: indices, their times in seconds, and the length of the video in seconds.

    Attributes:
        group: frames that the model makes one of; their number stays a multiple of it.
        of: how many there would be without a method that wants fewer, None if none does.
    """

    indices: list[int]
    seconds: list[float]
    video_time: float
    group: int = 1
    of: int | None = None

    @property
    def frame_time(self) -> str:
        """Times as the time instruction of LLaVA-Video writes them: "0.00s,1.00s"."""
        return ",".join(f"{second:.2f}s" for second in self.seconds)


def evenly_spaced(total_frames: int, num_frames: int, avg_fps: float) -> FrameSample:
    """`num_frames` frames from the first to the last one, see `uniform_frame_indices`, at their true seconds."""
    indices = uniform_frame_indices(total_frames, num_frames)
    return FrameSample(indices, [i / avg_fps for i in indices], total_frames / avg_fps)


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
    if frames_upbound > 0 and (force_sample or len(indices) > frames_upbound):
        return evenly_spaced(total_frames, frames_upbound, avg_fps)
    return FrameSample(indices, [i / step for i in indices], total_frames / avg_fps)


# -- by a method -------------------------------------------------------------------------------------------------------

_BATCH = 32  # frames that are decoded before they are scored; no more are held at a time


class FrameSampler(Protocol):
    """What chooses frames; ``accelerate(model, ...).frame_sampler`` is one.

    Attributes:
        selects: whether :meth:`pick` says which frames; if not, they are spread evenly.
    """

    selects: bool

    def count(self, count: int) -> int:
        """How many frames a model gets that would get ``count``."""

    def pick(self, video: Candidates, question: str | None, count: int) -> list[int]:
        """Frame numbers, ascending, at most ``count`` of them."""


class Candidates:
    """A video before frames are chosen.

    Attributes:
        key: what identifies the video, for scores that are kept.
        total_frames, avg_fps: as the file says.
        first, last: the stretch that frames may be taken from.
    """

    def __init__(self, key: Any, total_frames: int, avg_fps: float, span: tuple[int, int], read: Read):
        self.key, self.total_frames, self.avg_fps = key, total_frames, avg_fps
        self.first, self.last = span
        self._read = read

    def batches(self, indices: list[int]) -> Iterator[np.ndarray]:
        """The frames ``indices`` (ascending), some at a time: uint8 RGB [n, height, width, 3]."""
        for start in range(0, len(indices), _BATCH):
            yield self._read(indices[start : start + _BATCH])


Read = Callable[[list[int]], np.ndarray]  # ascending frame numbers -> uint8 RGB [n, height, width, 3]


def fewer_frames(sample: FrameSample, count: int, avg_fps: float) -> FrameSample:
    """About ``count`` frames spread evenly over the stretch of ``sample``, a multiple of its ``group``."""
    there = len(sample.indices)
    count = max(sample.group, count // sample.group * sample.group)
    if count >= there:
        return sample
    first, last = min(sample.indices), max(sample.indices)
    indices = [first + index for index in uniform_frame_indices(last - first + 1, count)]
    return replace(sample, indices=indices, seconds=[i / avg_fps for i in indices], of=there)


def chosen_frames(
    selected: list[int],
    count: int,
    total_frames: int,
    avg_fps: float,
    video_fps: float = 1,
    otherwise: FrameSample | None = None,
) -> FrameSample:
    """What a model is given of the frames that were selected.

    Fewer than ``count`` are discarded, and more are cut at the end, as the releases of such methods do. Times count
    steps of the rate ``video_fps``, as in :func:`sample_frames`.

    Args:
        otherwise: the frames in place of a discarded selection; evenly spaced ones if None.
    """
    indices = sorted(selected[:count])
    if len(indices) < count:
        if otherwise is not None:
            return otherwise
        return evenly_spaced(total_frames, count, avg_fps)
    step = max(1, round(avg_fps / video_fps))
    return FrameSample(indices, [i / step for i in indices], total_frames / avg_fps)
