"""The samples of a calibration: questions about images with their answers, as LLaVA's training data have them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accelerate_methods.stages.errors import MethodError
from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava.mm_utils import process_images, tokenizer_image_token


@dataclasses.dataclass
class Sample:
    """One question with its answer, ready for the model's ``forward``.

    Attributes:
        ids: [1, L]; labels: [1, L], -100 but at the answer.
        media: ``images`` and ``image_sizes``, or nothing.
    """

    ids: Tensor
    labels: Tensor
    media: dict[str, Any] = dataclasses.field(default_factory=dict)

    def given(self) -> dict[str, Any]:
        """Arguments of ``forward``."""
        return {"input_ids": self.ids, "labels": self.labels, **self.media}


def read_entries(path: str | Path, count: int | None = None) -> list[dict[str, Any]]:
    """The first ``count`` entries of a JSON list or of JSON lines.

    An entry has ``conversations`` (LLaVA's training data: the last answer counts, what stands before it is the
    question), or ``question`` and ``answer``; and ``image``, a path, if it is about one.

    Raises:
        MethodError: no such file, an entry without a question and an answer, or a ``count`` of none.
    """
    if count is not None and count < 1:
        raise MethodError(f"{count} samples are too few to judge by; give at least 1.")
    try:
        text = Path(path).read_text(encoding="utf-8")
        entries = json.loads(text) if text.lstrip().startswith("[") else [json.loads(x) for x in text.splitlines() if x]
    except (OSError, ValueError) as error:
        raise MethodError(f"samples {str(path)!r} cannot be read: {error}") from error
    if not entries:
        raise MethodError(f"samples {str(path)!r}: there are none.")
    return [_entry(entry, f"{path}, entry {number}") for number, entry in enumerate(entries[:count])]


def _entry(entry: Any, where: str) -> dict[str, Any]:
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if turns:
        texts = [turn.get("value", "") for turn in turns]
        count = len(texts) // 2 * 2
        if count and all(turn.get("from") in ("gpt", "assistant") for turn in turns[1:count:2]):
            return {"turns": texts[: count - 1], "answer": texts[count - 1], "image": entry.get("image")}
    elif isinstance(entry, dict) and "question" in entry and "answer" in entry:
        return {"turns": [str(entry["question"])], "answer": str(entry["answer"]), "image": entry.get("image")}
    raise MethodError(f"samples {where}: 'conversations' of turns, or 'question' and 'answer', are expected.")


def make_samples(assistant: Any, entries: Sequence[dict[str, Any]], folder: str | Path = ".") -> list[Sample]:
    """Entries as the model gets them.

    Args:
        assistant: the loaded model with its template (``llava.eval.asking.Assistant``).
        folder: where images lie.
    """
    return [_made(assistant, entry, Path(folder)) for entry in entries]


def _made(assistant: Any, entry: dict[str, Any], folder: Path) -> Sample:
    from llava.eval.asking import load_image

    model, turns = assistant.model, list(entry["turns"])
    media: dict[str, Any] = {}
    if entry["image"] is not None:
        image = load_image(folder / str(entry["image"]))
        pixels = process_images([image], assistant.processor, model.config)
        like = {"device": model.device, "dtype": model.dtype}
        pixels = [one.to(**like) for one in pixels] if isinstance(pixels, list) else pixels.to(**like)
        media = {"images": pixels, "image_sizes": [image.size]}
        bare = turns[0].replace(DEFAULT_IMAGE_TOKEN, "").strip()
        turns[0] = assistant.with_images(bare)
    conversation = assistant.conversation()
    for number, text in enumerate([*turns, None]):
        conversation.append_message(conversation.roles[number % 2], text)
    prompt = conversation.get_prompt()
    conversation.messages[-1][1] = entry["answer"]
    whole = conversation.get_prompt()
    ids = tokenizer_image_token(whole, assistant.tokenizer, return_tensors="pt")
    asked = len(tokenizer_image_token(prompt, assistant.tokenizer))
    labels = ids.clone()
    labels[: min(asked, len(ids) - 1)] = IGNORE_INDEX
    return Sample(ids[None].to(model.device), labels[None].to(model.device), media)


def mean_loss(model: Any, samples: Sequence[Sample]) -> Tensor:
    """Mean over the samples of the loss of their answers; one sample at a time."""
    return torch.stack([model(**sample.given()).loss.float() for sample in samples]).mean()
