"""The ``<voco>`` token, by which checkpoints are told: their config.json is plain LLaVA's."""

from __future__ import annotations

from pathlib import Path

from llava.tokenization import added_tokens

VOCO = "<voco>"


def voco_id(path: str | Path) -> int | None:
    """The id of ``<voco>`` in the tokenizer of a checkpoint, None if it has none."""
    return added_tokens(path).get(VOCO)
