"""Checkpoints that hold only a part of the model: a projector, or a LoRA with the non-LoRA weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from llava.model.checkpoint import CheckpointError, find_file


def load_on_base(model_class: Any, path: str, base: str, config: Any, load: dict[str, Any]) -> Any:
    """Base LLM plus what ``path`` holds: ``mm_projector.bin``, or a PEFT adapter with ``non_lora_trainables.bin``.

    An architecture may name several modules that training saves alone (``adapter_parts``): then ``<part>.bin`` of each.
    """
    adapter = find_file(path, "adapter_config.json")
    parts = getattr(model_class, "adapter_parts", ("mm_projector",))
    wanted = ["non_lora_trainables.bin"] if adapter else [f"{part}.bin" for part in parts]
    files = [find_file(path, file) for file in wanted]
    if None in files:
        looked = wanted[files.index(None)] + ("" if adapter else " (or adapter_config.json of a LoRA)")
        raise CheckpointError(f"{path!r} has no {looked}, so there is nothing to put on model_base {base!r}.")
    if (Path(path) / "vision_tower").is_dir():  # otherwise the base's, to which from_pretrained points the config
        config.tower_checkpoint = path
    model = model_class.from_pretrained(
        base,
        config=config,
        allow_missing=(*(f"model.{part}." for part in parts), "model.image_newline"),
        **load,
    )
    for file in files:
        weights = {_clean(k): v for k, v in torch.load(file, map_location="cpu", weights_only=True).items()}
        unknown = model.load_state_dict(weights, strict=False).unexpected_keys
        unknown = [name for name in unknown if not name.startswith(model_class.unread_weights)]
        if unknown:
            raise CheckpointError(
                f"{file}: {len(unknown)} weights do not belong to {model_class.__name__} (first: {unknown[0]})."
            )
    if adapter is not None:
        if importlib.util.find_spec("peft") is None:
            raise ImportError("LoRA checkpoints need peft: pip install peft")
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, path).merge_and_unload()
    return model


def _clean(name: str) -> str:
    name = name.removeprefix("base_model.")
    return name.removeprefix("model.") if name.startswith("model.model.") else name
