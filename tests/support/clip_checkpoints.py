"""Tiny CLIP checkpoints with both halves, as folders: a text tower and a tokenizer beside a tiny vision tower."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from tests.support.paths import CHECKPOINTS, GOLDEN

TEXT_WEIGHTS = GOLDEN / "cdpruner" / "tiny_clip_text.safetensors"
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;?!'()-"


def text_parts(path: Path = TEXT_WEIGHTS) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """Text config, and weights under the names of a full CLIP checkpoint."""
    with safe_open(path, framework="pt") as source:
        config = json.loads(source.metadata()["config"])
        weights = {key.removeprefix("text_tower."): source.get_tensor(key) for key in source.keys()}
    return config, weights


@functools.cache
def clip_folder(checkpoint: str | Path, text_weights: Path = TEXT_WEIGHTS) -> Path:
    """A folder with the vision tower of a tiny LLaVA checkpoint, the tiny text tower and a tokenizer, as on the hub.

    Args:
        checkpoint: name of one of the tests' own, or the folder of another.
    """
    folder = Path(tempfile.mkdtemp(prefix="tiny_clip_"))
    tower = CHECKPOINTS / checkpoint / "vision_tower"
    text, weights = text_parts(text_weights)
    config = json.loads((tower / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "clip", "text_config": text, "projection_dim": text["projection_dim"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({**load_file(tower / "model.safetensors"), **weights}, folder / "model.safetensors", {"format": "pt"})
    shutil.copy(tower / "preprocessor_config.json", folder)
    symbols = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS)]
    vocabulary = {symbol: number for number, symbol in enumerate(symbols, start=1)}
    vocabulary |= {"<|startoftext|>": 498, "<|endoftext|>": 499}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    return folder
