"""Weights for a run: loaded, or taken over from the run before if nothing that loading depends on has changed."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import torch
from loguru import logger

from accelerate_methods.stages.errors import MethodError
from lmms_eval_accelerate import session
from lmms_eval_accelerate.models.arguments import Arguments
from lmms_eval_accelerate.models.placement import Placement, remeasured

#: arguments that decide what is loaded and where it lies
_LOADING = ("pretrained", "device_map", "dtype", "attn_implementation")
#: parameters below which an operation is so short that handing it to many threads takes longer than doing it
_SMALL = 50_000_000
_THREADS_OF_SMALL = 4


@dataclasses.dataclass
class Loaded:
    """A model without any method, and what belongs to it."""

    model: Any
    tokenizer: Any
    processor: Any
    more: dict[str, Any] = dataclasses.field(default_factory=dict)


#: (dtype, device map, bytes of weights per GPU) -> the model; see ``Accelerated._load_weights``
Loader = Callable[[str, Any, "dict[int, int] | None"], Loaded]


def load(args: Arguments, placement: Placement, loader: Loader, more: dict[str, Any]) -> Loaded:
    """The model of ``args`` in evaluation mode, without a method.

    Args:
        placement: the device, or the devices, of this process.
        more: what the result of ``loader`` depends on beside the common arguments.
    """
    here = session.current()
    key = {**{name: args.values[name] for name in _LOADING}, "family": args.family, "placement": placement, **more}
    if here.weights is not None and here.weights[0] == key:
        logger.info("weights of the run before are used again")
        return here.weights[1]
    if here.weights is not None:
        here.weights = None  # one model at a time: two of them may not fit
        gc.collect()
        torch.cuda.empty_cache()
    loaded = _load(args, remeasured(placement), loader)  # what is free now, without the weights that just went
    if here.share:
        here.weights = (key, loaded)
    return loaded


def _load(args: Arguments, placement: Placement, loader: Loader) -> Loaded:
    if args.device_map is not None and placement.device_map is not None:
        raise MethodError("gpus_per_model says how the model is spread; leave device_map out.")
    device_map = args.device_map or placement.device_map
    dtype = args.dtype
    if dtype == "auto" and not placement.device.startswith("cuda"):
        dtype = "float32"
    loaded = loader(dtype, device_map, placement.max_memory)
    loaded.model.eval()
    if device_map is None and not getattr(loaded.model, "hf_quantizer", None):  # such a model stays where it was put
        loaded.model.to(placement.device)
    if placement.device == "cpu":
        _use_few_threads(loaded.model)
    return loaded


def _use_few_threads(model: Any) -> None:
    """For a small model on a CPU; how many threads a user or a launcher set is never raised."""
    if sum(parameter.numel() for parameter in model.parameters()) < _SMALL:
        torch.set_num_threads(min(torch.get_num_threads(), _THREADS_OF_SMALL))
