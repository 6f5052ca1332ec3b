"""The sample stage: what the vision encoder is shown."""

from __future__ import annotations

from accelerate_methods.stages.method import Method


class SampleMethod(Method):
    """Acts on the input frames or pixels before the vision encoder."""

    stage = "sample"

    def input_side(self, side: int, patch: int) -> int:
        """Side in pixels (a multiple of ``patch``) that a ``side`` x ``side`` view is resized to."""
        return side
