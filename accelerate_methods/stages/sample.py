"""The sample stage: what the vision encoder is shown, by the size of the input or by the choice of frames."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.method import Method


class SampleMethod(Method):
    """Acts on the input frames or pixels before the vision encoder.

    A method that overrides :meth:`frames` chooses the frames of a video where the video is read. It declares a scorer,
    an image-text model that says how well each candidate frame fits the question. One that overrides
    :meth:`frame_count` has the model get fewer of them.

    Class attributes (a method may have fields of these names):
        scorer: "clip" or "blip", see ``accelerate_methods.hosts.scorers``; None: no scores are needed.
        scorer_checkpoint: its checkpoint (name on the hub or folder); None: the scorer's own default.
    """

    stage = "sample"
    scorer: ClassVar[str | None] = None
    scorer_checkpoint: ClassVar[str | None] = None

    def input_side(self, side: int, patch: int) -> int:
        """Side in pixels (a multiple of ``patch``) that a ``side`` x ``side`` view is resized to."""
        return side

    @classmethod
    def chooses_frames(cls) -> bool:
        """Whether the method acts where videos are read, which every model family offers."""
        return cls.selects_frames() or cls.frame_count is not SampleMethod.frame_count

    @classmethod
    def selects_frames(cls) -> bool:
        """Whether the method looks at candidates, and says which of them the model gets."""
        return cls.frames is not SampleMethod.frames

    def frame_count(self, count: int) -> int:
        """How many frames of a video the model gets where it would get ``count``, 1 <= frames <= count.

        They are spread evenly over the same stretch of the video, unless :meth:`frames` says which they are.
        """
        return count

    def candidates(self, total_frames: int, avg_fps: float) -> range:
        """Frames that are scored: one per second, counted in whole frames."""
        step = max(1, int(avg_fps))
        return range(0, total_frames // step * step, step) if total_frames >= step else range(min(1, total_frames))

    def frames(self, scores: Tensor, count: int) -> Tensor:
        """Which of the candidates are shown to the model.

        Args:
            scores: [N] float64, one per candidate, on the CPU.
            count: frames that the model is to get.

        Returns:
            [K] ascending indices of candidates. With fewer than ``count`` of them the model gets frames as without a
            method.
        """
        raise NotImplementedError


def outside_of_models(method: Method | type[Method]) -> frozenset[str]:
    """The stages of a method that a model need not offer: frames are chosen before it is asked."""
    cls = method if isinstance(method, type) else type(method)
    return frozenset({"sample"} if issubclass(cls, SampleMethod) and cls.chooses_frames() else ())


def check_frames(method: str, chosen: Tensor, candidates: int) -> list[int]:
    """Indices that a method returned from ``frames``, as plain integers.

    Raises:
        MethodError: they are no ascending indices of candidates.
    """
    what = f"{method}.frames must return ascending indices [K] of the {candidates} candidates"
    if not isinstance(chosen, Tensor) or chosen.ndim != 1 or chosen.is_floating_point():
        raise MethodError(f"{what}, got {type(chosen).__name__}.")
    indices = [int(index) for index in chosen.tolist()]
    if any(b <= a for a, b in pairwise(indices)) or (
        indices and not 0 <= indices[0] <= indices[-1] < candidates
    ):
        raise MethodError(f"{what}, got {indices[:8]}.")
    return indices
