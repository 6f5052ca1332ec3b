"""All inner products of a set's rows with each other."""

from __future__ import annotations

import torch
from torch import Tensor

#: rows that a CPU multiplies at a time: few enough to save almost half, enough for a product to be quick
BLOCK, QUICK_BLOCK = 192, 576  # where bfloat16 is quick, packing costs more than arithmetic


def gram(states: Tensor) -> Tensor:
    """``states @ states.mT`` of [..., N, D], without gradient: [..., N, N], exactly symmetric on a CPU.

    A CPU computes the upper half, as BLAS's ``syrk`` would, and copies it. A GPU, which is held up by many small
    operations more than by arithmetic, computes all of it.
    """
    states = states.detach()
    size, block = states.shape[-2], QUICK_BLOCK if states.dtype == torch.bfloat16 else BLOCK
    with torch.autocast(states.device.type, enabled=False):
        if states.device.type != "cpu" or size <= block:
            return states @ states.mT
        out = states.new_empty(*states.shape[:-1], size)
        for start in range(0, size, block):
            part = slice(start, start + block)
            out[..., part, start:] = states[..., part, :] @ states[..., start:, :].mT
            out[..., start + block :, part] = out[..., part, start + block :].mT
    return out


def quick_dtype() -> torch.dtype:
    """In which this CPU multiplies matrices the quickest: bfloat16 where it has tiles for it, else float32."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if capabilities.get("amx_bf16") else torch.float32
