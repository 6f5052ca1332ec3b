"""A method inside the vision encoder: drop, after half of the blocks, the patches whose states have the smallest norm.

    export ACCELERATE_METHODS_IMPORT=$PWD/examples/encode_method.py     # now every command knows "loudest"
"""

import dataclasses
from typing import ClassVar

from accelerate_methods.ops.select import top_indices
from accelerate_methods.registry import register
from accelerate_methods.stages.encode import EncodeMethod, EncodeStep, Merge, keep
from accelerate_methods.stages.fields import share


@register("loudest")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Loudest(EncodeMethod):
    title: ClassVar[str] = "Loudest patches"

    retention_ratio: float = share(0.5, budget=True)

    def encode_blocks(self, num_blocks: int) -> tuple[int, ...]:
        return (num_blocks // 2,)

    def encode(self, step: EncodeStep) -> Merge | None:
        norms = step.hidden[:, step.special :].norm(dim=-1)
        count = max(1, int(self.retention_ratio * step.num_tokens))
        return None if self.retention_ratio == 1 or count >= norms.shape[1] else keep(step, top_indices(norms, count))
