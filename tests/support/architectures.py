"""Tiny checkpoints of trained architectures, complete with what a run needs: tokenizer, tower, paths.

Golden checkpoints name their towers as the official ones do and some bring no tokenizer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.support.paths import CHECKPOINTS

_LLAVA = CHECKPOINTS / "tiny-llava-1.5"


def _mqt(folder: Path) -> None:
    _with_llavas_tokenizer_and_tower(CHECKPOINTS / "tiny-mqt-llava", folder)


#: file of the architecture -> what writes its checkpoint into an empty folder
TINY: dict[str, Callable[[Path], None]] = {"mqt": _mqt}


def tiny_checkpoint(file: str, folder: Path) -> Path:
    """``folder`` with a runnable checkpoint of the architecture ``file``."""
    folder.mkdir(parents=True, exist_ok=True)
    TINY[file](folder)
    return folder


def _with_llavas_tokenizer_and_tower(source: Path, folder: Path) -> None:
    """Vicuna's tokenizer and CLIP tower of the tiny LLaVA-1.5, whose vocabulary has the same 1000 words."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    for path in _LLAVA.glob("*token*"):
        shutil.copy(path, folder)
    config = json.loads((folder / "config.json").read_text())
    config["mm_vision_tower"] = str(_LLAVA / "vision_tower")
    (folder / "config.json").write_text(json.dumps(config))
