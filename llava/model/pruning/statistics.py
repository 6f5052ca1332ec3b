"""What the matrices of a decoder are multiplied with while a model reads the calibration's samples."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from accelerate_methods.stages.errors import MethodError
from llava.model.pruning.samples import Sample

#: pruning method -> what it has to know of a matrix's inputs
NEEDS = {"magnitude": None, "wanda": "squares", "sparsegpt": "products"}


@contextlib.contextmanager
def watched(matrices: Mapping[str, nn.Linear], what: str) -> Iterator[dict[str, Tensor]]:
    """Sums over all tokens within the block, by name: "squares" [I], or "products" [I, I]; behind it means."""
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(matrices, 0)

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: tuple) -> None:
            rows = args[0].detach().flatten(0, -2).float()
            seen = rows.square().sum(0) if what == "squares" else rows.T @ rows
            sums[name] = sums[name] + seen if name in sums else seen
            counts[name] += len(rows)

        return hook

    handles = [module.register_forward_pre_hook(hook_of(name)) for name, module in matrices.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
    for name in sums:
        sums[name] /= counts[name]


@torch.no_grad()
def inputs_of(
    model: Any, matrices: Mapping[str, nn.Linear], samples: Sequence[Sample], method: str
) -> dict[str, Tensor | None]:
    """What a pruning method (:mod:`.masks`) has to know of each of ``matrices``; None where that is nothing.

    Raises:
        MethodError: a matrix that no sample has reached.
    """
    what = NEEDS[method]
    if what is None:
        return dict.fromkeys(matrices)
    with watched(matrices, what) as found:
        for sample in samples:
            model(**sample.given())
    silent = [name for name in matrices if name not in found]
    if silent:
        raise MethodError(f"the calibration's samples never reach {silent[0]}; give others.")
    return found
