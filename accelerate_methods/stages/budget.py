"""One language for "how many visual tokens may stay", shared by every method with a free budget."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.method import Method

if TYPE_CHECKING:
    from accelerate_methods.stages.compress import VisualItem


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetedMethod(Method):
    """Adds ``retention_ratio`` | ``tokens_per_image`` | ``tokens_per_frame``; exactly one must be given.

    Counts are floors, at least one token, and never more than there are. Structural tokens (newlines) are not part of
    the budget. ``tokens_per_image`` is the budget of one visual item as a whole (an image with all its crops, or a
    video); ``tokens_per_frame`` counts per frame of a video and per image otherwise.
    """

    retention_ratio: float | None = None
    tokens_per_image: int | None = None
    tokens_per_frame: int | None = None

    def __post_init__(self) -> None:
        self._check_number("retention_ratio", low=0.0, high=1.0, open_low=True)
        self._check_number("tokens_per_image", low=1, integer=True)
        self._check_number("tokens_per_frame", low=1, integer=True)
        given = [n for n in ("retention_ratio", "tokens_per_image", "tokens_per_frame") if getattr(self, n) is not None]
        if len(given) != 1:
            got = ", ".join(given) or "none"
            raise MethodError(
                f"{self.name}: give exactly one budget out of retention_ratio, tokens_per_image, tokens_per_frame "
                f"(got {got})."
            )

    def budget(self, item: VisualItem) -> int:
        """Tokens of ``item`` that may stay, 1 <= budget <= F*N."""
        total = item.num_tokens
        if self.retention_ratio is not None:
            wanted = floor_share(total, self.retention_ratio)
        elif self.tokens_per_image is not None:
            wanted = self.tokens_per_image
        else:
            wanted = self.tokens_per_frame * item.num_frames
        return max(1, min(wanted, total))


def floor_share(count: int, ratio: float) -> int:
    """``int(count * ratio)`` as the official codes compute it: float64 product, truncated."""
    return int(count * ratio)
