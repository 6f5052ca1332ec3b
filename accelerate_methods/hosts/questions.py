"""The question of each prompt, for methods that look at it: what the caller says, or what the ids say."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accelerate_methods.engine.devices import moved
from accelerate_methods.ops.select import on_device
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.stages.compress import VisualItem
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.signals import OF_QUESTION

if TYPE_CHECKING:
    from accelerate_methods.hosts.text_tower import TextTower
    from accelerate_methods.stages.views import Views

#: what the official evaluation puts behind questions, and says nothing about the image
POST_PROMPTS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
_PLACEHOLDER = re.compile(r"<image>|<video>|<image_\d+>")
_ROLE = re.compile(r"^\s*(assistant|user|system|human|gpt)\s*:?\s*|\s*(assistant|gpt)\s*:?\s*$", re.IGNORECASE)


def plain_question(text: Any) -> str:
    """What is asked in the user's turn of a prompt: without placeholders and without what evaluations put behind it.

    Of several turns (a list of texts) the last one that the user said.
    """
    if not isinstance(text, str):
        turns = [turn for turn in text if isinstance(turn, str)]
        text = turns[(len(turns) - 1) // 2 * 2] if turns else ""
    text = without_placeholders(text)
    for sentence in POST_PROMPTS:
        text = text.replace(f"\n{sentence}", "").replace(sentence, "")
    return text.strip()


def without_placeholders(text: str) -> str:
    """The text of a user's turn without what stands for images and videos."""
    return _PLACEHOLDER.sub("", text).strip()


def question_in(ids: Tensor, visual: Tensor, tokenizer: Any, plain: bool = True) -> str:
    """The question in the ids [n] of one prompt without padding: its last text behind the last image or video.

    Special tokens end a text, and the names of the speakers are no part of it. If nothing stands behind the image, it
    is the last text before it.

    Args:
        visual: [n] True at the rows of images and videos.
        plain: without what evaluations put behind questions (:func:`plain_question`); else as it is written.
    """
    clean = plain_question if plain else without_placeholders
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    before: list[list[int]] = [[]]
    after: list[list[int]] = [[]]
    last = max((i for i, here in enumerate(visual.tolist()) if here), default=-1)
    for at, (token, here) in enumerate(zip(ids.tolist(), visual.tolist(), strict=True)):
        side = after if at > last else before
        if here or token in special or token < 0:
            side.append([])
        else:
            side[-1].append(token)
    for pieces in (after, before):
        for piece in reversed(pieces):
            text = clean(_ROLE.sub("", tokenizer.decode(piece))) if piece else ""
            if text:
                return text
    return ""


@dataclasses.dataclass
class PromptText:
    """What a method is told of the text of one prompt: the question, and the signals that all its items share."""

    question: str | None
    signals: dict[str, Tensor]

    def tell(self, item: VisualItem | Views) -> None:
        """Give it to an image or video of the prompt, or to the views of an image."""
        for part in (item, getattr(item, "views", None)):
            if part is not None:
                own = moved(self.signals, part.features.device)
                part.question, part.signals = self.question, {**part.signals, **own}


def asks(pipeline: Pipeline, wanted: frozenset[str]) -> bool:
    """Whether a question has to be known for every prompt; ``wanted``: signals that the methods get."""
    return bool(OF_QUESTION & wanted) or any(method.needs_question for method in pipeline.methods)


def per_prompt(questions: Any, prompts: int) -> list[str] | None:
    """The questions that a caller gave, one for each of ``prompts`` (several of each in a beam search).

    Raises:
        MethodError: not as many as there are prompts.
    """
    if questions is None:
        return None
    given = [questions] if isinstance(questions, str) else list(questions)
    if not given or prompts % len(given) or not all(isinstance(question, str) for question in given):
        raise MethodError(
            f"questions must be a list of one text per prompt ({prompts}), got "
            f"{len(given)}: {', '.join(type(q).__name__ for q in given[:3])}."
        )
    copies = prompts // len(given)
    return [plain_question(question) for question in given for _ in range(copies)]


