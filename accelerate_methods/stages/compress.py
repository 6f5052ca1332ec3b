"""One image or video between the vision side and the language model, before and after compression."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from accelerate_methods.stages.contract import check_kept
from accelerate_methods.stages.encode import PatchMap
from accelerate_methods.stages.frames import FrameMap
from accelerate_methods.stages.method import Method
from accelerate_methods.stages.printing import ShapesShown
from accelerate_methods.stages.shapes import ItemShape
from accelerate_methods.stages.signals import pick_signal
from accelerate_methods.stages.views import CompressedViews, Views


@dataclasses.dataclass(repr=False)
class VisualItem(ShapesShown):
    """The visual tokens of one image or video as the uncompressed model would feed them to the LLM.

    The uncompressed sequence ("layout") has ``length`` rows: F*N content tokens and S structural ones (newlines).

    Attributes:
        modality: "image" or "video".
        features: [F, N, D] content tokens; F frames of a video, 1 for an image (all of its crops in one row).
        positions: [F, N] row of each content token in the layout.
        length: rows of the layout.
        layout: newline arrangement: "flat", "one_token", "grid", "frame", "no_token" or "anyres".
        grid: (rows, columns) of a frame's token grid with rows*columns == N, or None when there is no single grid.
        newlines: [S, D] structural tokens.
        newline_positions: [S] their rows in the layout.
        newline_of: [length] for each layout row the index (0..S-1) of the newline that closes its row/frame, else -1.
        keep_all_newlines: whether newlines stay even if nothing in their row/frame does.
        signals: what the method asked for (see :data:`.signals.SIGNALS`).
        source: [N] flat index (view*P + patch) of each content token of an image; None for videos, and where tokens are
            mixtures of patches.
        views: an image's patch features before the projector, for a method that acts there. ``features`` and
            ``newlines`` are then placeholders of width 1.
        question: what the user asks about it, None if nobody said (a method that needs it: ``Method.needs_question``).
        patches: where the encoder's patches are, if a method inside the encoder has left tokens without a grid.
        frames: where the video's frames went, if a method inside the encoder has merged some; ``features`` are those
            that are left.
        full_tokens, full_length: content tokens and layout rows of the dense model, where a sample stage made the input
            smaller or an encode stage merged tokens; None otherwise.
    """

    modality: str
    features: Tensor
    positions: Tensor
    length: int
    layout: str = "flat"
    grid: tuple[int, int] | None = None
    newlines: Tensor | None = None
    newline_positions: Tensor | None = None
    newline_of: Tensor | None = None
    keep_all_newlines: bool = False
    signals: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    source: Tensor | None = None
    views: Views | None = None
    question: str | None = None
    patches: PatchMap | None = None
    frames: FrameMap | None = None
    full_tokens: int | None = None
    full_length: int | None = None

    @property
    def num_frames(self) -> int:
        return self.features.shape[0]

    @property
    def tokens_per_frame(self) -> int:
        return self.features.shape[1]

    @property
    def num_tokens(self) -> int:
        """Content tokens F*N (newlines not counted)."""
        return self.features.shape[0] * self.features.shape[1]

    @property
    def frame_rows(self) -> int | None:
        """Rows of the layout that each frame of a video takes, newlines included; None for an image."""
        if self.modality != "video":
            return None
        return (self.length - (self.layout == "one_token")) // self.num_frames

    @property
    def shape(self) -> ItemShape:
        return ItemShape(self.num_frames, self.tokens_per_frame, self.grid, self.length)

    def tell_frames(self, frames: FrameMap) -> None:
        """That its frames are those which are left of more."""
        self.frames = frames
        self.patches = frames.patch_map(self.tokens_per_frame, self.grid, self.features.device)

    def signal(self, *names: str) -> Tensor:
        """A declared signal, or the first of several that is there; having none is the host's fault."""
        return pick_signal(self.signals, names, self.modality)

    def dense(self) -> Tensor:
        """[length, D] the uncompressed sequence."""
        flat = self.features.flatten(0, 1)
        if self.newlines is None:
            return flat  # content only: already in layout order
        out = flat.new_empty(self.length, flat.shape[-1])
        out[self.positions.flatten()] = flat
        out[self.newline_positions] = self.newlines.to(out.dtype)
        return out




