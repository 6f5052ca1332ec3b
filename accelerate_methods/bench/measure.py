"""One request, its stages timed apart; and what it works on and keeps, found in a request of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from accelerate_methods.bench.inputs import Inputs, fed
from accelerate_methods.engine import flops
from accelerate_methods.engine.recording import RequestRecord, record
from accelerate_methods.hosts import host_for
from accelerate_methods.registry import compatibility
from accelerate_methods.registry.pipeline import Pipeline, resolve
from accelerate_methods.registry.settings import Setting
from accelerate_methods.stages.errors import MethodError

SAMPLES = ("vision_ms", "compress_ms", "prefill_ms", "first_token_ms", "decode_tokens_per_s")
TERA = 1e12
_logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Row:
    """A setting and all that was found about it; ``to_dict`` is the row of the result file."""

    setting: Setting
    status: str = "ok"
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    samples: dict[str, list[float]] = dataclasses.field(default_factory=lambda: {name: [] for name in SAMPLES})
    peak_memory: int | None = None
    state: Any = None

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    def to_dict(self) -> dict[str, Any]:
        return {
            "label": self.setting.label,
            "method": self.setting.method,
            "params": dict(self.setting.params),
            "status": self.status,
            "visual_tokens": self.facts.get("visual_tokens"),
            "prompt_tokens": self.facts.get("prompt_tokens"),
            "tflops": self.facts.get("tflops"),
            "samples": self.samples,
            "peak_memory_bytes": self.peak_memory,
            "kv_cache_bytes": self.facts.get("kv_cache_bytes"),
        }


class Bench:
    """Measures settings on one model and one input."""

    def __init__(self, model: Any, inputs: Inputs, new_tokens: int = 16, family: str | None = None):
        self.model, self.inputs, self.new_tokens = model, inputs, new_tokens
        self.host = host_for(model)
        self.family = family
        self.device = inputs.ids.device
        model.generation_config.eos_token_id = None  # every request generates the same number of tokens
        model.generation_config.pad_token_id = 0

    # -- settings ----------------------------------------------------------------------------------------------------

    def prepare(self, row: Row) -> None:
        """Attach once and keep what the host made of it, so that switching costs nothing later."""
        with self.caught(row):
            pipeline = resolve(row.setting.method, **dict(row.setting.params))
            self._check(pipeline)
            previous = self.host.attach(self.model, pipeline)
            row.state = self.host.attached(self.model)
            self.host.restore(self.model, previous)

    def _check(self, pipeline: Pipeline) -> None:
        acting = [m for m in pipeline.methods if self.inputs.modality in m.modalities]
        if pipeline.methods and not acting:
            raise MethodError(f"{pipeline.name} leaves {self.inputs.modality}s alone")
        if self.family is not None:
            compatibility.check(pipeline, self.family)

    @contextlib.contextmanager
    def attached(self, row: Row) -> Iterator[None]:
        self.host.restore(self.model, row.state)
        whole = self.inputs
        sample = row.state.pipeline.sample if row.state is not None else None
        if sample is not None and not sample.selects_frames():  # those are chosen by what a video shows
            self.inputs = whole.thinned(sample.frame_count(whole.frames))
        try:
            with fed(self.model, self.inputs):
                yield
        finally:
            self.inputs = whole
            self.host.restore(self.model, None)

    @contextlib.contextmanager
    def caught(self, row: Row) -> Iterator[None]:
        """What goes wrong becomes the row's status."""
        try:
            yield
        except MethodError as error:
            row.status = f"error: {error}"
        except Exception as error:
            if not is_out_of_memory(error):
                _logger.exception("%s failed", row.setting.label)
            row.status = "out of memory" if is_out_of_memory(error) else f"error: {type(error).__name__}: {error}"
        if not row.ok:
            row.state = None
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    # -- facts -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def find_facts(self, row: Row) -> None:
        """Token counts, work and cache size, from one request of a single new token."""
        frames = self.inputs.frames
        with self.caught(row), self.attached(row):
            counter = flops.MacCounter()
            with record() as requests, counted_work(self.model, counter):
                out = self._generate(1, return_dict_in_generate=True)
            cache = out.past_key_values.layers
            for sample in requests[0].samples:
                sample.count_left_out([(frames, self.inputs.frames)])
            row.facts = self._facts(requests[0], counter.macs, [layer.keys.shape[2] for layer in cache])
            row.facts["kv_cache_bytes"] = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache)

    def _facts(self, request: RequestRecord, method_macs: int, cached: list[int]) -> dict[str, Any]:
        config, sample, batch = self.model.config, request.samples[0], self.inputs.batch
        layers = request.layer_lengths(0) or [sample.length] * config.num_hidden_layers
        after, length = sample.visual_tokens_after, sample.length
        dense = [sample.dense_length] * config.num_hidden_layers
        tower, projector = self._vision_macs(after)
        own = self.model.own_macs(sample, **self.inputs.call)
        if own is not None:  # a trained architecture counts what stands in the projector's place
            projector = batch * own
        # a decode method chooses anew in every step what is seen of the cache: not known before
        hides = self.model.acceleration is not None and self.model.acceleration.pipeline.decode is not None
        work = {
            "tower": tower,
            "projector": projector,
            "llm_prefill": batch * (sample.prefill_macs or flops.prefill_macs(layers, config)),
            "llm_prefill_dense": batch * flops.prefill_macs(dense, config),
            "llm_prefill_papers": batch * flops.prefill_macs_papers(layers, config),
            "llm_head": batch * flops.head_macs(config),
            "llm_decode": None if hides else batch * flops.decode_macs(cached, self.new_tokens, config),
            "method": method_macs,
        }
        return {
            "visual_tokens": {
                "before": sample.visual_tokens_before,
                "after": after,
                "per_layer": after - length + sum(layers) / len(layers),
            },
            "prompt_tokens": {
                "dense": sample.dense_length,
                "first_layer": length,
                "layers": layers,
                # of a prompt longer than the context, whose times are those of what was left of it
                "lost": sample.cut,
                "over_dense": sample.over_dense,
            },
            "tflops": {name: None if macs is None else macs / TERA for name, macs in work.items()},
        }

    def _vision_macs(self, visual_tokens: int) -> tuple[int, int]:
        """Tower and projector, for the whole batch."""
        tower, state = self.model.get_vision_tower(), self.model.acceleration
        views = sum(len(v) for v in self.inputs.pixels)
        side = tower.image_size
        if state is not None and state.pipeline.sample is not None:
            side = state.pipeline.sample.input_side(side, tower.hub_config.patch_size)
        macs = tower.macs(views, side)
        tokens = views * (side // tower.hub_config.patch_size) ** 2
        if state is not None and state.acts_on_views(self.inputs.modality):
            tokens = visual_tokens * self.inputs.batch  # only what stays is projected
        return macs, flops.projector_macs(tokens, self.model.get_model().mm_projector)

    # -- time --------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def sample(self, row: Row, keep: bool = True) -> None:
        """One timed request; ``keep=False`` for a warm-up."""
        with self.caught(row), self.attached(row):
            clock = _FirstToken(self.device)
            before = reset_peak_memory(self.device)
            with record() as requests:
                start = now(self.device)
                self._generate(self.new_tokens + 1, stopping_criteria=StoppingCriteriaList([clock]))
                end = now(self.device)
            if not keep:
                return
            spent = requests[0].stage_ms
            row.samples["vision_ms"].append(spent["vision"])
            row.samples["compress_ms"].append(spent["compress"])
            row.samples["prefill_ms"].append(spent["prefill"])
            row.samples["first_token_ms"].append(1000 * (clock.at - start))
            if self.new_tokens:
                tokens = self.new_tokens * self.inputs.batch
                row.samples["decode_tokens_per_s"].append(tokens / (end - clock.at))
            peak = peak_memory(self.device, before)
            row.peak_memory = peak if row.peak_memory is None or peak is None else max(peak, row.peak_memory)

    def _generate(self, new_tokens: int, **kwargs: Any) -> Any:
        return self.model.generate(
            self.inputs.ids,
            attention_mask=torch.ones_like(self.inputs.ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            use_cache=True,
            **self.inputs.arguments(),
            **kwargs,
        )


class _FirstToken(StoppingCriteria):
    """Stops nothing; notes when the first new token was there."""

    def __init__(self, device: torch.device):
        self.device, self.at = device, None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.at is None:
            self.at = now(self.device)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def is_out_of_memory(error: BaseException) -> bool:
    """On CUDA, or on a CPU, where torch says it in words only."""
    words = ("not enough memory", "can't allocate memory", "out of memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(w in str(error) for w in words)
    )


def now(device: torch.device) -> float:
    """Seconds, after everything that the device was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def counted_work(model: Any, counter: flops.MacCounter) -> Iterator[None]:
    """Counts what the attached methods compute up to the first token: their signals and their own functions."""
    state = model.acceleration
    if state is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        # the tower's part is counted by itself: for a video, `signals` goes through `view_signals`
        stack.enter_context(_replaced(state, "view_signals", counter.counted(state.view_signals)))
        if state._head is not None:
            stack.enter_context(_replaced(state._head, "forward", counter.counted(state._head.forward)))
        for method in state.pipeline.methods:
            for name in ("compress", "compress_views", "prefill"):
                if hasattr(method, name):
                    stack.enter_context(_replaced(method, name, counter.counted(getattr(method, name))))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    """An instance attribute for the time of the block, on frozen dataclasses, too."""
    object.__setattr__(owner, name, value)
    try:
        yield
    finally:
        object.__delattr__(owner, name)


def reset_peak_memory(device: torch.device) -> bool:
    """Forget the former peak; whether this machine can tell the next one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # Linux: the peak of the resident set
    except OSError:
        return False
    return True


def peak_memory(device: torch.device, known: bool) -> int | None:
    """Bytes since :func:`reset_peak_memory`: torch's allocations on CUDA, resident memory of the process on a CPU."""
    if not known:
        return None
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
