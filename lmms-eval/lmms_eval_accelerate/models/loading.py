"""Weights for a run: loaded, or taken over from the run before if nothing that loading depends on has changed."""

from __future__ import annotations

import dataclasses
from typing import Any

from loguru import logger

from accelerate_methods import accelerate
from accelerate_methods.attach import Acceleration
from accelerate_methods.errors import MethodError
from llava.model.builder import load_pretrained_model
from lmms_eval_accelerate import session
from lmms_eval_accelerate.arguments import Arguments
from lmms_eval_accelerate.placement import Placement

#: arguments that decide what is loaded and where it lies
_LOADING = ("pretrained", "model_base", "model_name", "device_map", "dtype", "attn_implementation")


@dataclasses.dataclass
class Loaded:
    """A model without any method, and what belongs to it."""

    tokenizer: Any
    model: Any
    image_processor: Any
    max_length: int
    image_aspect_ratio: str | None


def load(args: Arguments, placement: Placement, changes: dict[str, Any]) -> Loaded:
    """The model of ``args`` in evaluation mode, without a method.

    Args:
        placement: the device, or the devices, of this process.
        changes: config keys that the family sets before the model is built.
    """
    here = session.current()
    key = {**{name: args.values[name] for name in _LOADING}, "placement": placement, "changes": changes}
    if here.weights is not None and here.weights[0] == key:
        loaded = here.weights[1]
        # a task may have set it where the checkpoint leaves it open
        loaded.model.config.image_aspect_ratio = loaded.image_aspect_ratio
        logger.info("weights of the run before are used again")
        return loaded
    here.weights = None  # one model at a time: two of them may not fit
    loaded = _load(args, placement, changes)
    if here.share:
        here.weights = (key, loaded)
    return loaded


def _load(args: Arguments, placement: Placement, changes: dict[str, Any]) -> Loaded:
    if args.device_map is not None and placement.device_map is not None:
        raise MethodError("gpus_per_model says how the model is spread; leave device_map out.")
    device_map = args.device_map or placement.device_map
    dtype = args.dtype
    if dtype == "auto":
        dtype = "float16" if placement.device.startswith("cuda") else "float32"
    more = {} if placement.max_memory is None else {"max_memory": placement.max_memory}
    tokenizer, model, processor, max_length = load_pretrained_model(
        str(args.pretrained),
        args.model_base,
        args.model_name,
        device_map=device_map or placement.device,
        torch_dtype=dtype,
        attn_implementation=args.attn_implementation,
        overwrite_config=changes,
        **more,
    )
    model.eval()
    if device_map is None:
        model.to(placement.device)
    return Loaded(tokenizer, model, processor, max_length, getattr(model.config, "image_aspect_ratio", None))


def attach(loaded: Loaded, args: Arguments) -> Acceleration | None:
    """The run's methods on the model; None for a dense run."""
    return accelerate(loaded.model, args.pipeline) if args.pipeline.methods else None
