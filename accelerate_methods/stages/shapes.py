"""What is known of an image or video before it is encoded: enough to say how many tokens some methods keep."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ItemShape:
    """The form of one image or video as plain numbers.

    A serving engine reserves rows of the prompt before the vision encoder runs: it describes the item like this and
    asks ``method.count(shape)``. ``VisualItem`` and ``Views`` say theirs as ``shape``.

    Attributes:
        num_frames: F of a video, 1 for an image. For a method that acts before the projector (``on_views``): the views
            of the image, V.
        tokens_per_frame: N, content tokens of each frame; with ``on_views`` P, patches of each view.
        grid: (rows, columns) of a frame's tokens or a view's patches, None where there is no single grid.
        length: rows of the uncompressed layout, newlines included. Not given: there are no newlines.
        dense: content tokens where nothing is compressed; a view's padding is not among them. Not given: F*N.
    """

    num_frames: int
    tokens_per_frame: int
    grid: tuple[int, int] | None = None
    length: int | None = None
    on_views: bool = False
    dense: int | None = None

    def __post_init__(self) -> None:
        for name in ("dense", "length"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.num_tokens)  # the dataclass is frozen

    @property
    def num_tokens(self) -> int:
        """F*N."""
        return self.num_frames * self.tokens_per_frame

    def of_each(self, count: int) -> int:
        """Tokens where ``count`` of each frame or view stay: ``dense`` where that is all of them."""
        return self.dense if count >= self.tokens_per_frame else self.num_frames * count