@dataclasses.dataclass(repr=False)
class Compressed(ShapesShown):
    """What a compress stage gives back.

    Attributes:
        tokens: [K, D] content tokens that go on.
        positions: [K] layout row at which each stands (the row of the token that it was, or of the anchor that others
            were merged into).
        owner: [F, N] for every original content token the index (0..K-1) of the output token that holds it, -1 if none
            does. This is the provenance that pictures, statistics and tests read.
        info: what else the method can say (segment sizes, per-frame counts); its prefill stage gets it.
        order: "layout" sorts the tokens by ``positions``; "given" keeps them as they are here (a newline then closes
            those of its row or frame, too).
        newlines: "closing" keeps those whose row or frame still holds a token, "all" keeps every one, "behind" too but,
            with order "given", those of a video's frame behind all of its tokens; "last" only one after everything;
            "each": one behind every token, a copy of that which closes its row or frame.
        frame_marks: False drops the tokens that some models put around each frame of a video (Qwen3-VL).
    """

    tokens: Tensor
    positions: Tensor
    owner: Tensor
    info: dict[str, object] = dataclasses.field(default_factory=dict)
    order: str = "layout"
    newlines: str = "closing"
    frame_marks: bool = True

    @classmethod
    def of_rows(cls, features: Tensor, rows: Tensor, **rest: Any) -> Compressed:
        """With the rows [K] of ``features`` [M, D] for its tokens.

        They are copied when ``tokens`` is asked for; where a sequence is laid out they are not, but copied once, to
        where they stand in it.
        """
        made = cls(tokens=features, **rest)
        del made.tokens
        made._source = features, rows
        return made

    @property
    def source(self) -> tuple[Tensor, Tensor] | None:
        """(features, rows) of tokens that nobody has asked for yet; None where there are ``tokens``."""
        return None if "tokens" in self.__dict__ else self.__dict__.get("_source")

    def __getattr__(self, name: str) -> Any:  # of what is not there
        if name != "tokens" or "_source" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        features, rows = self._source
        self.tokens = features.index_select(0, rows)
        return self.tokens










def selection(
    item: VisualItem, kept: Tensor, info: dict[str, object] | None = None, order: str = "layout"
) -> Compressed:
    """Compressed form of a pure selection: ``kept`` [K] are flat content indices (frame*N + token), in output order."""
    check_kept(kept, item.num_tokens)
    owner = torch.full((item.num_tokens,), -1, dtype=torch.long, device=item.features.device)
    owner[kept] = torch.arange(kept.shape[0], device=kept.device)
    return Compressed.of_rows(
        item.features.flatten(0, 1),
        kept,
        positions=item.positions.flatten()[kept],
        owner=owner.view(item.num_frames, item.tokens_per_frame),
        info=info or {},
        order=order,
    )


def everything(item: VisualItem, info: dict[str, object] | None = None) -> Compressed:
    """Compressed form of an item of which every token stays."""
    return selection(item, torch.arange(item.num_tokens, device=item.features.device), info)


def frame_merge(item: VisualItem, tokens: Tensor, places: Tensor, slot: Tensor) -> Compressed:
    """Compressed form of tokens that hold others, as many in every frame, in the order given where the layout allows.

    Args:
        tokens: [F, K, D]; places: [F, K] the tokens of the frame at which they stand, each once.
        slot: [F, N] which token of its frame holds each original one, -1 if none does.
    """
    frames, each = places.shape
    first = torch.arange(0, frames * each, each, device=slot.device)[:, None]
    return Compressed(
        tokens=tokens.flatten(0, 1),
        positions=item.positions.gather(1, places).flatten(),
        owner=torch.where(slot >= 0, slot + first, slot),
        order="layout" if item.layout == "grid" else "given",
    )


class CompressMethod(Method):
    """Acts on the visual tokens between vision side and language model.

    ``compress`` gets one image or video as a :class:`VisualItem` (features, layout and the
    declared signals) and returns the tokens that go on, where they stand, and for every original token which output
    token holds it.
    """

    stage = "compress"
    #: whether ``Compressed.frame_marks`` of what it shortens: serving engines have to know beforehand
    frame_marks: ClassVar[bool] = True

    def compress(self, item: VisualItem) -> Compressed:
        raise NotImplementedError

    def count(self, shape: ItemShape) -> int | None:
        """Content tokens that go on of an image or video of this form, before anything of it is encoded.

        Newlines are not among them. None where what the item shows decides how many stay.
        """
        return None


class ViewCompressMethod(CompressMethod):
    """Compresses images view by view, before the projector; videos as every compress method.

    The views of an image are its anyres base and tiles, or the one view that there is. Their unpadding and newlines are
    a matter of what comes out (``CompressedViews.newlines``).
    """

    def compress_views(self, views: Views) -> CompressedViews | None:
        """What goes on of one image; None leaves it as the uncompressed model has it."""
        raise NotImplementedError
