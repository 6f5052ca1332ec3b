"""Several GPUs, acted on a machine without any: CPU tensors that claim to lie elsewhere, and errors where they meet.

Inside :class:`SeveralDevices` a tensor made on, or moved to, ``cuda:N`` is a :class:`Placed` tensor: its numbers are in
CPU memory and computed by the same kernels as ever, but it says ``cuda:N`` when asked for its device, what is computed
from it is there as well, and an operation on tensors of different devices fails as PyTorch's would.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
_DEVICE = Tensor.device.__get__
_MAY_MIX = {Tensor.copy_, Tensor.to}
_TAKES_CPU_INDEX = {Tensor.__getitem__, Tensor.__setitem__}


class Placed(Tensor):
    """A tensor with a place of its own."""

    place = CPU

    def __new__(cls, data: Tensor, requires_grad: bool = False):  # accelerate makes parameters by the old one's type
        placed = data.as_subclass(Tensor).detach().as_subclass(cls)
        placed.place, placed._is_param = place_of(data), True
        return placed

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {})


class SeveralDevices(TorchFunctionMode):
    """Block in which devices other than the CPU can be used; counts the ``transfers`` between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.transfers: list[tuple[torch.device, torch.device, torch.Size]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = _call(func, args, kwargs or {})
        if func is Tensor.to and isinstance(result, Tensor) and place_of(args[0]) != place_of(result):
            self.transfers.append((place_of(args[0]), place_of(result), result.shape))
        return result


def place_of(tensor: Tensor) -> torch.device:
    return tensor.place if isinstance(tensor, Placed) else CPU


def _call(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    if func == _DEVICE:
        return place_of(args[0])
    if func is Tensor.pin_memory:
        return args[0]  # page-locking needs a driver; the numbers are the same
    if func is torch._has_compatible_shallow_copy_type and place_of(args[0]) != place_of(args[1]):
        return False  # so that a module that moves gets new parameters
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    place = _common_place(func, tensors)
    args, kwargs, wanted = _without_devices(func, args, kwargs)
    plain: dict[int, Tensor] = {}

    def strip(value: Any) -> Any:
        if not isinstance(value, Placed):
            return value
        bare = value.as_subclass(Tensor)
        plain[id(bare)] = value
        return bare

    with torch._C.DisableTorchFunctionSubclass():
        result = func(*tree_map(strip, args), **tree_map(strip, kwargs))
        target = place if wanted is None else wanted
        return tree_map(lambda value: _placed(value, target, plain, func), result)


def _placed(value: Any, place: torch.device, plain: dict[int, Tensor], func: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    original = plain.get(id(value))
    if original is not None and place_of(original) == place:  # an operation in place, or one that changed nothing
        return original
    if place == CPU:
        return value
    moved = value.detach().as_subclass(Placed)
    moved.place = place
    return moved


def _common_place(func: Any, tensors: list[Tensor]) -> torch.device:
    places = {place_of(t) for t in tensors if place_of(t) != CPU}
    if func in _MAY_MIX:
        return place_of(tensors[0])
    on_cpu = [t for t in tensors if place_of(t) == CPU and t.as_subclass(Tensor).ndim > 0]
    if len(places) > 1 or (places and on_cpu and func not in _TAKES_CPU_INDEX):
        found = ", ".join(f"{place_of(t)} {tuple(t.shape)}" for t in tensors)
        name = getattr(func, "__name__", func)
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} of {found}")
    return next(iter(places), CPU)


def _without_devices(func: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict, torch.device | None]:
    """The same call for the CPU, and the device that it asked for (None: that of its arguments)."""
    kwargs = dict(kwargs)
    wanted = None
    if kwargs.get("device") is not None:
        wanted, kwargs["device"] = torch.device(kwargs["device"]), CPU
    if func is Tensor.to:
        rest = []
        for value in args[1:]:
            if isinstance(value, Tensor):
                wanted, value = place_of(value), value.dtype
            elif isinstance(value, (str, torch.device)):
                wanted, value = torch.device(value), CPU
            rest.append(value)
        args = (args[0], *rest)
    elif func in (Tensor.cpu, Tensor.numpy):
        wanted = CPU
    if wanted is not None and wanted.type == "meta":
        kwargs["device"] = wanted if "device" in kwargs else None
        args = tuple(wanted if value is CPU else value for value in args)
        wanted = CPU
    return args, {k: v for k, v in kwargs.items() if v is not None or k != "device"}, wanted
