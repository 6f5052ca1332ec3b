"""Text halves of CLIP and SigLIP as parts of a model, for architectures whose checkpoints hold them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BatchEncoding, CLIPTextConfig, CLIPTextModel, SiglipTextConfig, SiglipTextModel

from accelerate_methods.hosts.tower_files import (
    TowerError,
    official_name,
    text_config,
    tower_folder,
    weight_files,
    weights_named,
)
from accelerate_methods.stages.errors import MethodError, one_line

_PREFIX = "text_model."
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "vocab.json", "tokenizer_config.json")


def build_text_model(kind: str, name: str, checkpoint: str | None) -> nn.Module:
    """The text half of the tower ``name`` without weights; ``kind``: "clip" or "siglip".

    Raises:
        TowerError: there is none, or one of the other kind.
    """
    config_class, model_class = {
        "clip": (CLIPTextConfig, CLIPTextModel),
        "siglip": (SiglipTextConfig, SiglipTextModel),
    }[kind]
    raw = text_config(name, checkpoint)
    found = raw.get("model_type", f"{kind}_text_model")
    if found != f"{kind}_text_model":
        raise TowerError(f"text tower {name!r} is of model_type {found!r}; the one of {kind} is needed here.")
    if kind == "siglip":  # reads neither, and transformers warns of its own defaults, which are beyond the vocabulary
        raw = {"bos_token_id": None, "eos_token_id": None, **raw}
    config = config_class.from_dict(raw)
    config._attn_implementation = "sdpa"
    return model_class(config).requires_grad_(False)


def fill_text_model(model: nn.Module, name: str, checkpoint: str | None) -> None:
    """Weights from the tower's own files.

    Raises:
        TowerError: they are not there, or not all of them.
    """
    weights = weights_named(weight_files(name, checkpoint), (_PREFIX,))
    weights = {key.removeprefix(_PREFIX): value for key, value in weights.items()}
    wanted = model.state_dict()
    missing = sorted(set(wanted) - set(weights))
    if missing:
        raise TowerError(f"the files of text tower {name!r} lack {len(missing)} weights: {missing[0]} ...")
    model.load_state_dict({key: weights[key] for key in wanted}, strict=True)


def text_macs(config: Any, tokens: int) -> int:
    """Multiply-accumulates of a text model for one text of so many tokens."""
    width = config.hidden_size
    layer = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * config.intermediate_size
    return config.num_hidden_layers * layer


class TextTokens:
    """The tokenizer of a text tower; its files are looked for when the first text is read.

    Args:
        name, checkpoint: of the tower, as in ``hosts.tower_files``; limit: positions that it has.
        asker: name of the architecture, and what to give in the place of texts; for errors.
    """

    def __init__(self, name: str, checkpoint: str | None, limit: int, asker: tuple[str, str]):
        self.name, self.checkpoint, self.limit, self.asker = name, checkpoint, limit, asker
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            source = _tokenizer_source(self.name, self.checkpoint)
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(source)
            except Exception as error:  # files that are missing or damaged, and packages
                who, instead = self.asker
                raise MethodError(
                    f"{who} reads the question with the tokenizer of {self.name!r}, which cannot be loaded from "
                    f"{source!r} ({one_line(error)}). Put its files into the checkpoint's folder vision_tower, or give "
                    f"{instead}."
                ) from error
        return self._tokenizer

    def make_up(self) -> None:
        """Ids for as many tokens as a text has words, in place of a tokenizer's; for models of random weights."""
        self._tokenizer = _MadeUpTokens()

    def padded(self, texts: Sequence[str]) -> Tensor:
        """[B, limit] ids, cut and padded to all positions."""
        found = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.limit, return_tensors="pt"
        )
        return found.input_ids

    def one_by_one(self, texts: Sequence[str]) -> list[Tensor]:
        """[L] ids of each, cut where the positions end."""
        return [torch.tensor(self.tokenizer(text, truncation=True, max_length=self.limit).input_ids) for text in texts]


class _MadeUpTokens:
    """Called as a tokenizer is: ids from 2 on, the largest one at the end; 1 is padding."""

    def __call__(self, texts: str | Sequence[str], max_length: int, padding: str = "", **how: Any) -> BatchEncoding:
        counts = [min(len(text.split()) + 2, max_length) for text in ([texts] if isinstance(texts, str) else texts)]
        ids = [list(range(2, count + 2)) for count in counts]
        if isinstance(texts, str):
            return BatchEncoding({"input_ids": ids[0]})
        padded = [row + [1] * (max_length - len(row)) for row in ids]
        return BatchEncoding({"input_ids": torch.tensor(padded)})


def _tokenizer_source(name: str, checkpoint: str | None) -> str:
    folder = tower_folder(name, checkpoint)
    if folder is not None and any((Path(folder) / file).is_file() for file in _TOKENIZER_FILES):
        return str(folder)
    return official_name(name)
