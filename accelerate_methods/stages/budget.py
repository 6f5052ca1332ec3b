"""One language for "how many visual tokens may stay", shared by every method with a free budget."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from accelerate_methods.stages.fields import integer, share
from accelerate_methods.stages.method import Method

if TYPE_CHECKING:
    from accelerate_methods.stages.compress import VisualItem
    from accelerate_methods.stages.shapes import ItemShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetedMethod(Method):
    """Adds ``retention_ratio`` | ``tokens_per_image`` | ``tokens_per_frame``; exactly one must be given.

    Counts are floors, at least one token, and never more than there are. Structural tokens (newlines) are not part of
    the budget. ``tokens_per_image`` is the budget of one visual item as a whole (an image with all its crops, or a
    video); ``tokens_per_frame`` counts per frame of a video and per image otherwise.

    Attributes:
        retention_ratio: share of the tokens that stay.
        tokens_per_image: their number instead, of an image with all its crops or a whole video.
        tokens_per_frame: their number instead, per frame of a video, per image otherwise.
    """

    retention_ratio: float | None = share(None, budget=True)
    tokens_per_image: int | None = integer(None, low=1, budget=True)
    tokens_per_frame: int | None = integer(None, low=1, budget=True)

    def budget(self, item: VisualItem | ItemShape) -> int:
        """Tokens of ``item`` that may stay, 1 <= budget <= F*N."""
        total = item.num_tokens
        if self.retention_ratio is not None:
            wanted = floor_share(total, self.retention_ratio)
        elif self.tokens_per_image is not None:
            wanted = self.tokens_per_image
        else:
            wanted = self.tokens_per_frame * item.num_frames
        return max(1, min(wanted, total))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewBudgetedMethod(Method):
    """Adds budgets of which every view of an image, or frame of a video, has an equal part.

    Attributes:
        retention_ratio: share of the tokens of each view or frame that stay, to the nearest count, half to even.
        tokens_per_image: their number instead: of an image with all its views, which have equal parts of it (rounded
            down, at least one), or of a whole video.
        tokens_per_view: their number instead, of each view or frame.
    """

    retention_ratio: float | None = share(None, budget=True)
    tokens_per_image: int | None = integer(None, low=1, budget=True)
    tokens_per_view: int | None = integer(None, low=1, budget=True)

    def view_budget(self, per_view: int, views: int) -> int:
        """Tokens that stay of each of ``views`` views or frames of ``per_view``, 1 <= budget <= per_view."""
        if self.tokens_per_view is not None:
            wanted = self.tokens_per_view
        elif self.tokens_per_image is not None:
            wanted = self.tokens_per_image // views
        else:
            wanted = round(per_view * self.retention_ratio)
        return max(1, min(wanted, per_view))


def nearest_share(count: int, ratio: float) -> int:
    """The nearest whole number to ``count * ratio``, halves up, at least one."""
    return max(1, int(count * ratio + 0.5))


def floor_share(count: int, ratio: float) -> int:
    """``int(count * ratio)`` as the official codes compute it: float64 product, truncated."""
    return int(count * ratio)
