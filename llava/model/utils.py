"""Checkpoints of the first LLaVA (v0), whose config says that they are a plain LLaMA."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from llava.model.checkpoint import CheckpointError, find_file


def auto_upgrade(config: str | os.PathLike[str]) -> None:
    """Let the config.json of a v0 checkpoint say that it is a LLaVA; anything else stays as it is.

    A v0 checkpoint is one whose path has "llava" in it while its config says ``model_type: llama``. The file is changed
    only after a "y" on the terminal.

    Args:
        config: folder or hub id of the checkpoint.

    Raises:
        CheckpointError: there is nobody to ask, the answer was no, or the checkpoint is not a local folder.
    """
    found = find_file(config, "config.json")
    if found is None:
        raise CheckpointError(f"{str(config)!r} is not a checkpoint: it has no config.json.")
    settings = json.loads(found.read_text(encoding="utf-8"))
    if "llava" not in str(config).lower() or settings.get("model_type") != "llama":
        return
    change = {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}
    advice = f"{found} is of LLaVA v0; this code needs {json.dumps(change)[1:-1]} in it"
    if not Path(config).is_dir():
        raise CheckpointError(f"{advice}. Download the checkpoint to a folder of yours and change it there.")
    if not sys.stdin.isatty():
        raise CheckpointError(f"{advice}. Change it, or run this on a terminal to be asked.")
    if input(f"{advice}. Older code will then not read it. Change it? [y/N] ").strip().lower() not in ("y", "yes"):
        raise CheckpointError(f"{advice}; it was left as it is.")
    found.write_text(json.dumps({**settings, **change}, indent=2) + "\n", encoding="utf-8")
