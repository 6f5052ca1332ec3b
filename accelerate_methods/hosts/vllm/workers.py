"""What models under methods share in the workers: the methods that came with images and videos, and their batches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from accelerate_methods.hosts.text_tower import TextTower
from accelerate_methods.hosts.vllm.processing import FIELD, as_bytes
from accelerate_methods.hosts.vllm.prompts import WORDS_FIELD, PromptWords
from accelerate_methods.hosts.vllm.served import Served, given_signals
from accelerate_methods.hosts.vllm.spec import read

#: environment variable: views (crops of images, frames of videos) that a vision tower is given at a time
VIEWS_VARIABLE = "ACCELERATE_METHODS_VLLM_VIEWS"
_VIEWS = 64


def most_views() -> int:
    return max(1, int(os.environ.get(VIEWS_VARIABLE, _VIEWS)))


class MethodWorker:
    """Mixin in front of a model of vLLM."""

    def _available(self, method: Served) -> frozenset[str]:
        """Signals that the model can give to a method."""
        raise NotImplementedError

    def _text_tower(self, method: Served) -> TextTower | None:
        """What gives signal "text_embeds", if the method gets it."""
        return None

    def _wanted(self, methods: Iterable[Served | None]) -> frozenset[str]:
        """Signals that these methods get."""
        return frozenset().union(*(given_signals(m, self._available(m)) for m in methods if m is not None))

    def _taken(self, kwargs: dict[str, Any]) -> tuple[str, list[Served] | None]:
        """Takes the methods of the images or videos (vLLM gives one kind at a time) out of an encoder's arguments.

        Returns:
            the kind, and a method for each, which knows its prompt if it looks at it; None where no methods came.
        """
        for modality in ("image", "video"):
            texts, words = kwargs.pop(FIELD + modality, None), kwargs.pop(WORDS_FIELD + modality, None)
            if texts is None:
                continue
            methods = [read(as_bytes(text)) for text in texts]
            if words is not None:
                methods = [self._told(*pair) for pair in zip(methods, words, strict=True)]
            return modality, methods
        return "", None

    def _told(self, method: Served, words: Tensor) -> Served:
        language, like = self.get_language_model(), next(self.parameters())

        def embed(ids: Tensor) -> Tensor:
            return language.embed_input_ids(ids.to(like.device))

        return method.told(
            PromptWords.read(as_bytes(words)).told(self._wanted([method]), embed, self._text_tower(method))
        )


def groups(views: Sequence[int], most: int) -> list[list[int]]:
    """Neighbouring items that are encoded together: at most ``most`` views, or one item with more."""
    out: list[list[int]] = []
    total = 0
    for index, count in enumerate(views):
        if not out or total + count > most:
            out.append([])
            total = 0
        out[-1].append(index)
        total += count
    return out
