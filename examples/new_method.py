"""A method that is not part of the project: keep the tokens that differ most from the mean of their frame.

    python examples/new_method.py                                       # measure it on a tiny model
    export ACCELERATE_METHODS_IMPORT=$PWD/examples/new_method.py        # now every command knows "outliers"
"""

import dataclasses
from typing import ClassVar

from accelerate_methods.ops.select import mask_to_indices, top_mask
from accelerate_methods.registry import register
from accelerate_methods.stages.budget import BudgetedMethod
from accelerate_methods.stages.compress import Compressed, CompressMethod, VisualItem, selection


@register("outliers")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Outliers(BudgetedMethod, CompressMethod):
    title: ClassVar[str] = "Outliers"
    positions: ClassVar[str] = "original"

    def compress(self, item: VisualItem) -> Compressed:
        distance = (item.features - item.features.mean(1, keepdim=True)).norm(dim=-1).flatten()[None]
        count = self.budget(item)
        return selection(item, mask_to_indices(top_mask(distance, count), count)[0])


if __name__ == "__main__":
    import sys

    from accelerate_methods.bench.cli import main

    raise SystemExit(main(["--model", "tiny", "--methods", "outliers@0.25 random@0.25", *sys.argv[1:]]))
