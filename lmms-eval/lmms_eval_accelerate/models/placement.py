"""Which GPUs a process has: one, or a group of them for a model that is larger than a GPU.

With ``gpus_per_model=K`` process p of a machine owns the GPUs p*K .. p*K+K-1. Its copy of the model is spread over them
by ``device_map="auto"``, and the processes share the documents as ever: data parallel over groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from accelerate_methods.stages.errors import MethodError

#: share of a GPU's free memory that weights may take; the rest is for the KV cache and activations
WEIGHTS_SHARE = 0.85


@dataclasses.dataclass(frozen=True)
class Placement:
    """What one process loads its model with.

    Attributes:
        device: where inputs go, "cpu" or "cuda:N" (the first GPU of a group).
        gpus: numbers of the GPUs that the process owns.
        device_map: None for a model on ``device`` alone, "auto" for one over several GPUs.
        max_memory: GPU -> bytes of weights, as ``from_pretrained`` takes it; None with ``device_map=None``. The CPU is
            not in it: a model that does not fit must not silently run from CPU memory.
    """

    device: str
    gpus: tuple[int, ...] = ()
    device_map: str | None = None
    max_memory: dict[int, int] | None = dataclasses.field(default=None, compare=False)


def place(
    local_rank: int, local_world_size: int, gpus: int, gpus_per_model: int = 1, free: Sequence[int] | None = None
) -> Placement:
    """The placement of one process; a function of its arguments alone.

    Args:
        local_rank, local_world_size: number of this process on its machine, and how many there are.
        gpus: GPUs that the machine shows to each process, 0 on a machine without.
        gpus_per_model: K, GPUs per copy of the model.
        free: free bytes of each of the ``gpus`` GPUs; needed for K > 1.

    Raises:
        MethodError: K < 1, K > 1 without GPUs, GPUs not divisible by K, or more processes than groups of GPUs.
    """
    if gpus_per_model < 1:
        raise MethodError(f"gpus_per_model must be at least 1, not {gpus_per_model}.")
    if not 0 <= local_rank < local_world_size:
        raise MethodError(f"local rank {local_rank} is not one of {local_world_size} processes.")
    if gpus == 0:
        if gpus_per_model > 1:
            raise MethodError(f"gpus_per_model={gpus_per_model} needs GPUs; this machine shows none.")
        return Placement("cpu")
    if gpus % gpus_per_model:
        fits = ", ".join(str(k) for k in range(1, gpus + 1) if gpus % k == 0)
        raise MethodError(
            f"gpus_per_model={gpus_per_model} does not divide the {gpus} visible GPUs; possible: {fits}. "
            "CUDA_VISIBLE_DEVICES can hide the GPUs that are left over."
        )
    groups = gpus // gpus_per_model
    if local_world_size > groups:
        raise MethodError(
            f"{local_world_size} processes with gpus_per_model={gpus_per_model} need "
            f"{local_world_size * gpus_per_model} GPUs, but {gpus} are visible; start at most {groups} per machine."
        )
    first = local_rank * gpus_per_model
    own = tuple(range(first, first + gpus_per_model))
    if gpus_per_model == 1:
        return Placement(f"cuda:{first}", own)
    if free is None or len(free) != gpus:
        raise MethodError(f"the free memory of all {gpus} GPUs is needed to spread a model over {gpus_per_model}.")
    return Placement(f"cuda:{first}", own, "auto", {gpu: int(free[gpu] * WEIGHTS_SHARE) for gpu in own})


def remeasured(placement: Placement) -> Placement:
    """The same with what is free on its GPUs now."""
    if placement.max_memory is None:
        return placement
    import torch

    free = {gpu: int(torch.cuda.mem_get_info(gpu)[0] * WEIGHTS_SHARE) for gpu in placement.gpus}
    return dataclasses.replace(placement, max_memory=free)


def placement_of(device: str, gpus_per_model: int, local_rank: int, local_world_size: int, several: bool) -> Placement:
    """The placement that the model argument ``device`` asks for.

    Args:
        several: whether other processes, on this machine or another, work on the run as well.

    Raises:
        MethodError: see :func:`place`; or ``device`` names one device for a model over several GPUs.
    """
    if device in ("auto", "cuda") or (str(device).startswith("cuda") and several):
        # a --device for all ranks would put them on one GPU
        return place_process(local_rank, local_world_size, gpus_per_model)
    if gpus_per_model > 1:
        raise MethodError(f"gpus_per_model={gpus_per_model} chooses the GPUs itself; leave device={device} out.")
    return Placement(str(device))


def place_process(local_rank: int, local_world_size: int, gpus_per_model: int = 1) -> Placement:
    """:func:`place` on the machine as it is."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    free = [torch.cuda.mem_get_info(gpu)[0] for gpu in range(gpus)] if gpus_per_model > 1 else None
    return place(local_rank, local_world_size, gpus, gpus_per_model, free)
