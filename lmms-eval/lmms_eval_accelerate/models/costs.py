"""What one answer cost: measured by the recorder of ``accelerate_methods``, carried to the sample logs by lmms-eval.

lmms-eval writes ``token_counts.to_dict()`` of every answer into the samples file and gathers it over the ranks; a
subclass that adds keys is all it takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist
from lmms_eval.api.instance import TokenCounts
from lmms_eval.models.model_utils.gen_metrics import log_metrics

from accelerate_methods.engine.flops import prefill_macs
from accelerate_methods.engine.recording import RequestRecord

STAGES = ("vision", "compress", "prefill", "decode")

#: keys that are averaged over samples, as far as a model knows them
MEANS = (
    "visual_tokens_before",
    "visual_tokens_after",
    "visual_tokens_per_layer",
    "prompt_tokens_dense",
    "prompt_tokens",
    *(f"{stage}_ms" for stage in STAGES),
    "first_token_ms",
    "generate_ms",
    "llm_tflops_dense",
    "llm_tflops",
    "generated_tokens",
)
#: of trained architectures: work of the modules between vision tower and decoder layers; None: not counted
ARCHITECTURE_WORK = "architecture_tflops"
#: tokens of a prompt that is longer than the context (see ``SampleRecord``)
LONG_PROMPT = ("prompt_tokens_cut", "prompt_tokens_untrained", "prompt_tokens_over_dense")


@dataclasses.dataclass
class Costs(TokenCounts):
    """``TokenCounts`` with the keys of :data:`MEANS`, ``batch_size``, ``method``, ``warmup``, ``skipped``, what was
    kept of the visual tokens (``kept``, ``visual_tokens_by_layer``, ``modalities``), and how the prompt fits into the
    model's context: the keys of :data:`LONG_PROMPT`, ``prompt_limit``."""

    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), **self.extra}


def sample_costs(
    record: RequestRecord,
    config: Any,
    generated: list[int],
    elapsed_ms: float,
    method: str,
    warmup: bool,
) -> list[Costs]:
    """Costs of each sample of one ``generate`` call. Times are the call's, divided by its number of samples.

    ``config`` is the language model's. ``visual_tokens_after`` is what the first decoder layer gets,
    ``visual_tokens_per_layer`` the mean over all of them, ``visual_tokens_by_layer`` each one's number, and ``kept``
    the realised ratio: that mean as a share of the uncompressed number, None for a prompt of text alone.
    LLM work is the prefill of the decoder layers in tera multiply-accumulates (the papers' "FLOPs").
    """
    size = len(generated)
    beams = len(record.samples) // size  # a host may see the rows of a beam search
    stage_ms = record.stage_ms
    per_sample = []
    for number in range(size):
        index = number * beams
        sample = record.samples[index]
        # Without a decoder loop every layer sees the whole spliced sequence.
        layers = record.layer_lengths(index) or [sample.length] * config.num_hidden_layers
        before = sample.visual_tokens_before
        # what layers lack of the prompt are visual tokens
        by_layer = [sample.visual_tokens_after - sample.length + tokens for tokens in layers]
        extra = {
            "visual_tokens_before": before,
            "visual_tokens_after": sample.visual_tokens_after,
            "visual_tokens_per_layer": sum(by_layer) / len(by_layer),
            "visual_tokens_by_layer": by_layer,
            "kept": sum(by_layer) / len(by_layer) / before if before else None,
            "modalities": sorted({item.modality for item in sample.items}),
            "prompt_tokens_dense": sample.dense_length,
            "prompt_tokens": sample.length,
            "prompt_tokens_cut": sample.cut,
            "prompt_tokens_untrained": sample.untrained,
            "prompt_tokens_over_dense": sample.over_dense,
            "prompt_limit": sample.limit,
            **{f"{stage}_ms": stage_ms.get(stage, 0.0) / size for stage in STAGES},
            "generate_ms": elapsed_ms / size,
            "llm_tflops_dense": prefill_macs([sample.dense_length] * config.num_hidden_layers, config) / 1e12,
            "llm_tflops": (sample.prefill_macs or prefill_macs(layers, config)) / 1e12,
            "generated_tokens": generated[number],
            "batch_size": size,
            "method": method,
            "warmup": warmup,
        }
        per_sample.append(Costs(input_tokens=sample.length, output_tokens=generated[number], extra=extra))
    return per_sample


