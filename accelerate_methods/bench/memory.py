"""Memory that a piece of work adds: of the GPU, or of this process."""

from __future__ import annotations

from pathlib import Path

import torch


def memory_before(cuda: bool) -> int:
    """Bytes in use; the peak is counted from here on."""
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the former peak
    return _status("VmRSS")


def memory_peak(cuda: bool) -> int:
    """Most bytes in use since :func:`memory_before`."""
    if cuda:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(field: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024
