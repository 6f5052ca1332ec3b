"""What a prompt says, sent along with its images and videos to methods that look at it.

vLLM encodes images without their prompt and keeps them for other prompts. Where a method asks for the prompt's text,
the front end writes what it needs of it next to every image and video, and makes it part of the hash under which they
are kept: the same image under another question is another image.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from accelerate_methods.hosts.questions import PromptText, prompt_texts, question_in, signals_of_prompts, word_ids
from accelerate_methods.hosts.text_tower import TextTower
from accelerate_methods.hosts.vllm.served import Served
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.signals import OF_PROMPT, OF_QUESTION

#: processor's argument of a request that holds it; requests cannot set it themselves
WORDS = "visual_compression_words"
#: beginning of the keyword argument under which a worker finds it, as bytes
WORDS_FIELD = "accelerate_words_"


def looks_at_prompt(method: Served) -> bool:
    return method.needs_question or bool(method.signals & (OF_PROMPT | OF_QUESTION))


@dataclasses.dataclass(frozen=True)
class PromptWords:
    """The text of a prompt.

    Attributes:
        text: ids of all of it; question: what is asked; words: ids of the question's words, as the method has them.
    """

    text: tuple[int, ...]
    question: str
    words: tuple[int, ...]

    @classmethod
    def of(
        cls,
        method: Served,
        wanted: frozenset[str],
        ids: Sequence[int],
        media: Iterable[int],
        around: Sequence[int],
        tokenizer: Any,
    ) -> PromptWords:
        """
        Args:
            wanted: the signals that the method gets.
            ids: the prompt as it came, one placeholder per image and video; media: ids of placeholders.
            around: ids of words that are put around images and videos.
        """
        every = torch.as_tensor(list(ids))
        visual = torch.isin(every, torch.tensor(sorted(media)))
        question = question_in(every, visual, tokenizer)
        words = word_ids(method.words(question), tokenizer) if "question_rows" in wanted else []
        return cls((*every[~visual].tolist(), *around), question, tuple(words))

    def check(self, method: Served, wanted: frozenset[str]) -> None:
        """
        Raises:
            MethodError: the method looks at the question, and there is none.
        """
        if not self.question and (method.needs_question or wanted & OF_QUESTION):
            raise MethodError(f"{method.name} looks at the question, and this prompt says nothing beside its images.")

    def written(self) -> str:
        return json.dumps(dataclasses.astuple(self))

    @classmethod
    def read(cls, text: str | bytes) -> PromptWords:
        ids, question, words = json.loads(text)
        return cls(tuple(ids), question, tuple(words))

    @torch.no_grad()
    def told(self, wanted: frozenset[str], embed: Callable[[Tensor], Tensor], tower: TextTower | None) -> PromptText:
        """What a method is told.

        Args:
            wanted: the signals that it gets.
            embed: ids [n] -> [n, D], the language model's embeddings; tower: gives signal "text_embeds", or None.
        """
        of_prompt: dict[str, Tensor] = {}
        if wanted & OF_PROMPT:
            rows = embed(torch.tensor(self.text))[None]
            text = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
            of_prompt = signals_of_prompts(rows, text, wanted)
        read = (lambda question: embed(torch.tensor(self.words))) if "question_rows" in wanted else None
        return prompt_texts([self.question], of_prompt, tower if "text_embeds" in wanted else None, 1, read)[0]
