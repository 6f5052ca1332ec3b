"""Each method's own work (compression, selection) on made-up inputs, without any model around it.

``scripts/bench/selection.py`` measures them, each in a process of its own. Inputs have the statistics of a video
(:mod:`.features`). Beside each stands, measured in the same process and in turn with it, what takes no cleverness: a
random selection of as many tokens, and a copy of as many neighbouring rows, which is the least that a selection costs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch

import accelerate_methods
from accelerate_methods.bench.features import picture_patches, video_like_features
from accelerate_methods.bench.memory import memory_before, memory_peak
from accelerate_methods.engine.cached_keys import gather_keys, gather_rows
from accelerate_methods.stages.compress import CompressMethod, VisualItem
from accelerate_methods.stages.encode import EncodeStep
from accelerate_methods.stages.frames import FrameStep, mixed
from accelerate_methods.stages.pixels import PixelCells
from accelerate_methods.stages.prefill import PrefillStep, VisualSpan
from accelerate_methods.stages.signals import Signal
from accelerate_methods.stages.views import Views


@dataclasses.dataclass(frozen=True)
class Work:
    """What is timed.

    Attributes:
        run: the method's own work.
        bytes: of its main input.
        plain: by name ("random", "copy"), what it is compared with; without one where there is nothing of the kind.
    """

    run: Callable[[], object]
    bytes: int
    plain: dict[str, Callable[[], object]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Case:
    """``make(device, dtype)`` prepares the inputs and gives the work."""

    method: str
    what: str
    make: Callable[[torch.device, torch.dtype], Work]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _random(*shape: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _probabilities(*shape: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return _random(*shape, device=device, dtype=torch.float32).mul(2).softmax(-1).to(dtype)


def _signals(method: CompressMethod, features: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the method asks for beside ``features`` [F, N, D]; keys of joined heads have the width of CLIP-L."""
    (sets, tokens, width), device, dtype, found = features.shape, features.device, features.dtype, {}
    for name in method.signals:
        asked = Signal(name)
        if name == "question_rows":
            found[name] = _random(12, width, device=device, dtype=dtype)
        elif name == "encoder_tokens":
            found[name] = _random(sets, tokens, 1024, device=device, dtype=dtype)
        elif asked.name == "key_states":
            of_keys = 1024 if asked.heads == "joined" else 64
            found[name] = _random(sets, tokens, of_keys, device=device, dtype=dtype)
        elif name.endswith("_embeds"):
            shape = (sets, tokens, 768) if name == "image_embeds" else (1, 768)
            found[name] = _random(*shape, device=device, dtype=torch.float32)
        elif asked.name.endswith("attention"):
            found[name] = _probabilities(sets, tokens, device=device, dtype=dtype)
    return found


def _copy(rows: torch.Tensor, count: int) -> Callable[[], object]:
    """A copy of the first ``count`` rows of [M, D]."""
    return lambda: rows[:count].clone()


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
        instance = accelerate_methods.get(method, **params)
        item.signals = {"frame_features": features.float().mean(1), **_signals(instance, features)}
        kept = len(instance.compress(item).tokens)
        random = accelerate_methods.get("random", retention_ratio=kept / (frames * tokens))
        plain = {"random": lambda: random.compress(item), "copy": _copy(features.flatten(0, 1), kept)}
        return Work(lambda: instance.compress(item), _bytes(features), plain)

    return make


def views(method: str, count: int, **params: object):
    """The compress stage on the views of one image (CLIP ViT-L/14-336: 24 x 24 patches)."""

    def make(device: torch.device, dtype: torch.dtype) -> Work:
        features = video_like_features(count, 576, 1024, scenes=1).to(device, dtype)
        instance = accelerate_methods.get(method, **params)
        image = Views(
            features=features,
            grid=(24, 24),
            special=_random(count, 1, 1024, device=device, dtype=dtype),
            tiles=(2, 2) if count == 5 else None,
            signals=_signals(instance, features),
        )
        rows = features.flatten(0, 1)
        kept = len(instance.compress_views(image).tokens)

        def random() -> object:
            return rows[torch.randperm(len(rows))[:kept].sort().values.to(device)]

        plain = {"random": random, "copy": _copy(rows, kept)}
        return Work(lambda: instance.compress_views(image), _bytes(features), plain)

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
    method, random = accelerate_methods.get("fastv", k=2, r=0.5), accelerate_methods.get("fastv", k=0, r=0.5)
    return Work(lambda: method.prefill(step), _bytes(row), {"random": lambda: random.prefill(step)})


