"""StreamingLLM: efficient streaming language models with attention sinks (ICLR 2024, arXiv 2309.17453).

A rule for the KV cache between calls, without scores and blind to modalities: the first tokens (attention sinks) and
the last ones stay, what lies between is freed and gone. Tokens then stand at their places in the cache. Three forms:

* ``policy="after"``: the cache is trimmed after every call, as the authors' perplexity script does.
* ``policy="for_space"``: before every later turn of a chat, room is made for the turn and its answer, as the authors'
  chat example does; nothing is evicted while tokens are generated.
* ``budget``: once, after the prompt, as EffiVLM-Bench ports the method to multimodal models. There the first part is
  nine tenths of the budget, and positions stay those of the prompt.

With visual tokens early in a prompt and few recent tokens, almost all of them are lost: this is a baseline for the
decode stage. All rules and the differences to the official code: docs/methods/streamingllm.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from accelerate_methods.registry import register
from accelerate_methods.stages.decode import EvictMethod, EvictStep, Kept
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.fields import choice, flag, integer, real, share


@register("streamingllm")
@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingLLM(EvictMethod):
    """Hyper-parameters of StreamingLLM, defaults as in the official cache class.

    Attributes:
        start_size: A, number of first tokens that stay (the attention sinks); 0 is window attention.
        recent_size: R, number of last tokens that stay; 0 leaves the sinks alone.
        budget: instead of both, the share of a prompt that stays after it; what is generated is appended.
        window_fraction: of the ``budget``, the share that is taken from the end of the prompt.
        policy: when entries go: "after" every call, or "for_space" before every later turn.
        reserve: "for_space" only, tokens of the answer to make room for; None for ``max_new_tokens`` of ``generate``.
        pos_shift: entries that stay move up to their places in the cache; if False they keep the place at which they
            entered it, as in the official code with this switch off.
        original_positions: instead, positions stay those of the prompt, with gaps (not in the paper). What the prompts
            of models with several position ids per token need, and prefill methods.
    """

    title: ClassVar[str] = "StreamingLLM"
    paper: ClassVar[str] = "arXiv 2309.17453"
    code: ClassVar[str] = "mit-han-lab/streaming-llm@2e504260"
    licence: ClassVar[str] = "MIT"
    acts_on_text: ClassVar[bool] = True
    misleading: ClassVar[Mapping[str, str]] = {
        "cache_size": "give start_size and recent_size, whose sum it is",
        "max_new_tokens": "give reserve, the tokens to make room for, or nothing: generate knows its max_new_tokens",
    }

    start_size: int | None = integer(4, low=0, budget="sizes")
    recent_size: int | None = integer(512, low=0, budget="sizes")
    budget: float | None = share(None, budget=True, aliases=("budgets",))
    window_fraction: float = real(0.1, low=0, high=1)
    policy: str = choice("after", "after", "for_space")
    reserve: int | None = integer(None, low=0)
    pos_shift: bool = flag(True)
    original_positions: bool = flag(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is None and self.start_size + self.recent_size == 0:
            raise MethodError("streamingllm: start_size and recent_size are both 0; something has to stay.")

    @property
    def cache_positions(self) -> str:
        if self.budget is not None or self.original_positions:
            return "original"
        return "cache" if self.pos_shift else "entered"

    @property
    def checks_drafts(self) -> bool:
        return self.budget is not None or self.policy == "for_space"

    def evict(self, step: EvictStep) -> Kept | None:
        if self.budget is not None:
            if (step.when, step.call) != ("after", "prompt"):
                return None
            first, last = budget_ends(step.real, self.budget, self.window_fraction)
            return step.ends(first, last, most=max(1, int(step.entries * self.budget)))
        size = self.start_size + self.recent_size
        if self.policy == "after":
            return step.ends(self.start_size, self.recent_size) if step.when == "after" else None
        if (step.when, step.call) != ("before", "turn"):
            return None
        reserve = step.reserved if self.reserve is None else self.reserve
        if step.entries + step.coming + reserve <= size:
            return None
        coming = (step.coming if step.arriving is None else step.arriving) + reserve
        first, last = space_ends(step.real, coming, self.start_size, self.recent_size)
        least = reserve + (step.coming if step.arriving is None else 1)
        return step.ends(first, last, most=self.start_size + max(self.recent_size - least, 0))


def space_ends(
    entries: int | Tensor, coming: int | Tensor, start_size: int, recent_size: int
) -> tuple[int | Tensor, int | Tensor]:
    """How many of the first and of the last entries stay so that ``coming`` tokens find room; [B, 1] each if one is.

    As long as all fit, all stay. More coming tokens than ``recent_size`` leave the first ones alone, and the cache then
    grows beyond both sizes.
    """
    left = recent_size - coming
    if not isinstance(entries, Tensor) and not isinstance(coming, Tensor):
        fits = entries + coming <= start_size + recent_size
        return (start_size, entries) if fits else (start_size, max(left, 0))
    fits = entries + coming <= start_size + recent_size
    left = torch.as_tensor(left, device=fits.device).clamp(min=0)
    return start_size, torch.where(fits, torch.as_tensor(entries, device=fits.device), left)


def budget_ends(entries: int | Tensor, budget: float, window_fraction: float) -> tuple[int | Tensor, int | Tensor]:
    """How many of the first and of the last ``entries`` stay; [B, 1] each if the entries are."""
    if isinstance(entries, Tensor):  # as Python counts: products in float64, cut to whole numbers
        cap = (entries.double() * budget).long().clamp(min=1)
        window = (cap.double() * window_fraction).long().clamp(min=1)
    else:
        cap = max(1, int(entries * budget))
        window = max(1, int(cap * window_fraction))
    return cap - window, window
