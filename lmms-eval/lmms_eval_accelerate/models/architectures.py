"""Trained architectures: pictures, frames and prompts as the class of the model makes them (llava/model/inputs.py)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from accelerate_methods.engine.recording import RequestRecord
from accelerate_methods.registry.architectures import Architecture, architecture_named
from accelerate_methods.stages.errors import MethodError
from llava.frame_choice import FrameSample
from llava.media_kind import is_picture
from lmms_eval_accelerate.models.base import LlavaAccelerated, Question
from lmms_eval_accelerate.models.costs import ARCHITECTURE_WORK, Costs
from lmms_eval_accelerate.models.visuals import (
    FRAME_FOLDER_FPS,
    UnsupportedVisual,
    frame_files,
    read_frames,
    read_image,
    read_video,
    videos_of,
)


class TrainedArchitecture(LlavaAccelerated):
    """Base of the classes behind the ids of trained architectures; :func:`class_of` makes them from their entries."""

    entry: ClassVar[Architecture]

    # -- start -------------------------------------------------------------------------------------------------------

    def default_template(self) -> str:
        return self.model.prompt_template

    @property
    def steps(self) -> dict[str, Any]:
        """Run parameters for the steps that prepare pictures and prompts, by name."""
        return self.entry.for_inputs(self.args.values)

    def _call_arguments(self) -> dict[str, Any]:
        """Run parameters that ``forward`` and ``generate`` take; those left to the model are not given."""
        return self.entry.for_generate(self.args.values)

    # -- questions ---------------------------------------------------------------------------------------------------

    def question(self, context: str, visuals: list[Any], gen_kwargs: dict, metadata: dict, where: str) -> Question:
        if not visuals:
            return Question(context)
        visuals = [read_image(v, where) if isinstance(v, str) and is_picture(v) else v for v in visuals]
        paths = [v for v in visuals if isinstance(v, str)]
        if paths and len(paths) < len(visuals):
            raise UnsupportedVisual(f"{where}: images and videos in one document are not supported.")
        if not paths:
            return self._image_question(context, visuals)
        if "video" not in self.entry.modalities:
            raise UnsupportedVisual(f"{where}: {self.entry.name} reads images, not videos. {self.entry.limits}".strip())
        tensors = [self._video(files, where, metadata) for files in videos_of(paths)]
        text = self.model.question_text(context, "video", len(tensors), **self.steps)
        return Question(text, [self.model.to_model(t) for t in tensors], "video")

    def _image_question(self, context: str, images: list[Any]) -> Question:
        pixels = self.model.to_model(self.model.image_inputs(images, self.image_processor, **self.steps))
        text = self.model.question_text(context, "image", len(images), **self.steps)
        plain = isinstance(pixels, Tensor) and pixels.ndim == 4
        return Question(
            text, pixels if plain else list(pixels), "plain" if plain else "image", [i.size for i in images]
        )

    def _video(self, files: list[str], where: str, metadata: dict) -> Tensor:
        """The frames of one video, as the model takes them."""
        return self.model.video_inputs(self._frames(files, where, metadata), self.image_processor, **self.steps)

    def _frames(self, files: list[str], where: str, metadata: dict) -> np.ndarray:
        count, pictures = self.args.values["max_frames_num"], frame_files(files)
        if pictures is not None:
            indices = self.model.frame_indices(len(pictures), FRAME_FOLDER_FPS, **self.steps)
            chosen = pictures if indices is None else [pictures[index] for index in indices]
            return read_frames(chosen, count if indices is None else len(chosen), where)[0]
        how: dict[str, Any] = {key: metadata[key] for key in ("sampler", "question") if "sampler" in metadata}
        how |= {"num_frames": count, "backend": self.args.video_decode_backend}
        return read_video(files[0], where, choose=self._rule(), **how).frames

    def _rule(self) -> Any:
        """The model's own choice of frames for ``load_video``; None where it has none."""
        if self.model.frame_indices(1, 1.0, **self.steps) is None:
            return None

        def choose(total: int, rate: float) -> FrameSample:
            indices = self.model.frame_indices(total, rate, **self.steps)
            return FrameSample(indices, [index / rate for index in indices], total / rate)

        return choose

    def _images(self, questions: list[Question]) -> dict[str, Any]:
        return {**super()._images(questions), **self._call_arguments()}

    def prompt(self, text: str | list[str], answer: str | None = None) -> str:
        return self.model.whole_prompt(super().prompt(text, answer), **self.steps)

    def _ids(self, prompt: str) -> Tensor:
        return self.model.prompt_ids(prompt, self.tokenizer, **self.steps)

    # -- costs -------------------------------------------------------------------------------------------------------

    def _costs_of(self, call: RequestRecord, *measured: Any) -> list[Costs]:
        """With the work of the architecture's own modules, where its class counts it."""
        costs = super()._costs_of(call, *measured)
        beams = max(len(call.samples) // max(len(costs), 1), 1)
        for cost, sample in zip(costs, call.samples[::beams], strict=False):
            macs = self.model.own_macs(sample, **self._call_arguments())
            cost.extra[ARCHITECTURE_WORK] = None if macs is None else macs / 1e12
        return costs


def class_of(family: str) -> type[TrainedArchitecture]:
    """The class for the model id ``family``.

    Raises:
        MethodError: no trained architecture has this id.
    """
    entry = architecture_named(family)
    if entry is None:
        raise MethodError(f"{family} is no trained architecture.")
    return type(entry.name, (TrainedArchitecture,), {"family": family, "entry": entry, "__module__": __name__})
