"""The frames that a sample method chooses: what it is shown of a video, and what the model is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from llava.video_utils import FrameSample, uniform_frame_indices

_BATCH = 32  # frames that are decoded before they are scored; no more are held at a time


class FrameSampler(Protocol):
    """What chooses frames; ``accelerate_methods.frame_sampler(...)`` makes one of a method."""

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
    steps of the rate ``video_fps``, as in :func:`.video_utils.sample_frames`.

    Args:
        otherwise: the frames in place of a discarded selection; evenly spaced ones if None.
    """
    indices = sorted(selected[:count])
    if len(indices) < count:
        if otherwise is not None:
            return otherwise
        indices = uniform_frame_indices(total_frames, count)
        return FrameSample(indices, [i / avg_fps for i in indices], total_frames / avg_fps)
    step = max(1, round(avg_fps / video_fps))
    return FrameSample(indices, [i / step for i in indices], total_frames / avg_fps)
