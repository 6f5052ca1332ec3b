"""What the decoder loop shows a method, and what the method gives back. Free of transformers, as methods are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from accelerate_methods.ops.select import on_device, right_aligned_indices, top_mask
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.method import Method
from accelerate_methods.stages.printing import ShapesShown


@dataclasses.dataclass(frozen=True)
class VisualSpan:
    """Where one image or video stands in a prompt. Plain integers: no device read is needed.

    Attributes:
        start: first row in the padded prompt; length: rows, newlines included.
        modality: "image" or "video".
        num_content: rows that are visual tokens (the others are newlines).
        info: what the compress stage said about it (``Compressed.info``); empty where nothing was compressed.
        item: number of the image or video, unique within its sample. One with text in between has several spans.
        frames: of a video, 1 of an image; frame_rows: rows that a frame takes in the uncompressed layout, its newlines
            included; None where not every frame takes as many.
    """

    start: int
    length: int
    modality: str
    num_content: int
    info: dict[str, object] = dataclasses.field(default_factory=dict)
    item: int = 0
    frames: int = 1
    frame_rows: int | None = None

    @property
    def end(self) -> int:
        return self.start + self.length


def num_items(spans: Sequence[VisualSpan]) -> int:
    """Images and videos of which these are the spans; one with text in between counts once."""
    return len({span.item for span in spans})


@dataclasses.dataclass(repr=False)
class Selection(ShapesShown):
    """Tokens that go on after a prefill stage.

    Attributes:
        indices: [B, K] positions in the sequence that the layer got; ascending where ``order`` is "layout".
        valid: [B, K] False where a sample has fewer than K (padding stands on the left); None if all are real.
        hidden_states: [B, L, D] replacement states to gather from (for methods that merge), or None. A row that a
            method makes out of several takes the place of one of them, wherever it then stands.
        trim_cache: also cut the KV cache of the layers already run.
        positions: "original" keeps position ids (gaps); "compact" re-numbers from 0 for the layers to come, which
            generated tokens then continue.
        owner: [B, L] for every row that the layer got the index (0..K-1) of the row that holds it now, -1 if none does;
            None where nothing was merged: those that go on hold themselves.
        order: "layout" for ascending indices, "given" for those of a method that moves rows.
    """

    indices: Tensor
    valid: Tensor | None = None
    hidden_states: Tensor | None = None
    trim_cache: bool = False
    positions: str = "original"
    owner: Tensor | None = None
    order: str = "layout"

    @classmethod
    def of_rows(cls, rows: Sequence[Tensor], owners: Sequence[Tensor] | None = None, **kwargs: Any) -> Selection:
        """From the rows of each sample, [K_b] positions that may differ in number.

        Args:
            owners: for each sample, [L] the number (0..K_b-1) of the row that holds each row of the layer, -1 if none.
        """
        longest = max(len(part) for part in rows)
        missing = [longest - len(part) for part in rows]
        indices = torch.stack([_left_padded(part, longest) for part in rows])
        valid = None
        if any(missing):
            slots = torch.arange(longest, device=indices.device)
            valid = slots >= on_device(missing, indices.device)[:, None]
        if owners is not None:
            shifted = [torch.where(own >= 0, own + more, own) for own, more in zip(owners, missing, strict=True)]
            kwargs["owner"] = torch.stack(shifted)
        return cls(indices=indices, valid=valid, **kwargs)

    @classmethod
    def from_mask(cls, keep: Tensor, **kwargs: Any) -> Selection:
        """From a boolean [B, L]; one device read, since how many rows there are is what the sizes to come depend on."""
        if keep.shape[0] == 1:
            return cls(indices=keep[0].nonzero().squeeze(1)[None], **kwargs)
        indices, valid = right_aligned_indices(keep, keep.sum(1).tolist())
        return cls(indices=indices, valid=valid, **kwargs)


def _left_padded(rows: Tensor, length: int) -> Tensor:
    return torch.cat([rows.new_zeros(length - len(rows)), rows]) if len(rows) < length else rows


@dataclasses.dataclass(repr=False)
class RowPlaces(ShapesShown):
    """Where the rows of a sequence stand in their images and videos; all [B, L], -1 at text.

    Attributes:
        item: number of the image or video, unique within its sample.
        frame: of the video, 0 in an image; -1 at what belongs to no frame (the newline behind a whole video).
        place: row within the frame as the uncompressed model lays it out, newlines included; the same place in two
            frames is the same spot of the picture.
    """

    item: Tensor
    frame: Tensor
    place: Tensor


@dataclasses.dataclass(frozen=True)
class Left:
    """What is left of a batch of prompts, counted on the host.

    Attributes:
        block: rows of the method's items in each sample, newlines included; real: all of its rows but padding.
        cuts: ``PrefillStep.cuts`` for which this holds.
    """

    block: list[int]
    real: list[int]
    cuts: int


class PrefillStep:
    """What a prefill method sees before decoder layer ``layer``, or inside it.

    Attributes:
        layer: 0-based index of the layer about to run; num_layers: how many there are.
        inside: False before the layer; True between its attention and its MLP, where ``hidden_states`` is the residual
            stream with the attention added.
        hidden_states: [B, L, D].
        visual: [B, L] True at visual tokens; block: [B, L] the same with the newlines of an image or video. Items of
            other modalities than the method's own count as text.
        valid: [B, L] False at padding, or None.
        position_ids: [B, L].
        spans: per sample, where the method's items stood in the prompt (``rows`` leads from here to there).
        rows: [B, L] row of the prompt that each row was, None as long as nothing has been dropped.
        lengths: real tokens of each sample's prompt; num_heads: query heads of the decoder.
        memory: dict that lives as long as the prompt is read, for what one layer leaves to the next.
        cuts: how many selections, of any method, have been made in this prompt so far.
        rotary: (cos, sin) tables of the rows, [B or 1, L, d] each.

    Padding stands on the left, so the last row is the last prompt token of every sample.
    """

    def __init__(self, loop: Any, layer: int, *, number: int = 0, inside: bool = False):
        self._loop = loop
        self.layer, self.inside = layer, inside
        self.num_layers = len(loop.layers)
        rows = loop.rows
        self.hidden_states = rows.hidden
        self.visual = rows.masks["visual", number]
        self.block = rows.masks["block", number]
        self.valid = rows.valid
        self.position_ids = rows.position_ids
        self.spans = loop.spans[number]
        self.rows = rows.kept
        self.lengths = loop.layout.lengths
        self.num_heads = loop.config.num_attention_heads
        self.memory: dict[str, Any] = loop.memories[number]
        self.cuts: int = rows.cuts
        self.rotary = rows.rope

    @property
    def text(self) -> Tensor:
        """[B, L] True at real rows that none of the method's items holds."""
        return ~self.block if self.valid is None else ~self.block & self.valid

    def attention(
        self, rows: Tensor, *, rotary: bool = True, causal: bool = True, upcoming: bool = False
    ) -> Tensor:
        """Attention probabilities [B, H, R, L] for the query positions ``rows`` [R], or [B, R] of each sample, only.

        Of the layer that has last attended: ``layer - 1``, or ``layer`` itself inside of it. ``upcoming``: of
        ``layer``, which has not run yet, as it would attend to the rows that stand here. Softmax in float32, returned
        in the model dtype. ``rotary=False`` gives position-free scores, ``causal=False`` lets every row see every key;
        padding is never seen.
        """
        layer = self._attended(upcoming)
        return self._loop.attention_rows(layer, rows, self.valid, rotary=rotary, causal=causal, upcoming=upcoming)

    def left(self) -> Left:
        """How many rows of the method's items, and rows at all, each sample still has.

        The device is read only where another method has dropped rows since this one last did.
        """
        known: Left | None = self.memory.get("left")
        if known is not None and known.cuts == self.cuts:
            return known
        if self.cuts == 0:
            return Left([sum(span.length for span in spans) for spans in self.spans], list(self.lengths), 0)
        real = torch.ones_like(self.block) if self.valid is None else self.valid
        counts = torch.stack([self.block.sum(1), real.sum(1)]).tolist()
        return Left(*counts, self.cuts)

    def tails(self) -> list[int]:
        """Rows of text behind the last of the method's items in each sample, all of them where it has none."""
        length = self._loop.layout.visual.shape[1]
        behind = [length - max((span.end for span in spans), default=0) for spans in self.spans]
        return [min(rows, real) for rows, real in zip(behind, self.lengths, strict=True)]

    def keep(self, rows: Tensor, counts: Sequence[int], **kwargs: Any) -> Selection:
        """All text, and ``rows`` [B, L] of the method's items, ``counts`` of each sample; ``kwargs`` of Selection."""
        left = self.left()
        real = [every - block + count for every, block, count in zip(left.real, left.block, counts, strict=True)]
        indices, valid = right_aligned_indices((rows & self.block) | self.text, real)
        self.memory["left"] = Left(list(counts), real, self.cuts + 1)
        return Selection(indices=indices, valid=valid, **kwargs)

    def keep_best(self, scores: Tensor, counts: Sequence[int], **kwargs: Any) -> Selection:
        """:meth:`keep` of the ``counts`` rows of each sample's items with the highest ``scores`` [B, L]."""
        return self.keep(top_mask(scores.masked_fill(~self.block, -torch.inf), counts), counts, **kwargs)

    def keys(self, *, rotary: bool = True, upcoming: bool = False) -> Tensor:
        """[B, G, L, d] key states of the layer that :meth:`attention` is about, one per key head."""
        return self._loop.key_rows(self._attended(upcoming), rotary=rotary, upcoming=upcoming)

    def entered(self) -> Tensor:
        """[B, L, D] the rows as they entered the layer that :meth:`attention` is about."""
        self._attended(upcoming=False)
        return self._loop.attended.entered()

    def final_normed(self) -> Tensor:
        """[B, L, D] the hidden states through the norm that stands behind the last layer."""
        return self._loop.layers.norm(self.hidden_states)

    def where(self) -> RowPlaces:
        """Where every row stands in its image or video. Items of other modalities count as text."""
        places = self._loop.places()
        return RowPlaces(*(part.masked_fill(~self.block, -1) for part in places))

    def _attended(self, upcoming: bool) -> int:
        if upcoming:
            if self.inside:
                raise MethodError("inside a layer there is no upcoming attention; ask before the layer.")
            if self.layer == self.num_layers:
                raise MethodError(f"there is no layer {self.layer} whose attention could be asked for.")
            return self.layer
        if self.inside:
            return self.layer
        if self.layer == 0:
            raise MethodError("there is no attention before layer 0; ask for a layer >= 1.")
        return self.layer - 1