class _States(PrefillStep):
    """A prefill step whose keys and states are given: 6310 rows of width 3584, 6272 of them visual, 4 key heads."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.block = torch.zeros(1, 6310, dtype=torch.bool, device=device)
        self.block[:, 14:6286] = True
        self.hidden_states, before = (_random(1, 6310, 3584, device=device, dtype=dtype) for _ in range(2))
        self.spans, self.lengths = [[VisualSpan(14, 6272, "video", 6272)]], [6310]
        self.layer, self.num_layers, self.valid, self.rows, self.cuts, self.memory = 2, 28, None, None, 0, {}
        keys = _random(1, 4, 6310, 128, device=device, dtype=dtype)
        self.keys, self.entered = lambda: keys, lambda: before
        self.final_normed, self.tails = lambda: self.hidden_states, lambda: [24]


def from_states(method: str, **params: object):
    """The prefill stage of a method that reads states, not attention."""

    def make(device: torch.device, dtype: torch.dtype) -> Work:
        step, instance = _States(device, dtype), accelerate_methods.get(method, **params)
        random = accelerate_methods.get("fastv", k=0, r=0.5)
        plain = {"random": lambda: random.prefill(step)}
        return Work(lambda: (step.memory.clear(), instance.prefill(step)), _bytes(step.hidden_states), plain)

    return make


def gather_half(device: torch.device, dtype: torch.dtype) -> Work:
    """What the decoder loop does with FastV's answer: of 6310 hidden states of width 3584 every second one stays."""
    hidden = _random(1, 6310, 3584, device=device, dtype=dtype)
    kept = torch.arange(0, 6310, 2, device=device)[None]
    return Work(lambda: gather_rows(hidden, kept), _bytes(hidden), {"copy": _copy(hidden[0], kept.shape[1])})


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
            lengths=[length],
            spans=[[VisualSpan(start, tokens, "video", tokens, info)]], num_heads=heads,
            hidden_states=torch.empty(1, length, 8, device=device, dtype=dtype),
        )  # fmt: skip
        method = accelerate_methods.get("prunevid")
        random = accelerate_methods.get("fastv", k=0, r=0.6)
        return Work(lambda: method.prefill(step), _bytes(rows), {"random": lambda: random.prefill(step)})

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

    return Work(work, _bytes(step.probabilities))


def dycoke_gather(device: torch.device, dtype: torch.dtype) -> Work:
    """Keys and values of one layer as a decode step sees them: 4 heads of 128, 3200 -> 1032."""
    keys, values = (_random(1, 4, 3200, 128, device=device, dtype=dtype) for _ in range(2))
    seen = torch.randperm(3200, generator=torch.Generator().manual_seed(0))[:1032].sort().values.to(device)[None]
    return Work(
        lambda: (gather_keys(keys, seen), gather_keys(values, seen)),
        2 * _bytes(keys),
        {"copy": lambda: (keys[:, :, :1032].clone(), values[:, :, :1032].clone())},
    )


def keyframes(candidates: int, count: int):
    """Choosing frames by their scores; host work, whatever the device."""

    def make(device: torch.device, dtype: torch.dtype) -> Work:
        scores = _random(candidates, device=torch.device("cpu"), dtype=torch.float64).sigmoid()
        method = accelerate_methods.get("aks")
        return Work(lambda: method.frames(scores, count), _bytes(scores))

    return make


def vision_block(name: str, shape: tuple[int, int, int], special: int, **params: object):
    """One block of a vision encoder: ``shape`` [V, T, C] of its tokens, the first ``special`` of them no patches."""

    def make(device: torch.device, dtype: torch.dtype) -> Work:
        method, hidden = accelerate_methods.get(name, **params), _random(*shape, device=device, dtype=dtype)
        keys = _random(*shape[:2], 64, device=device, dtype=dtype)
        scores = _probabilities(shape[0], shape[1] - special, device=device, dtype=torch.float32)
        known = SimpleNamespace(special=special, keys=lambda: keys, **dict.fromkeys(_SCORES, lambda: scores))
        block = max(method.encode_blocks(1))
        counts = block, block + 1, block + 1, shape[1] - special, shape[1] - special
        step = EncodeStep(known, hidden, torch.ones(shape[:2], device=device), counts)
        left = method.encode(step).hidden.shape[1]
        return Work(lambda: method.encode(step), _bytes(hidden), {"copy": lambda: hidden[:, :left].clone()})

    return make


