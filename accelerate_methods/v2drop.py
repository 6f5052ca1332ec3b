"""V2Drop: variation-aware dropping of vision tokens (CVPR 2026, arXiv 2509.01552).

Before a few decoder layers the visual tokens go whose hidden state the layer that has just run changed least: the L2
norm of what its attention and MLP added to the residual stream. No attention is looked at and no text, so the score
costs two reads of the hidden states. Text stays, kept tokens keep order and position ids.

Official code exists for LLaVA-1.5 and Qwen2-VL, for one span of visual tokens in one sample; counts there, and here,
are shares of what the layer before had. All rules and differences: docs/methods/v2drop.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from accelerate_methods.registry import register
from accelerate_methods.stages.fields import choice, flag, integer, reals, share
from accelerate_methods.stages.prefill import PrefillStep, Selection, VisualSpan
from accelerate_methods.stages.staged import StagedPrefillMethod


@register("v2drop")
@dataclasses.dataclass(frozen=True, kw_only=True)
class V2Drop(StagedPrefillMethod):
    """Hyper-parameters of V2Drop, defaults as released for LLaVA-1.5 (203 of 576 tokens as a mean over 32 layers).

    Exactly one of ``keep_ratio_list``, ``retention_ratio`` and ``tokens_per_image`` says how many visual rows (the
    newlines inside an image or video are among them) go on.

    Attributes:
        layer_list: decoder layers (0-based) before which tokens go; None for the released ones, 3, 17, 22, or, where a
            decoder has no such layers, those at the same depth.
        keep_ratio_list: for each of them the share of the rows still there that goes on, int(n * share).
        retention_ratio: the share of all rows that is left behind the last of the layers instead; every one of them
            leaves the same share of what is there.
        tokens_per_image: the number that is left behind the last of the layers instead, per image or video.
        keep_one: whether one row stays where int() gives none, as in the release; False lets them all go.
        metric: how far apart a row's states before and after a layer are: "l2", "l1", or "cosine" as in the first
            release.
    """

    title: ClassVar[str] = "V2Drop"
    paper: ClassVar[str] = "arXiv 2509.01552"
    code: ClassVar[str] = "xuyang-liu16/V2Drop@219e03ed"
    licence: ClassVar[str] = "Apache-2.0"
    positions: ClassVar[str] = "original"
    released_layers: ClassVar[tuple[int, ...]] = (3, 17, 22)

    keep_ratio_list: tuple[float, ...] | None = reals((0.5, 0.5, 0.0), low=0, high=1, budget=True)
    retention_ratio: float | None = share(None, budget=True)
    tokens_per_image: int | None = integer(None, low=1, budget=True)
    keep_one: bool = flag(True)
    metric: str = choice("l2", "l2", "l1", "cosine")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_ratio_list is not None:
            self.check_shares("keep_ratio_list", self.keep_ratio_list)

    def prefill(self, step: PrefillStep) -> Selection | None:
        left, stage = step.left().block, self.stage_of(step)
        kept = [self.keep_count(n, spans, stage) for n, spans in zip(left, step.spans, strict=True)]
        if kept == left:
            return None
        return step.keep_best(variation(step.entered(), step.hidden_states, self.metric), kept)

    def keep_count(self, left: int, spans: Sequence[VisualSpan], stage: int) -> int:
        """Rows that go on of ``left``, what a sample's images and videos have at layer number ``stage`` of the list."""
        least = min(left, int(self.keep_one))
        if self.keep_ratio_list is not None:
            return max(least, int(left * self.keep_ratio_list[stage]))  # the product in float64, truncated
        return min(left, max(least, self.rows_behind(stage, spans)))


def variation(before: Tensor, after: Tensor, metric: str = "l2") -> Tensor:
    """[...] float32: how much a layer changed each state, the more the larger.

    Args:
        before, after: [..., D] what entered the layer and what came out of it, residual stream included.
        metric: "l2" or "l1", the norm of the difference; "cosine", the negative similarity.
    """
    before, after = before.detach(), after.detach().float()
    if metric == "cosine":
        return -functional.cosine_similarity(after, before.float(), dim=-1)
    return torch.linalg.vector_norm(after - before, ord=2 if metric == "l2" else 1, dim=-1)