def last_token_scores(step: PrefillStep, *, upcoming: bool = False) -> Tensor:
    """[B, L] float32: what the last prompt token pays to every row, mean over the query heads.

    In the layer that has last attended, or in the upcoming one; see :meth:`PrefillStep.attention`.
    """
    length = step.block.shape[1]
    last = torch.arange(length - 1, length, device=step.block.device)
    paid = step.attention(last, upcoming=True) if upcoming else step.attention(last)
    return paid[:, :, 0].float().mean(1)


def counted_selection(step: PrefillStep, keep: Tensor, totals: Sequence[int], kept: Sequence[int]) -> Selection:
    """The rows ``keep`` [B, L] of a step: ``kept`` of ``totals`` candidates in each sample, and everything else.

    Reads the device only where rows have gone since the prompt.
    """
    if step.valid is not None:
        keep = keep & step.valid
    if step.rows is not None:  # only the device knows how many there are
        return Selection.from_mask(keep)
    lengths = [length - n + m for length, n, m in zip(step.lengths, totals, kept, strict=True)]
    indices, valid = right_aligned_indices(keep, lengths)
    return Selection(indices=indices, valid=valid)


def same_depth(layers: Sequence[int], num_layers: int, *, depth: int = 32, first: int = 1) -> tuple[int, ...]:
    """Rising layers >= ``first`` that were chosen for a decoder of ``depth``, in one of ``num_layers``.

    As they are where it has them; in a shallower one those at the same depth, each behind the one before.
    """
    if layers[-1] < num_layers or num_layers < len(layers) + first:
        return tuple(layers)
    return tuple(max(layer * num_layers // depth, number) for number, layer in enumerate(layers, first))


class PrefillMethod(Method):
    """Acts between decoder layers during prefill, or inside them.

    ``prefill`` is called with the hidden states entering each layer of :meth:`prefill_layers`, and with those between
    attention and MLP of each layer of :meth:`inner_layers`, and says which of them go on. Attention scores are
    available through ``step`` for chosen rows only.
    """

    stage = "prefill"

    def prefill_layers(self, num_layers: int) -> tuple[int, ...]:
        """0-based indices of the decoder layers before which the method acts; ``num_layers``: after the last one."""
        raise NotImplementedError

    def inner_layers(self, num_layers: int) -> tuple[int, ...]:
        """0-based indices of the decoder layers inside which it acts, behind the attention."""
        return ()

    def unmasked_layers(self, num_layers: int) -> tuple[int, ...]:
        """Decoder layers in which every row of the prompt sees those behind it, too; a fault of some released codes.

        Not with flash-attention, which takes no mask.
        """
        return ()

    def prefill(self, step: PrefillStep) -> Selection | None:
        raise NotImplementedError

    def check_rising(self, field: str, layers: Sequence[int]) -> None:
        """For ``__post_init__``: MethodError unless the layers rise."""
        if list(layers) != sorted(set(layers)):
            raise MethodError(f"{self.name}: {field} {list(layers)} must rise.")

    def check_depth(self, field: str, layers: Sequence[int], num_layers: int) -> None:
        """For :meth:`prefill_layers`: MethodError if the decoder lacks one of ``layers``."""
        if max(layers) >= num_layers:
            raise MethodError(
                f"{self.name}: {field}={max(layers)} is outside the allowed range [0, {num_layers - 1}]: the decoder "
                f"has {num_layers} layers."
            )
