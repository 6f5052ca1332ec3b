"""What is asked at each placeholder of a batch, for architectures whose visual tokens depend on the question."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from accelerate_methods.hosts.questions import question_in, without_placeholders
from accelerate_methods.stages.errors import MethodError
from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.splice import Prompts


@dataclasses.dataclass(frozen=True)
class Place:
    """One placeholder, or the dummy image of a training sample without one.

    Attributes:
        sample: which prompt it stands in; item: number of the image or video that is shown there.
        question: with which that is looked at.
    """

    sample: int
    item: int
    question: str


def places_of(
    prompts: Prompts, count: int, tokenizer: Any, who: str, given: Any = None, asked: bool = True
) -> list[Place]:
    """The placeholders of a batch in order, with what is shown and asked there.

    There is an image or video for each, or one for each prompt, which is then shown at all of its placeholders.

    Args:
        count: images and videos; tokenizer: reads the questions out of the prompts where ``prompts.questions`` does not
            say them; who: name of the architecture, for errors.
        given: texts in the place of ``prompts.questions``; asked: False leaves the questions empty.

    Raises:
        ValueError: there are fewer or more images.
        MethodError: the questions do not fit the prompts, or nobody says them.
    """
    per_sample = prompts.on_host[0].sum(1).tolist()
    total, empty = sum(per_sample), per_sample.count(0)
    one_each = count == len(per_sample) and (not empty or prompts.dummies)
    if count != total and prompts.dummies and (one_each or count == total + empty):
        per_sample = [max(1, here) for here in per_sample]  # a dummy image for each sample without placeholder
        total = sum(per_sample)
    if count != total and not one_each:
        raise ValueError(
            f"the prompts hold {total} <image> placeholders but {count} images or videos were given: give one for each "
            "placeholder, or one for each prompt."
        )
    questions = asked_questions(prompts, per_sample, tokenizer, who, given) if asked else [""] * total
    samples = [sample for sample, here in enumerate(per_sample) for _ in range(here)]
    items = range(count) if count == total else samples
    return [Place(*place) for place in zip(samples, items, questions, strict=True)]


def asked_questions(
    prompts: Prompts, per_sample: Sequence[int], tokenizer: Any, who: str, given: Any = None
) -> list[str]:
    """The question at each placeholder; a prompt with one question has the same at all of them.

    Raises:
        MethodError: see :func:`places_of`.
    """
    given = prompts.questions if given is None else given
    if given is None and tokenizer is None:
        raise MethodError(
            f"{who} reads the question, and nothing says what it is: give questions=[...], one text per prompt, to "
            "generate or forward, or load the model with load_pretrained_model, which knows the tokenizer."
        )
    if given is None:
        given = read_questions(prompts, tokenizer)
    given = [given] if isinstance(given, str) else list(given)
    if len(given) != len(per_sample):
        raise MethodError(
            f"questions must be one text, or list of texts, per prompt ({len(per_sample)}), got {len(given)}."
        )
    found: list[str] = []
    for own, here in zip(given, per_sample, strict=True):
        texts = list(own) if isinstance(own, (list, tuple)) else [own]
        if not all(isinstance(text, str) for text in texts) or (here and len(texts) not in (1, here)):
            raise MethodError(
                f"questions of a prompt with {here} placeholders: give one text, or one for each, got {own!r}."
            )
        texts = [without_placeholders(text) for text in texts]
        found += texts * here if len(texts) == 1 else texts[:here]
    return found


def read_questions(prompts: Prompts, tokenizer: Any) -> list[str]:
    """The last question in each prompt, as it is written there."""
    return [
        question_in(row[keep], row[keep] == IMAGE_TOKEN_INDEX, tokenizer, plain=False)
        for row, keep in zip(*prompts.ids_on_host, strict=True)
    ]
