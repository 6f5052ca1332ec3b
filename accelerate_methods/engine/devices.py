"""Where the parts of a model compute: one device, or several under accelerate's hooks (``device_map``).

A model larger than a GPU is *dispatched*: its layers lie on several devices, or in CPU memory or on disk, and a hook on
every module moves the inputs (and fetches weights) when the module is called. The weights of an offloaded module are
"meta" tensors between calls, so that their device says nothing about where the module computes. What follows for the
rest of this project: weights are used by calling the module that owns them, and devices are asked for here.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from accelerate_methods.stages.errors import MethodError


def named_device(text: str) -> torch.device:
    """The device that a user names.

    Raises:
        MethodError: there is none of this name on this machine.
    """
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise MethodError(f"unknown device {text!r}; write cpu, cuda or cuda:1.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MethodError(f"device {text}: torch sees {torch.cuda.device_count()} CUDA devices on this machine.")
    return device


def hooked_device(module: nn.Module) -> torch.device | None:
    """The device that accelerate's hook gives this module; None without a hook (it computes where its weights lie)."""
    hook = module.__dict__.get("_hf_hook")
    for part in getattr(hook, "hooks", (hook,)):  # several hooks come wrapped in one
        device = getattr(part, "execution_device", None)
        if device is not None:
            # accelerate counts GPUs by plain numbers
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return None


def computes_on(module: nn.Module) -> torch.device:
    """The device on which a module computes, "cpu" for one that has neither hook nor weights."""
    for part in module.modules():  # hooks may sit on the parts only
        device = hooked_device(part)
        if device is None:
            weight = next(part.parameters(recurse=False), None)
            device = None if weight is None or weight.is_meta else weight.device
        if device is not None:
            return device
    return torch.device("cpu")


def is_offloaded(module: nn.Module) -> bool:
    """Whether the module's own weights lie elsewhere (CPU memory or disk) between calls."""
    hook = module.__dict__.get("_hf_hook")
    return any(getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,)))


def own_weights(module: nn.Module) -> contextlib.AbstractContextManager:
    """Block in which the module's own weights can be read without calling it, offloaded or not."""
    if not is_offloaded(module):
        return contextlib.nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def moved(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor in it on ``device``; dicts, tuples, lists and dataclasses are entered one by one."""
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device)
    if isinstance(value, dict):
        return {key: moved(part, device) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(moved(part, device) for part in value)
    if dataclasses.is_dataclass(value):
        parts = {field.name: moved(getattr(value, field.name), device) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    return value
