"""Choosing the frames of a video by a method of the sample stage, where the video is read."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from accelerate_methods.hosts.questions import plain_question
from accelerate_methods.hosts.scorers import Scorer, scorer_class
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.sample import SampleMethod, check_frames

_KEPT = 256  # (video, question) pairs whose scores are remembered


class Video(Protocol):
    """A video whose frames have not been chosen yet (``llava.frame_choice.Candidates`` is one).

    Attributes:
        key: what identifies the video; scores are kept under it.
        first, last: the stretch that frames may be taken from.
    """

    key: Any
    total_frames: int
    avg_fps: float
    first: int
    last: int

    def batches(self, indices: list[int]) -> Iterator[np.ndarray]:
        """The frames ``indices`` (ascending), some at a time: uint8 RGB [n, height, width, 3]."""


class FrameSampler:
    """A sample method with its scorer, which is loaded when it is first needed.

    Args:
        method: one that chooses frames.
        device: where the scorer computes.
    """

    def __init__(self, method: SampleMethod, device: torch.device | str = "cpu"):
        self.method, self.device = method, device
        self._scorer: Scorer | None = None
        self._scores: collections.OrderedDict[Any, Tensor] = collections.OrderedDict()

    @property
    def selects(self) -> bool:
        """Whether :meth:`pick` is to be asked which frames the model gets."""
        return self.method.selects_frames()

    def count(self, count: int) -> int:
        """How many frames the model gets where it would get ``count``.

        Raises:
            MethodError: the method wants none, or more.
        """
        wanted = self.method.frame_count(count)
        if not 1 <= wanted <= count:
            raise MethodError(f"{self.method.name}.frame_count must return 1 to {count}, got {wanted!r}.")
        return wanted

    def pick(self, video: Video, question: str | None, count: int) -> list[int]:
        """Numbers of the frames that the method chooses, ascending.

        Args:
            count: frames that the model is to get; if there are fewer, it gets its own choice.

        Raises:
            MethodError: nobody says what the question is, or the scorer cannot be loaded.
        """
        method = self.method
        candidates = [i for i in method.candidates(video.total_frames, video.avg_fps) if video.first <= i <= video.last]
        scores = torch.zeros(len(candidates), dtype=torch.float64)
        if method.scorer is not None and candidates:
            if not question or not plain_question(question):
                raise MethodError(
                    f"{method.name} chooses frames by the question, and nothing says what it is: give question=... "
                    "where the video is read."
                )
            scores = self._scored(video, plain_question(question), candidates)
            candidates = candidates[: len(scores)]  # a damaged file ends early
        chosen = method.frames(scores, count)
        return [candidates[i] for i in check_frames(method.name, chosen, len(candidates))]

    def _scored(self, video: Video, question: str, candidates: list[int]) -> Tensor:
        """[N] scores of the candidates, kept for the next time."""
        key = (video.key, question, len(candidates), candidates[0], candidates[-1])
        if key in self._scores:
            self._scores.move_to_end(key)
            return self._scores[key]
        if self._scorer is None:
            self._scorer = scorer_class(self.method.scorer)(self.method.scorer_checkpoint, self.device)
        asked = self._scorer.read(question)
        parts = [self._scorer.score(frames, asked) for frames in video.batches(candidates) if len(frames)]
        scores = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
        self._scores[key] = scores
        if len(self._scores) > _KEPT:
            self._scores.popitem(last=False)
        return scores


def frame_sampler(pipeline: Pipeline, device: torch.device | str = "cpu") -> FrameSampler | None:
    """What chooses frames in a pipeline; None if nothing does."""
    method = pipeline.sample
    return FrameSampler(method, device) if method is not None and method.chooses_frames() else None
