"""MMTok: multimodal coverage maximization for efficient inference of VLMs (ICLR 2026, arXiv 2508.18264).

Every view of an image, and every frame of a video, keeps the tokens that together cover

1. the question: its words, as the language model embeds them, are compared with the tokens that it would get;
2. the view itself: its tokens are compared with each other as the vision encoder gives them.

Both are turned into shares by a softmax over the tokens, and tokens are picked one after the other, each the one that
adds most coverage. Nothing is merged. The rules, what we extend (videos, other encoders) and the differences to the
official code: docs/methods/mmtok.md.
"""

from __future__ import annotations

import dataclasses
import re
from typing import ClassVar

import torch
from torch import Tensor

from accelerate_methods.ops.coverage import greedy_coverage
from accelerate_methods.ops.diversity import directions, finite_rows
from accelerate_methods.ops.gram import gram
from accelerate_methods.ops.select import on_device, row_numbers
from accelerate_methods.registry import register
from accelerate_methods.stages.compress import Compressed, ViewCompressMethod, VisualItem, everything, selection
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.fields import choice, flag, integer, real, share
from accelerate_methods.stages.shapes import ItemShape
from accelerate_methods.stages.views import CompressedViews, Views, view_selection

#: words that say nothing about an image
STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an the is are was were be been being have has had do does did it they he she we you i what where when why "
        "how who which and or but so if then question answer to for with by from at into onto upon",
    )
)
PATCH = 14  # pixels of the square's side that a patch takes, by which padding is counted


