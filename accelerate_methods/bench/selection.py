"""Each method's own work (compression, selection) on made-up inputs, without any model around it.

``scripts/bench/selection.py`` measures them, each in a process of its own. Inputs have the statistics of a video
(:mod:`.features`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

import accelerate_methods
from accelerate_methods.bench.features import video_like_features
from accelerate_methods.engine.cache import gather_keys, gather_rows
from accelerate_methods.stages.compress import VisualItem
from accelerate_methods.stages.prefill import VisualSpan
from accelerate_methods.stages.views import Views

Work = tuple[Callable[[], object], int]  # what is timed, and bytes of its main input


@dataclasses.dataclass(frozen=True)
class Case:
    """``make(device, dtype)`` prepares the inputs and gives the work.

    ``official``: ms of the authors' released code at the commit that the method names, None where it was not run.
    """

    method: str
    what: str
    make: Callable[[torch.device, torch.dtype], Work]
    official: float | None = None


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _random(*shape: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _probabilities(*shape: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return _random(*shape, device=device, dtype=torch.float32).mul(2).softmax(-1).to(dtype)


def video(method: str, frames: int, tokens: int, width: int, **params: object):
    """The compress stage on one video."""

    def make(device: torch.device, dtype: torch.dtype) -> Work:
        features = video_like_features(frames, tokens, width).to(device, dtype)
        side = int(tokens**0.5)
        item = VisualItem(
            modality="video",
            features=features,
            positions=torch.arange(frames * tokens, device=device).view(frames, tokens),
            length=frames * tokens,
            grid=(side, side) if side * side == tokens else None,
        )
        item.signals = {
            "frame_features": features.float().mean(1),
            "pooling_attention": _probabilities(frames, tokens, device=device, dtype=dtype),
            "received_attention": _probabilities(frames, tokens, device=device, dtype=dtype),
            "key_states": _random(frames, tokens, 64, device=device, dtype=dtype),
        }
        instance = accelerate_methods.get(method, **params)
        return lambda: instance.compress(item), _bytes(features)

    return make


def views(method: str, count: int, **params: object):
    """The compress stage on the views of one image (CLIP ViT-L/14-336: 24 x 24 patches)."""

    def make(device: torch.device, dtype: torch.dtype) -> Work:
        features = video_like_features(count, 576, 1024, scenes=1).to(device, dtype)
        image = Views(
            features=features,
            grid=(24, 24),
            special=_random(count, 1, 1024, device=device, dtype=dtype),
            tiles=(2, 2) if count == 5 else None,
            signals={
                "cls_attention": _probabilities(count, 576, device=device, dtype=dtype),
                "key_states": _random(count, 576, 64, device=device, dtype=dtype),
            },
        )
        instance = accelerate_methods.get(method, **params)
        return lambda: instance.compress_views(image), _bytes(features)

    return make


class _Step(SimpleNamespace):
    """A prefill or decode step whose attention is given."""

    def attention(self, *args: object, **kwargs: object) -> torch.Tensor:
        return self.probabilities


def fastv_row(device: torch.device, dtype: torch.dtype) -> Work:
    """The last row's attention of one layer, 28 heads, 6310 positions, 6272 of them visual."""
    heads, length, start, count = 28, 6310, 14, 6272
    visual = torch.zeros(1, length, dtype=torch.bool, device=device)
    visual[:, start : start + count] = True
    row = _probabilities(1, heads, 1, length, device=device, dtype=dtype)
    spans = [[VisualSpan(start, count, "video", count)]]
    step = _Step(
        layer=2, num_layers=28, visual=visual, block=visual, valid=None, spans=spans, rows=None, lengths=[length],
        probabilities=row,
    )  # fmt: skip
    method = accelerate_methods.get("fastv", k=2, r=0.5)
    return lambda: method.prefill(step), _bytes(row)


def gather_half(device: torch.device, dtype: torch.dtype) -> Work:
    """What the decoder loop does with FastV's answer: of 6310 hidden states of width 3584 every second one stays."""
    hidden = _random(1, 6310, 3584, device=device, dtype=dtype)
    kept = torch.arange(0, 6310, 2, device=device)[None]
    return lambda: gather_rows(hidden, kept), _bytes(hidden)


