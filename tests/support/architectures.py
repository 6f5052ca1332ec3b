"""Tiny checkpoints of trained architectures, complete with what a run needs: tokenizer, tower, paths.

Golden checkpoints name their towers as the official ones do and some bring no tokenizer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llava.model.checkpoint import load_config
from llava.tokenization import load_tokenizer
from tests.support.paths import CHECKPOINTS, GOLDEN
from tests.support.texts import tiny_text_tokenizer

_LLAVA = CHECKPOINTS / "tiny-llava-1.5"
_ONEVISION = CHECKPOINTS / "tiny-llava-onevision"


def _mqt(folder: Path) -> None:
    _with_llavas_tokenizer_and_tower(CHECKPOINTS / "tiny-mqt-llava", folder)


def _fastvlm(folder: Path) -> None:
    _with_qwens_tokenizer(GOLDEN / "fastvlm" / "tiny_fastvlm", folder)


def _video_xl(folder: Path) -> None:
    _with_qwens_tokenizer(GOLDEN / "video_xl" / "tiny_videoxl", folder)


def _llava_mini(folder: Path) -> None:
    """With a chat template, which its prompts are made by."""
    _with_llavas_tokenizer_and_tower(CHECKPOINTS / "tiny-llava-mini", folder)
    path = folder / "tokenizer_config.json"
    turns = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": turns}))


def _voco_llama(folder: Path) -> None:
    shutil.copytree(CHECKPOINTS / "tiny-voco-llama", folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text()) | {"mm_vision_tower": str(_LLAVA / "vision_tower")}
    (folder / "config.json").write_text(json.dumps(config))


def _llama_vid(folder: Path) -> None:
    """With Vicuna's tokenizer; tower and BERT's vocabulary are in the golden checkpoint."""
    shutil.copytree(CHECKPOINTS / "tiny-llama-vid", folder, dirs_exist_ok=True)
    for path in _LLAVA.glob("*token*"):
        shutil.copy(path, folder)
    config = json.loads((folder / "config.json").read_text()) | {"eva_heads": 4}
    (folder / "config.json").write_text(json.dumps(config))


def _flashsloth(folder: Path) -> None:
    _with_qwens_tokenizer(GOLDEN / "flashsloth" / "tiny_flashsloth", folder)


def _hicom(folder: Path) -> None:
    _with_qwens_tokenizer(GOLDEN / "hicom" / "tiny_hicom", folder)
    tiny_text_tokenizer(folder / "vision_tower")


def _tg_llava(folder: Path) -> None:
    _with_qwens_tokenizer(GOLDEN / "tg_llava" / "tiny_tgllava_qwen2", folder)
    tiny_text_tokenizer(folder / "vision_tower", begin="<s>")


#: file of the architecture -> what writes its checkpoint into an empty folder
TINY: dict[str, Callable[[Path], None]] = {
    "mqt": _mqt,
    "fastvlm": _fastvlm,
    "video_xl": _video_xl,
    "llava_mini": _llava_mini,
    "voco_llama": _voco_llama,
    "llama_vid": _llama_vid,
    "flashsloth": _flashsloth,
    "hicom": _hicom,
    "tg_llava": _tg_llava,
}


def tiny_checkpoint(file: str, folder: Path) -> Path:
    """``folder`` with a runnable checkpoint of the architecture ``file``."""
    folder.mkdir(parents=True, exist_ok=True)
    TINY[file](folder)
    return folder


def from_checkpoint(
    model_class: Any, folder: Path, dtype: torch.dtype = torch.float32, how: dict[str, Any] | None = None, **keys: Any
) -> Any:
    """The model in ``folder`` with other config keys, and its tower loaded; ``how``: arguments of from_pretrained."""
    config = load_config(model_class.config_class, folder)
    for key, value in keys.items():
        setattr(config, key, value)
    model = model_class.from_pretrained(folder, config=config, dtype=dtype, **(how or {})).eval()
    model.get_vision_tower().load_model()
    return model


def changed(folder: Path, target: Path, weights: dict[str, torch.Tensor] | None = None, **keys: Any) -> Path:
    """A copy of the checkpoint in ``target`` with other weights and config keys."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text("utf-8")) | keys
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if weights is not None:
        save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


def _with_llavas_tokenizer_and_tower(source: Path, folder: Path) -> None:
    """Vicuna's tokenizer and CLIP tower of the tiny LLaVA-1.5, whose vocabulary has the same 1000 words."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    for path in _LLAVA.glob("*token*"):
        shutil.copy(path, folder)
    config = json.loads((folder / "config.json").read_text())
    config["mm_vision_tower"] = str(_LLAVA / "vision_tower")
    (folder / "config.json").write_text(json.dumps(config))


def _with_qwens_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer of the tiny OneVision, with rows for all of its words: those that are new do not differ."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(_ONEVISION / name, folder)
    words = len(load_tokenizer(folder, None))
    weights = load_file(folder / "model.safetensors")
    for name in {"model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"} & set(weights):
        own = weights[name][:words]
        weights[name] = torch.cat([own, own[:1].expand(words - len(own), *own.shape[1:])])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text("utf-8")) | {"vocab_size": words}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