@register("mmtok")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MMTok(ViewCompressMethod):
    """Hyper-parameters of MMTok.

    Attributes:
        tokens_per_view: k, tokens of each view or frame that stay (192, 128, 64 of 576; 32 to 128 of each of the views
            of LLaVA-NeXT).
        retention_ratio: their share instead, rounded down, at least one (Qwen2.5-VL: 0.2, 0.1, 0.05).
        alpha: weight of covering the view beside covering the question.
        tau_text: temperature of the comparison with the question (Qwen2.5-VL: 0.01).
        tau_vision: temperature of the comparison of tokens with each other.
        question: "keywords": without words that say nothing about an image, as released for LLaVA; "all": every word
            behind "Question:", as released for Qwen2.5-VL; "prompt": all text tokens of the prompt, which needs neither
            the question nor a tokenizer (ours).
        exclude_padding: patches that lie in the padding of an image that was made square stay only when there are no
            others.
    """

    title: ClassVar[str] = "MMTok"
    paper: ClassVar[str] = "arXiv 2508.18264"
    code: ClassVar[str] = "Ironieser/MMTok@d1522cda0ac4470589446b5f220534d892db4c62"
    licence: ClassVar[str] = "Apache-2.0"
    signals: ClassVar[frozenset[str]] = frozenset({"question_rows", "encoder_tokens"})
    positions: ClassVar[str] = "compact"

    tokens_per_view: int | None = integer(64, low=1, budget=True, aliases=("target_vision_tokens",))
    retention_ratio: float | None = share(None, budget=True, aliases=("retain_ratio",))
    alpha: float = real(0.5, low=0)
    tau_text: float = real(0.02, low=0)
    tau_vision: float = real(0.2, low=0)
    question: str = choice("keywords", "keywords", "all", "prompt")
    exclude_padding: bool = flag(True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tau_text or not self.tau_vision:
            raise MethodError("mmtok: tau_text and tau_vision must be above 0.")
        if self.question == "prompt":
            self.asks_for("prompt_rows", "encoder_tokens")

    def words(self, question: str) -> list[str]:
        return keywords(question).split() if self.question == "keywords" else ["Question:", *question.split()]

    def view_budget(self, per_view: int) -> int:
        """k for views or frames of ``per_view`` tokens, 1 <= k <= per_view."""
        if self.tokens_per_view is not None:
            return min(self.tokens_per_view, per_view)
        return max(1, int(per_view * self.retention_ratio))

    def count(self, shape: ItemShape) -> int:
        budget = self.view_budget(shape.tokens_per_frame)
        return shape.of_each(budget)

    def compress_views(self, views: Views) -> CompressedViews | None:
        count = self.view_budget(views.tokens_per_view)
        if count >= views.tokens_per_view:
            return None
        last = None
        if self.exclude_padding and views.size is not None and views.num_views == 1:
            last = on_device(padded_patches(views.size, views.grid), views.features.device)[None]
        text = views.signal("question_rows", "prompt_rows")
        order = self._order(views.project(views.features), views.features, text, count, last)
        compressed = view_selection(views, order.sort(1).values, newlines="single")
        compressed.info = {"order": order}
        return compressed

    def compress(self, item: VisualItem) -> Compressed:
        per_frame = item.tokens_per_frame
        count = self.view_budget(per_frame)
        if count >= per_frame:
            return everything(item)
        inner = item.signals.get("encoder_tokens", item.features)
        order = self._order(item.features, inner, item.signal("question_rows", "prompt_rows"), count)
        kept = row_numbers(order.sort(1).values, per_frame)
        return selection(item, kept, {"order": order}, order="given")  # ascending

    def _order(self, tokens: Tensor, inner: Tensor, text: Tensor, count: int, last: Tensor | None = None) -> Tensor:
        benefit = coverage_of(tokens, inner, text, self.alpha, self.tau_text, self.tau_vision)
        return greedy_coverage(benefit, count, last=last)[0]


def keywords(text: str) -> str:
    """Its words without those that say nothing about an image; the text itself if no word is left."""
    words = [word for word in re.findall(r"\b\w+\b", text) if word.lower() not in STOP_WORDS]
    return " ".join(words) or text


def coverage_of(
    tokens: Tensor, inner: Tensor, text: Tensor, alpha: float, tau_text: float, tau_vision: float
) -> Tensor:
    """[V, N, M + N] how well each token covers the words of the question, then the tokens of its view.

    Args:
        tokens: [V, N, D] as the language model gets them; inner: [V, N, C] as the encoder gives them.
        text: [M, D]. Rows without a direction (zero, or not a number) count for nothing: all tokens cover them alike.
    """
    words, real = directions(text)
    tokens, inner = finite_rows(tokens)[0], finite_rows(inner)[0]
    sets, size, _ = inner.shape
    benefit = inner.new_empty(sets, size, len(words) + size)
    asked = (tokens @ words.mT).mul_(_inverse_length(tokens)[..., None] / tau_text)
    torch.div(asked.softmax(1), real.sum().clamp(min=1), out=benefit[..., : len(words)])
    inverse, among = _inverse_length(inner), benefit[..., len(words) :]
    torch.mul(gram(inner), inverse[..., None], out=among).mul_(inverse[:, None] / tau_vision)
    # no token resembles one more than itself
    among.sub_(among.diagonal(dim1=1, dim2=2)[:, None].clone()).exp_()
    among.mul_(alpha / size / among.sum(1, keepdim=True))
    return benefit


def _inverse_length(states: Tensor) -> Tensor:
    """[...] of rows [..., D], 0 for zeros."""
    length = torch.linalg.vector_norm(states, dim=-1)
    return torch.where(length > 0, 1 / length, 0.0)


def padded_patches(size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """[N] bool: patches of a square that lie wholly in what was added to an image of ``size`` (width, height)."""
    rows, columns = grid
    width, height = size
    longer, side = max(size), rows * PATCH
    short = round(min(size) * (side / longer))
    before = (side - short) // 2
    behind = side - short - before
    padded = torch.zeros(rows, columns, dtype=torch.bool)
    lines = padded if width >= height else padded.T
    lines[: before // PATCH] = True
    lines[len(lines) - behind // PATCH :] = True
    return padded.flatten()
