"""What goes into a model for one document, and what comes out of a likelihood request."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult

from accelerate_methods.engine.long_prompts import LongPromptError
from lmms_eval_accelerate.models.costs import Costs
from lmms_eval_accelerate.models.visuals import without_media


@dataclasses.dataclass
class Question:
    """One document as the model gets it.

    Attributes:
        text: the user's turn, with its placeholders; or several turns [user, assistant, user, ...].
        visuals: "plain": one tensor [N, 3, S, S] of N images without any-resolution layout; otherwise a list with
            a tensor per image or video.
        form: "text", "plain", "image" or "video". One ``generate`` call takes questions of one form, because the
            form of ``images`` decides how the tokens of an image are laid out.
        sizes: (width, height) of the images.
        document: (task, document number) that it came from.
        plain: what is asked, for methods that look at the question.
        source: the same with split and files, in words, for messages.
        thinned: (frames without a method, frames) of each video, where a method wants fewer.
    """

    text: str | list[str]
    visuals: Any = None
    form: str = "text"
    sizes: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    document: tuple[str, Any] | None = None
    plain: str = ""
    source: str = "a prompt of no document"
    thinned: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    @property
    def pictures(self) -> list[Any]:
        """[F, 3, H, W] per image or video, in the order of the prompt, normalised as the model's input."""
        return [image[None] for image in self.visuals] if self.form == "plain" else list(self.visuals)


def asked_of(documents: Any, doc_id: Any, text: str) -> str:
    """The question of a document alone, without the options that its prompt may hold; the prompt's if it has none."""
    try:
        question = without_media(documents, doc_id)["question"]
    except Exception:  # a column of another name, or documents of a task's own kind
        question = None
    return question.strip() if isinstance(question, str) and question.strip() else text


@contextlib.contextmanager
def naming(questions: Sequence[Question]) -> Iterator[None]:
    """An error about a prompt that is too long names its document."""
    try:
        yield
    except LongPromptError as error:
        rows = max(error.batch // len(questions), 1)  # a beam search may have several of each
        sources = dict.fromkeys(questions[number // rows].source for number in error.samples)
        raise LongPromptError(f"{'; '.join(sources)}: {error}", error.samples, error.batch) from error


class Likelihood(GenerationResult):
    """(loss, is_greedy) of a continuation, with its costs.

    lmms-eval 0.7.3 turns a bare tuple into text, and every multiple-choice task then fails on ``"(1.2, False)"``; the
    ``text`` of a ``GenerationResult`` goes through untouched.
    """

    def __init__(self, loss: float, is_greedy: bool, costs: Costs | None = None):
        super().__init__((loss, is_greedy), costs)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.text)