def prunevid_groups(tokens: int, heads: int):
    """Question-guided selection from ready attention rows: 64 rows, one segment of 8 frames."""

    def make(device: torch.device, dtype: torch.dtype) -> Work:
        length, start = tokens + 80, 16
        visual = torch.zeros(1, length, dtype=torch.bool, device=device)
        visual[:, start : start + tokens] = True
        rows = _probabilities(1, heads, 64, length, device=device, dtype=dtype)
        static = tokens // 2
        info = {"static_sizes": [static], "dynamic_sizes": [tokens - static], "window_sizes": [8]}
        step = _Step(
            layer=11, num_layers=32, visual=visual, block=visual, valid=None, rows=None, probabilities=rows,
            spans=[[VisualSpan(start, tokens, "video", tokens, info)]], num_heads=heads,
            hidden_states=torch.empty(1, length, 8, device=device, dtype=dtype),
        )  # fmt: skip
        method = accelerate_methods.get("prunevid")
        return lambda: method.prefill(step), _bytes(rows)

    return make


def _decode_step(device: torch.device, dtype: torch.dtype) -> _Step:
    keys, start, count = 3200, 14, 3098
    visual = torch.zeros(1, keys, dtype=torch.bool, device=device)
    visual[:, start : start + count] = True
    row = _probabilities(1, 28, keys, device=device, dtype=dtype)
    return _Step(layer=3, visual=visual, valid=None, memory={}, probabilities=row)


def dycoke_choice(device: torch.device, dtype: torch.dtype) -> Work:
    """Which keys a decode step sees: 28 heads, 3200 keys, 3097 of them may be hidden."""
    step = _decode_step(device, dtype)
    method = accelerate_methods.get("dycoke", p=0.7)

    def work() -> object:
        step.memory.clear()
        return method.decode(step)

    return work, _bytes(step.probabilities)


def dycoke_gather(device: torch.device, dtype: torch.dtype) -> Work:
    """Keys and values of one layer as a decode step sees them: 4 heads of 128, 3200 -> 1032."""
    keys, values = (_random(1, 4, 3200, 128, device=device, dtype=dtype) for _ in range(2))
    seen = torch.randperm(3200, generator=torch.Generator().manual_seed(0))[:1032].sort().values.to(device)[None]
    return lambda: (gather_keys(keys, seen), gather_keys(values, seen)), 2 * _bytes(keys)


CASES = [
    Case("fastvid", "compress 32x196x3584, 10 %", video("fastvid", 32, 196, 3584, retention_ratio=0.1), 980.0),
    Case("prunevid", "merge 32x196x3584", video("prunevid", 32, 196, 3584), 1000.0),
    Case("prunevid", "merge 16x144x4096", video("prunevid", 16, 144, 4096), 410.0),
    Case("prunevid", "select 688 tokens, 64 rows, 32 heads", prunevid_groups(688, 32), 9.0),
    Case("prunevid", "select 992 tokens, 64 rows, 28 heads", prunevid_groups(992, 28), 16.0),
    Case("visionzip", "576x1024, 54+10", views("visionzip", 1, dominant=54, contextual=10), 21.0),
    Case("visionzip", "5x576x1024, 54+10", views("visionzip", 5, dominant=54, contextual=10), 119.0),
    Case("fastervlm", "5x576x1024, 58 a view", views("fastervlm", 5, tokens_per_view=58)),
    Case("dycoke", "TTM 32x196x3584, K=0.7", video("dycoke", 32, 196, 3584, k=0.7), 150.0),
    Case("dycoke", "DP choice, 28 heads, 3200 keys", dycoke_choice, 0.16),
    Case("dycoke", "DP gather of a layer, 3200 -> 1032", dycoke_gather, 13.0),
    Case("fastv", "choice from a row of 28x6310", fastv_row, 0.54),
    Case("fastv", "gather 6310x3584 -> half", gather_half, 52.0),
    Case("pool", "32x196x3584, 10 % (baseline)", video("pool", 32, 196, 3584, retention_ratio=0.1)),
    Case("random", "32x196x3584, 10 % (baseline)", video("random", 32, 196, 3584, retention_ratio=0.1)),
]


@torch.inference_mode()
def measure(case: Case, device: torch.device, dtype: torch.dtype, threads: int, repeats: int) -> dict[str, object]:
    """Milliseconds of every repeat and the peak of memory above what was there before."""
    torch.set_num_threads(threads)
    work, size = case.make(device, dtype)
    cuda = device.type == "cuda"
    before = _memory_before(cuda)
    work()
    extra = _memory_peak(cuda) - before
    spent = []
    begin = time.perf_counter()
    while len(spent) < repeats or (len(spent) < 5 * repeats and time.perf_counter() - begin < 1.0):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        spent.append(1000 * (time.perf_counter() - start))
    return {"ms": spent, "input_bytes": size, "extra_bytes": max(0, extra)}


def _memory_before(cuda: bool) -> int:
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the former peak
    return _status("VmRSS")


def _memory_peak(cuda: bool) -> int:
    if cuda:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(field: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024