def merged_frames(name: str, frames: int, places: int, width: int, **params: object):
    """Frames of a video behind the last of the chosen blocks of its encoder, 26 in all."""

    def make(device: torch.device, dtype: torch.dtype) -> Work:
        method, hidden = accelerate_methods.get(name, **params), video_like_features(frames, places, width)
        hidden, received = hidden.to(device, dtype), _probabilities(frames, places, device=device, dtype=torch.float32)
        step = FrameStep(max(method.encode_blocks(26)), 26, hidden, 0, lambda: received)
        return Work(lambda: mixed(hidden, method.encode_frames(step).mixing), _bytes(hidden), {"copy": hidden.clone})

    return make


def pixels(name: str, rows: int, columns: int, *, screen: bool = False, **params: object):
    """A picture of so many tokens, each of 2 x 2 patches of 16 pixels: a busy one, or like a screen."""

    def make(device: torch.device, dtype: torch.dtype) -> Work:
        patches = picture_patches(rows, columns, screen=screen).to(device, dtype)
        method = accelerate_methods.get(name, **params)
        cells = PixelCells.of_patches(patches, (rows, columns), 4, frames=2)
        return Work(lambda: method.choose(cells), _bytes(patches))

    return make


_SCORES = ("cls_attention", "received_attention")

