"""Prefill methods that drop tokens before several decoder layers, stage after stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.fields import integers
from accelerate_methods.stages.prefill import PrefillMethod, PrefillStep, VisualSpan, same_depth


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagedPrefillMethod(PrefillMethod):
    """Adds where tokens go.

    A method has budgets of its own, ``retention_ratio`` and ``tokens_per_image`` among them, which say how many rows
    are left behind the last stage (:meth:`rows_behind`).

    Class attributes:
        released_layers: the layers of the release, of a decoder of 32.

    Attributes:
        layer_list: decoder layers (0-based) before which tokens go; None for the released ones, or, where a decoder has
            no such layers, those at the same depth.
    """

    released_layers: ClassVar[tuple[int, ...]] = ()

    layer_list: tuple[int, ...] | None = integers(None, low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer_list is not None:
            self.check_rising("layer_list", self.layer_list)

    def check_shares(self, field: str, shares: Sequence[float]) -> None:
        """For ``__post_init__``: MethodError unless there is one share for each layer."""
        if len(shares) != self.num_drops:
            raise MethodError(
                f"{self.name}: {self.num_drops} layers in layer_list need as many shares in {field}, got {len(shares)}."
            )

    @property
    def num_drops(self) -> int:
        """How often tokens go."""
        return len(self.layer_list or self.released_layers)

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Decoder layers before which tokens go."""
        layers = self.layer_list or same_depth(self.released_layers, num_layers)
        self.check_depth("layer_list", layers, num_layers)
        return layers

    def prefill_layers(self, num_layers: int) -> tuple[int, ...]:
        return self.layers(num_layers)

    def stage_of(self, step: PrefillStep) -> int:
        """Number of the stage that ends before this step's layer, 0-based."""
        return self.layers(step.num_layers).index(step.layer)

    def rows_behind(self, stage: int, spans: Sequence[VisualSpan]) -> int:
        """Rows of a sample's images and videos behind a stage, of which each leaves the same share.

        As ``retention_ratio`` says, or ``tokens_per_image``, of the last one.
        """
        total = sum(span.length for span in spans)
        ratio = self.retention_ratio
        if ratio is None:
            ratio = min(1.0, self.tokens_per_image * len({span.item for span in spans}) / max(total, 1))
        return round(total * ratio ** ((stage + 1) / self.num_drops))
