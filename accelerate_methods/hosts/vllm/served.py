"""A compress method whose number of tokens is known before anything is encoded.

vLLM reserves rows of the prompt when a request comes in, and every image or video has to fill its rows exactly. A
method that says its count (``CompressMethod.count``) does; one that lets the content decide is held to a cap: what it
keeps beyond that is thinned out evenly, and where it keeps less, tokens that it had left out return, evenly spaced.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from accelerate_methods.hosts.questions import PromptText
from accelerate_methods.stages.budget import floor_share
from accelerate_methods.stages.compress import Compressed, CompressMethod, ViewCompressMethod, VisualItem
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.method import Method
from accelerate_methods.stages.shapes import ItemShape
from accelerate_methods.stages.signals import resolve_signal
from accelerate_methods.stages.views import CompressedViews, Views

_ELSEWHERE = {
    "sample": "chooses frames, which vLLM does where it reads videos (--media-io-kwargs)",
    "encode": "acts inside the vision encoder, whose blocks vLLM runs itself",
    "prefill": "acts between decoder layers, which in vLLM's paged KV cache hold the same tokens at every layer",
    "decode": "chooses among the KV cache's entries in every step, which vLLM's attention does not offer",
}
#: what the wrapper takes over from the method inside
_SAME = (
    *("name", "title", "signals", "substitutes", "modalities", "needs_grid", "frame_marks", "needs_question"),
    "text_tower",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served(CompressMethod):
    """``inner`` with an exact number of tokens. It is a compress method like any other, for every host.

    Position ids are those of the shortened sequence, whatever ``inner`` asks for: vLLM counts tokens. (Models with
    several ids per token keep them: there they are coordinates.) Where a layout has a newline after each row, all of
    them stay: which rows still hold a token would be known too late.

    Attributes:
        inner: the method.
        cap: share of the tokens of an item that a method whose count is not known beforehand is held to; None: its
            ``retention_ratio``.
        specification: what was asked for, in JSON's types.
        prompt: what the prompt says, for a method that looks at it; in workers.
    """

    inner: CompressMethod
    cap: float | None = None
    specification: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    prompt: PromptText | None = dataclasses.field(default=None, compare=False, repr=False)

    positions = "compact"

    def __post_init__(self) -> None:
        for name in _SAME:
            object.__setattr__(self, name, getattr(self.inner, name))  # the dataclass is frozen

    def to_dict(self) -> dict[str, Any]:
        return {**self.inner.to_dict(), **({} if self.cap is None else {"cap": self.cap})}

    def words(self, question: str) -> list[str]:
        return self.inner.words(question)

    def count(self, shape: ItemShape) -> int | None:
        counted = self.inner.count(shape)
        return self._capped(shape) if counted is None else counted

    def compress(self, item: VisualItem) -> Compressed:
        if self.prompt is not None:
            self.prompt.tell(item)
        compressed = self.inner.compress(item)
        if self.inner.count(item.shape) is None:
            compressed = exactly(compressed, item, self._needed(item.shape))
        if compressed.newlines == "closing":
            compressed.newlines = "all"
        compressed.frame_marks = self.marks_stay(item.shape)
        return compressed

    def told(self, prompt: PromptText) -> Served:
        """The same for images and videos of a prompt."""
        return dataclasses.replace(self, prompt=prompt)

    def marks_stay(self, shape: ItemShape) -> bool:
        """Whether the tokens that some models put around each frame of a video stay, known from its form."""
        return self.frame_marks or self.inner.count(shape) == shape.num_tokens

    def _capped(self, shape: ItemShape) -> int | None:
        share = getattr(self.inner, "retention_ratio", None) if self.cap is None else self.cap
        if share is None or shape.on_views:
            return None
        return max(1, min(floor_share(shape.num_tokens, share), shape.num_tokens))

    def _needed(self, shape: ItemShape) -> int:
        counted = self.count(shape)
        if counted is None:
            raise MethodError(self.why_unknown(shape))
        return counted

    def why_unknown(self, shape: ItemShape) -> str:
        """Why :meth:`count` is None, for errors."""
        if shape.on_views:
            return (
                f"{self.name}: how many tokens these parameters keep of an image depends on what it shows (or on its "
                "padding), and vLLM has to know it beforehand. Give a parameter that says the number."
            )
        return (
            f"{self.name}: how many tokens these parameters keep depends on the content, and vLLM has to know it "
            'beforehand. Add "cap": the share of the tokens that it shall come to.'
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedViews(Served, ViewCompressMethod):
    """The same of a method that compresses images before the projector."""

    def compress_views(self, views: Views) -> CompressedViews | None:
        if self.inner.count(views.shape) is None:
            raise MethodError(self.why_unknown(views.shape))
        if self.prompt is not None:
            self.prompt.tell(views)
        return self.inner.compress_views(views)


def served(method: Method, cap: float | None = None, specification: dict[str, Any] | None = None) -> Served:
    """``method`` as vLLM can run it.

    Raises:
        MethodError: it acts at other stages than compress, or ``cap`` is no share.
    """
    for stage in method.stages:
        if stage != "compress":
            also = " Its parameters may switch that part off." if "compress" in method.stages else ""
            raise MethodError(f"{method.name} cannot be served: it {_ELSEWHERE[stage]}.{also}")
    if not isinstance(method, CompressMethod):
        raise MethodError(f"{method.name} cannot be served: it does not act between vision side and language model.")
    if cap is not None and not (isinstance(cap, int | float) and not isinstance(cap, bool) and 0 < cap <= 1):
        raise MethodError(f"cap={cap!r}: a share of the tokens in (0, 1].")
    wrapper = ServedViews if isinstance(method, ViewCompressMethod) else Served
    asked = specification if specification is not None else method.to_dict()
    return wrapper(inner=method, cap=cap, specification=asked)


def given_signals(method: Served, available: frozenset[str]) -> frozenset[str]:
    """What ``method`` gets for what it asks."""
    found = {resolve_signal(method, name, available) for name in method.signals}
    if None in found:
        raise MethodError(f"{method.name}: a signal is missing that the front end took for granted.")
    return frozenset(found)


def exactly(compressed: Compressed, item: VisualItem, total: int) -> Compressed:
    """``compressed`` with ``total`` <= F*N tokens: thinned out evenly, or with tokens of ``item`` that it left out."""
    have = compressed.positions.shape[0]
    if have > total:
        return _thinned(compressed, _evenly(have, total, compressed.positions.device))
    return compressed if have == total else _filled(compressed, item, total - have)


def _evenly(among: int, count: int, device: torch.device) -> Tensor:
    """[count] different numbers below ``among``, ascending, in the middle of equal parts."""
    return (2 * torch.arange(count, device=device) + 1) * among // (2 * count)


def _thinned(compressed: Compressed, kept: Tensor) -> Compressed:
    rank = torch.full((compressed.positions.shape[0],), -1, dtype=torch.long, device=kept.device)
    rank[kept] = torch.arange(kept.shape[0], device=kept.device)
    owner = torch.where(compressed.owner >= 0, rank[compressed.owner.clamp(min=0)], compressed.owner)
    return dataclasses.replace(
        compressed,
        tokens=compressed.tokens[kept],
        positions=compressed.positions[kept],
        owner=owner,
        info={},
    )


def _filled(compressed: Compressed, item: VisualItem, more: int) -> Compressed:
    """With ``more`` tokens in whose place nothing stands, in the order of the layout."""
    have, device = compressed.positions.shape[0], compressed.positions.device
    free = torch.ones(item.length, dtype=torch.bool, device=device)
    free[compressed.positions] = False
    among = item.num_tokens - have  # a token stands in one place, each in another
    candidates = free[item.positions.flatten()].nonzero().squeeze(1)
    back = candidates[_evenly(among, more, device)]
    owner = compressed.owner.flatten().clone()
    owner[back] = torch.arange(have, have + more, device=device)
    return dataclasses.replace(
        compressed,
        tokens=torch.cat([compressed.tokens, item.features.flatten(0, 1)[back].to(compressed.tokens.dtype)]),
        positions=torch.cat([compressed.positions, item.positions.flatten()[back]]),
        owner=owner.view_as(compressed.owner),
        info={},
        order="layout",
    )