CASES = [
    Case("tome", "a CLIP-L block 577x1024, r=17", vision_block("tome", (1, 577, 1024), 1, r=17)),
    Case("tome", "8 views 577x1024, r=17", vision_block("tome", (8, 577, 1024), 1, r=17)),
    Case("tome", "8 frames of SigLIP 729x1152, r=27", vision_block("tome", (8, 729, 1152), 0, r=27)),
    Case("evit", "a CLIP-L block 577x1024, 0.7 and fused", vision_block("evit", (1, 577, 1024), 1, fuse_token=True)),
    Case("evit", "8 views 577x1024, 0.7 and fused", vision_block("evit", (8, 577, 1024), 1, fuse_token=True)),
    Case("earlytom", "merge 32 frames of SigLIP 729x1152", merged_frames("earlytom", 32, 729, 1152)),
    Case("pixelprune", "1792x2304 pixels, 4032 tokens", pixels("pixelprune", 56, 72)),
    Case("pixelprune", "the same with threshold 0.02", pixels("pixelprune", 56, 72, threshold=0.02)),
    Case("pixelprune", "like a screen", pixels("pixelprune", 56, 72, screen=True)),
    Case("pixelprune", "like a screen, 0.02", pixels("pixelprune", 56, 72, screen=True, threshold=0.02)),
    Case("pixelprune", "the same, raster", pixels("pixelprune", 56, 72, screen=True, threshold=0.02, scan="raster")),
    Case("flashvid", "32x196x3584, 25 %", video("flashvid", 32, 196, 3584, retention_ratio=0.25)),
    Case("flashvid", "64x169x3584, 10 %", video("flashvid", 64, 169, 3584, retention_ratio=0.1)),
    Case("fastvid", "compress 32x196x3584, 10 %", video("fastvid", 32, 196, 3584, retention_ratio=0.1)),
    Case("prunevid", "merge 32x196x3584", video("prunevid", 32, 196, 3584)),
    Case("prunevid", "merge 16x144x4096", video("prunevid", 16, 144, 4096)),
    Case("prunevid", "select 688 tokens, 64 rows, 32 heads", prunevid_groups(688, 32)),
    Case("prunevid", "select 992 tokens, 64 rows, 28 heads", prunevid_groups(992, 28)),
    Case("visionzip", "576x1024, 54+10", views("visionzip", 1, dominant=54, contextual=10)),
    Case("visionzip", "5x576x1024, 54+10", views("visionzip", 5, dominant=54, contextual=10)),
    Case("cdpruner", "576x4096, 64", video("cdpruner", 1, 576, 4096, visual_token_num=64)),
    Case("cdpruner", "5x576x4096, 32 a view", video("cdpruner", 5, 576, 4096, visual_token_num=32)),
    Case("cdpruner", "5x576x4096, 128 a view", video("cdpruner", 5, 576, 4096, visual_token_num=128)),
    Case("aks", "64 of 600 candidates", keyframes(600, 64)),
    Case("aks", "64 of 3600 candidates", keyframes(3600, 64)),
    Case("divprune", "576x4096, 56", video("divprune", 1, 576, 4096, tokens_per_image=56)),
    Case("divprune", "5x576x4096, 288", video("divprune", 5, 576, 4096, tokens_per_image=288)),
    Case("vispruner", "576x1024, 64, r=0.75", views("vispruner", 1, tokens_per_view=64, important_ratio=0.75)),
    Case("vispruner", "576x1024, 128", views("vispruner", 1, tokens_per_view=128)),
    Case("vispruner", "5x576x1024, 32 a view", views("vispruner", 5, tokens_per_view=32)),
    Case("prumerge", "576x1024, 45 + 1", views("prumerge", 1, retention_ratio=46 / 576)),
    Case("prumerge_plus", "576x1024, 178 + 1", views("prumerge_plus", 1, retention_ratio=179 / 576)),
    Case("hiprune", "5x576x1024, 128 a view", views("hiprune", 5, tokens_per_view=128)),
    Case("scope", "576x1024, 64", views("scope", 1, tokens_per_view=64)),
    Case("scope", "576x1024, 192", views("scope", 1, tokens_per_view=192)),
    Case("scope", "5x576x1024, 32 a view", views("scope", 5, tokens_per_view=32)),
    Case("mmtok", "576x4096, 64", video("mmtok", 1, 576, 4096, tokens_per_view=64)),
    Case("mmtok", "576x4096, 192", video("mmtok", 1, 576, 4096, tokens_per_view=192)),
    Case("mmtok", "1296x3584, 259", video("mmtok", 1, 1296, 3584, tokens_per_view=259)),
    Case("fastervlm", "5x576x1024, 58 a view", views("fastervlm", 5, tokens_per_view=58)),
    Case("holitom", "outer 32x196x3584, 10 %", video("holitom", 32, 196, 3584, retention_ratio=0.1, tau=0.65)),
    Case("holitom", "outer 64x169x3584, 15 %", video("holitom", 64, 169, 3584, retention_ratio=0.15)),
    Case("evs", "32x196x3584, 75 % pruned", video("evs", 32, 196, 3584)),
    Case("evs", "64x169x3584, 75 % pruned", video("evs", 64, 169, 3584)),
    Case("dycoke", "TTM 32x196x3584, K=0.7", video("dycoke", 32, 196, 3584, k=0.7)),
    Case("dycoke", "DP choice, 28 heads, 3200 keys", dycoke_choice),
    Case("dycoke", "DP gather of a layer, 3200 -> 1032", dycoke_gather),
    Case("fastv", "choice from a row of 28x6310", fastv_row),
    Case("dart", "6272 of 6310x3584, 10 %", from_states("dart", max_num=627)),
    Case("v2drop", "6272 of 6310x3584, half", from_states("v2drop", layer_list=(2,), keep_ratio_list=(0.5,))),
    Case("fastv", "gather 6310x3584 -> half", gather_half),
    Case("pool", "32x196x3584, 10 % (baseline)", video("pool", 32, 196, 3584, retention_ratio=0.1)),
    Case("random", "32x196x3584, 10 % (baseline)", video("random", 32, 196, 3584, retention_ratio=0.1)),
]


@torch.inference_mode()
def measure(case: Case, device: torch.device, dtype: torch.dtype, threads: int, repeats: int) -> dict[str, object]:
    """Milliseconds of every repeat, of the work and what it is compared with in turn; the memory that it adds."""
    torch.set_num_threads(threads)
    work = case.make(device, dtype)
    cuda = device.type == "cuda"
    before = memory_before(cuda)
    work.run()
    extra = memory_peak(cuda) - before
    runs = {"": work.run, **work.plain}
    for run in runs.values():
        run()
    spent: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    while len(spent[""]) < repeats or (len(spent[""]) < 5 * repeats and time.perf_counter() - begin < 1.0):
        for name, run in runs.items():
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize()
            spent[name].append(1000 * (time.perf_counter() - start))
    plain = {f"{name}_ms": times for name, times in spent.items() if name}
    return {"ms": spent[""], **plain, "input_bytes": work.bytes, "extra_bytes": max(0, extra)}
