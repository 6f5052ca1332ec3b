"""From a question with pictures or a video to what ``generate`` takes: the steps in which models of the tree differ.

Whoever asks a model (the lmms-eval plugin, ``llava.eval``, ``llava.serve``, pictures) goes through these methods. What
stands here is LLaVA's; a trained architecture overrides the steps in which its official code does something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from accelerate_methods.engine.recording import SampleRecord
from accelerate_methods.hosts.questions import plain_question
from accelerate_methods.registry.architectures import Architecture
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


class MediaInputs:
    """A part of every model class of the tree. ``arguments``: those of the architecture's entry that ``generate`` does
    not take itself, by name.

    Attributes:
        about: the entry of a trained architecture in ``accelerate_methods.registry.architectures``; None: plain LLaVA.
        tokens_have_places: whether each visual token is of one place in the picture, where pictures show it;
            tokens of queries are drawn in the order in which the language model reads them.
    """

    about: ClassVar[Architecture | None] = None
    tokens_have_places: ClassVar[bool] = True

    @property
    def prompt_template(self) -> str | None:
        """Conversation of a trained architecture's prompts, a name in ``llava.conversation``, unless the user says
        another; None for plain LLaVA, whose callers tell it by other things."""
        return None if self.about is None else self.about.template

    def image_inputs(self, images: Sequence[Image.Image], image_processor: Any, **arguments: Any) -> Any:
        """Pictures as ``images=`` takes them: a tensor [N, 3, S, S] of plain images, or a list of [V, 3, S, S] tensors,
        in float32 on the CPU."""
        from llava.mm_utils import process_images

        return process_images(images, image_processor, self.config)

    def video_inputs(self, frames: np.ndarray, image_processor: Any, **arguments: Any) -> Tensor:
        """The chosen frames of one video, uint8 [F, H, W, 3], as one item of ``images=``, in float32 on the CPU."""
        return image_processor.preprocess(frames, return_tensors="pt")["pixel_values"]

    def frame_indices(self, total: int, rate: float, **arguments: Any) -> list[int] | None:
        """Which of the ``total`` frames of a video of ``rate`` frames per second are looked at.

        None: evenly spaced ones, ``max_frames_num`` of ``arguments`` (see ``llava.frame_choice``).
        """
        return None

    def question_text(self, question: str, kind: str, count: int, **arguments: Any) -> str:
        """What the user says: the question with a placeholder for each of ``count`` images or videos.

        Args:
            kind: "image" or "video".
        """
        if DEFAULT_IMAGE_TOKEN in question:
            return question
        token = DEFAULT_IMAGE_TOKEN
        if getattr(self.config, "mm_use_im_start_end", False):
            token = DEFAULT_IM_START_TOKEN + token + DEFAULT_IM_END_TOKEN
        return f"{token}\n" * count + question

    def asked_text(self, question: Any) -> str:
        """What ``questions=`` says of a question (a text, or the turns of a chat): it without placeholders and without
        what evaluations put behind it."""
        return plain_question(question)

    def whole_prompt(self, prompt: str, **arguments: Any) -> str:
        """The finished prompt of a conversation, before it is tokenised."""
        return prompt

    def prompt_ids(self, prompt: str, tokenizer: Any, **arguments: Any) -> Tensor:
        """[T] ids of a finished prompt, with the placeholders' id (-200) where a visual stands."""
        from llava.mm_utils import tokenizer_image_token

        return tokenizer_image_token(prompt, tokenizer, return_tensors="pt")

    def made_up(self) -> None:
        """What a model of random weights needs beside them, where a checkpoint has it in other files; for the bench."""

    def made_up_ids(self, ids: Tensor) -> Tensor:
        """[n] ids of a made-up prompt with one placeholder, as the architecture writes its prompts; for the bench."""
        return ids

    def own_macs(self, sample: SampleRecord, **call: Any) -> int | None:
        """Multiply-accumulates of the modules that an architecture has between vision tower and decoder layers, its
        projector among them, for one recorded sample; ``call``: its run parameters that ``generate`` takes.

        None: nobody has counted them, and tables say so. Plain LLaVA's projector is not counted either.
        """
        return None

    def to_model(self, pixels: Any) -> Any:
        """Inputs of :meth:`image_inputs` or :meth:`video_inputs` on the model's device, in its dtype."""
        if isinstance(pixels, (list, tuple)):
            return [self.to_model(part) for part in pixels]
        return pixels.to(device=self.device, dtype=self.dtype if torch.is_floating_point(pixels) else None)
