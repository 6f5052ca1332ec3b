"""What would make the host wait for a GPU, found on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(f"{ROOT / name}/" for name in ("accelerate_methods", "llava"))
#: looks at values on the CPU only
CONTRACT = f"{ROOT / 'accelerate_methods/stages/contract.py'}"


class HostReads(TorchFunctionMode):
    """Notes values that are read, sizes that depend on values, and uploads that block.

    What there was before the block is on the device, and so is what is computed from it or made with ``device=``; what
    is read from it, or made without, is on the host, where looking at values costs nothing.

    Attributes:
        seen: (what, "file.py:function") of this project's code, in order; transformers' own are not noted.
    """

    READS = frozenset({
        "item", "tolist", "cpu", "numpy", "nonzero", "argwhere", "unique", "unique_consecutive", "masked_select",
        "bincount", "equal", "allclose", "is_nonzero", "__bool__", "__int__", "__float__", "__index__",
        "repeat_interleave",
    })  # fmt: skip

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.seen]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_host = all(_on_host(tensor) for tensor in tensors)
        what = self._what(name, args, kwargs, tensors, on_host)
        if what:
            self._note(what)
        out = function(*args, **kwargs)
        moves = name == "to" and any(isinstance(leaf, (torch.device, str)) for leaf in tree_leaves((args[1:], kwargs)))
        if name == "cpu" or (moves and tensors):
            out = out.view_as(out)  # on a CPU this is the tensor itself, which stays where it was
            on_host = name == "cpu"
        elif not tensors:
            on_host = kwargs.get("device") is None
        if on_host and name not in ("__setitem__", "__get__"):
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    leaf.on_host = True
        return out

    def _what(self, name: str, args: Any, kwargs: dict[str, Any], tensors: list[Tensor], on_host: bool) -> str:
        if name in ("tensor", "as_tensor") and kwargs.get("device") is not None:
            return "upload"
        if name == "to" and tensors and on_host and not kwargs.get("non_blocking"):
            moves = any(isinstance(leaf, torch.device) for leaf in tree_leaves((args[1:], kwargs)))
            return "upload" if moves else ""
        if on_host:
            return ""
        if name in ("__getitem__", "__setitem__") and not _on_host(args[0]):
            return self._indexed(args)
        if name == "repeat_interleave":
            repeats = args[1] if len(args) > 1 else kwargs.get("repeats")
            return "" if "output_size" in kwargs or isinstance(repeats, int) else name
        if name == "where" and len(args) + len(kwargs) == 1:
            return "nonzero"
        return name if name in self.READS else ""

    @staticmethod
    def _indexed(args: Any) -> str:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        if any(isinstance(part, list) or (isinstance(part, Tensor) and part.ndim and _on_host(part)) for part in index):
            return "upload"
        masks = any(isinstance(part, Tensor) and part.dtype == torch.bool for part in index)
        fills = len(args) > 2 and not (isinstance(args[2], Tensor) and args[2].ndim)
        return "mask" if masks and not fills else ""

    def _note(self, what: str) -> None:
        frame = sys._getframe(2)
        while frame is not None and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
            frame = frame.f_back
        name = "" if frame is None else frame.f_code.co_filename
        if name.startswith(OURS) and name != CONTRACT:
            self.seen.append((what, f"{Path(name).name}:{frame.f_code.co_name}"))


def _on_host(tensor: Tensor) -> bool:
    return getattr(tensor, "on_host", False)