def questions_of(
    pipeline: Pipeline,
    wanted: frozenset[str],
    given: Any,
    prompts: int,
    tokenizer: Any,
    read: Callable[[], Iterable[tuple[Tensor, Tensor]]],
) -> list[str] | None:
    """The question of each of ``prompts``: as the caller gave it, or out of the ids; None if nobody needs to know.

    Args:
        given: the caller's, or None; tokenizer: for the ids, or None.
        read: ids and visual rows of each prompt, as :func:`question_in` takes them; called if they are looked at.

    Raises:
        MethodError: nothing says what is asked of a prompt, and a method looks at it.
    """
    said, needed = per_prompt(given, prompts), asks(pipeline, wanted)
    if needed and said is None and tokenizer is not None:
        said = [question_in(ids, visual, tokenizer) for ids, visual in read()]
    if needed and (said is None or not all(said)):
        raise MethodError(
            f"{pipeline.name} looks at the question, and nothing says what it is: give questions=[...], one text per "
            "prompt, to generate or forward, or attach with accelerate(model, method, tokenizer=...)."
        )
    return said


def word_ids(words: Sequence[str], tokenizer: Any) -> list[int]:
    """Ids of the words without special tokens; the first one alone (BOS) where there are no words.

    Each is tokenised by itself. A word of a sentencepiece vocabulary carries its mark of a blank, as behind another
    word; one of a byte-level vocabulary stands at the beginning and carries none.
    """

    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    front = ids_of("a")
    marked = any("\u2581" in token for token in tokenizer.convert_ids_to_tokens(ids_of("a a")))
    found = [id for word in words for id in (ids_of(f"a {word}")[len(front) :] if marked else ids_of(word))]
    return found or [id for id in (tokenizer.bos_token_id,) if id is not None]


def question_reader(
    pipeline: Pipeline, wanted: frozenset[str], tokenizer: Any, table: torch.nn.Module
) -> Callable[[str], Tensor] | None:
    """What gives signal "question_rows" of a question; None where it is not ``wanted``.

    Raises:
        MethodError: there is no tokenizer.
    """
    if "question_rows" not in wanted:
        return None
    method = next(method for method in pipeline.methods if "question_rows" in method.signals)
    if tokenizer is None:
        raise MethodError(
            f"{method.name} reads the question in the language model's own words, for which the tokenizer is needed: "
            "accelerate(model, method, tokenizer=...)."
        )

    def read(question: str) -> Tensor:
        ids = torch.tensor(word_ids(method.words(question), tokenizer), dtype=torch.long)
        with torch.no_grad():
            return table(on_device(ids, table.weight.device))

    return read


def prompt_texts(
    questions: Sequence[str] | None,
    of_prompt: Mapping[str, Tensor],
    tower: TextTower | None,
    count: int,
    read: Callable[[str], Tensor] | None = None,
) -> list[PromptText]:
    """One for each of ``count`` prompts.

    Args:
        of_prompt: signals of all prompts (:func:`signals_of_prompts`).
        tower: gives signal "text_embeds", or None. Prompts with the same question share the work.
        read: gives signal "question_rows" (:func:`question_reader`), or None.
    """
    embeds: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    out = []
    for number in range(count):
        question = None if questions is None else questions[number]
        signals = {name: value[number] for name, value in of_prompt.items()}
        if tower is not None and question is not None:
            if question not in embeds:
                embeds[question] = tower.embed(question)
            signals["text_embeds"] = embeds[question]
        if read is not None and question is not None:
            if question not in rows:
                rows[question] = read(question)
            signals["question_rows"] = rows[question]
        out.append(PromptText(question, signals))
    return out


def signals_of_prompts(embeds: Tensor, text: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
    """Those of "prompt_mean" [B, D] and "prompt_rows" [B, L, D] that are ``wanted``; arguments as below."""
    found = {}
    if "prompt_mean" in wanted:
        found["prompt_mean"] = mean_embedding(embeds, text)
    if "prompt_rows" in wanted:
        found["prompt_rows"] = embeds.detach().masked_fill(~text[..., None], 0)
    return found


def mean_embedding(embeds: Tensor, text: Tensor) -> Tensor:
    """[B, D] mean over the rows of ``embeds`` [B, L, D] where ``text`` [B, L] says; float32, zeros without any."""
    weight = text.float()
    total = weight[:, None] @ embeds.masked_fill(~text[..., None], 0).float()
    return total[:, 0] / weight.sum(1, keepdim=True).clamp(min=1)