def skipped_costs(error: Exception, method: str) -> Costs:
    """Marks an answer that was not generated because its image or video could not be read."""
    return Costs(extra={"skipped": True, "error": str(error), "method": method, "warmup": False})


def summarise(costs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over samples without warm-up calls and skipped samples; with the warm-up if there is nothing else.

    Prompts longer than the context, and what was kept of the visual tokens, are counted over all answered samples.
    """
    costs = list(costs)
    answered = [c for c in costs if not c.get("skipped") and "prompt_tokens" in c]
    measured = [c for c in answered if not c.get("warmup")] or answered
    summary: dict[str, Any] = {
        "samples": len(costs),
        "skipped": sum(bool(c.get("skipped")) for c in costs),
        "warmup": sum(bool(c.get("warmup")) for c in answered),
        "measured": len(measured),
        "warmup_included": bool(measured) and all(c.get("warmup") for c in measured),
        **_long_prompts(answered),
        **_realised(answered),
    }
    for key in MEANS:
        if measured and all(key in c for c in measured):
            summary[key] = sum(c[key] for c in measured) / len(measured)
    own = [c.get(ARCHITECTURE_WORK) for c in measured]
    if own and None not in own:
        summary[ARCHITECTURE_WORK] = sum(own) / len(own)
    return summary


def _realised(costs: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The share of the visual tokens that was kept.

    ``kept``: mean over the LLM's layers and the answers; ``kept_least``, ``kept_most``: of an answer;
    ``kept_by_layer``: mean over the answers. ``kept_everything``: answers of which no layer lost any, out of those
    ``with_visual_tokens``; of these the ``modalities``, and the most visual tokens of one.
    """
    seen = [cost for cost in costs if cost.get("kept") is not None]
    if not seen:
        return {}
    ratios = [cost["kept"] for cost in seen]
    by_layer = zip(*([n / c["visual_tokens_before"] for n in c["visual_tokens_by_layer"]] for c in seen), strict=True)
    return {
        "kept": sum(ratios) / len(seen),
        "kept_least": min(ratios),
        "kept_most": max(ratios),
        "kept_by_layer": [sum(layer) / len(seen) for layer in by_layer],
        "kept_everything": sum(ratio >= 1 for ratio in ratios),
        "with_visual_tokens": len(seen),
        "visual_tokens_most": max(cost["visual_tokens_before"] for cost in seen),
        "modalities": sorted({kind for cost in seen for kind in cost["modalities"]}),
    }


def _long_prompts(costs: list[Mapping[str, Any]]) -> dict[str, int]:
    """How many prompts were longer than the context: each counts once, as cut or as running beyond the training."""
    tokens = [[cost.get(key) or 0 for key in LONG_PROMPT] for cost in costs]
    return {
        "prompts_cut": sum(cut > 0 for cut, _, _ in tokens),
        "prompts_untrained": sum(untrained > 0 and not cut for cut, untrained, _ in tokens),
        "prompts_over_dense": sum(over > 0 for _, _, over in tokens),
    }


def of_all_ranks(costs: list[dict[str, Any]], world_size: int) -> list[dict[str, Any]]:
    """The costs of the answers of all processes; every process must ask."""
    if world_size == 1 or not dist.is_initialized():
        return costs
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, costs)
    return [cost for part in everyone for cost in part]


def log_costs(costs: list[dict[str, Any]]) -> None:
    """Hand the means to lmms-eval, for the throughput section of its results."""
    seconds = sum(c.get("generate_ms", 0.0) for c in costs) / 1000.0
    tokens = sum(c.get("generated_tokens", 0) for c in costs)
    log_metrics(
        total_elapsed_time=seconds,
        total_gen_tokens=tokens,
        avg_speed=tokens / seconds if seconds else 0.0,
        additional_metrics={"total_requests": len(costs), **_numbers(summarise(costs))},
    )


def _numbers(summary: dict[str, Any]) -> dict[str, Any]:
    """What one line of lmms-eval's log can show."""
    return {key: value for key, value in summary.items() if isinstance(value, (int, float))}
