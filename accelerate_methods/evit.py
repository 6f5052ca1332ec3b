"""EViT: not all patches are what you need, by token reorganisation (ICLR 2022, arXiv 2202.07800).

In a few blocks of the vision encoder, between attention and MLP, the patches that the CLS token attends to most go on.
The others are dropped, or fused into one more token: their sum, weighted by the attention that they got.

The official models are classifiers trained with the reduction; here it runs without training, and how the tokens go on
to a language model is an adaptation, as are encoders without a CLS token (SigLIP, Qwen-VL), where a patch is scored by
the attention that it receives. All rules: docs/methods/evit.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from accelerate_methods.ops.select import by_score, pick_rows
from accelerate_methods.registry import register
from accelerate_methods.stages.encode import EncodeMethod, EncodeStep, Merge, TokenMap
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.fields import choice, flag, integer, integers, share


@register("evit")
@dataclasses.dataclass(frozen=True, kw_only=True)
class EViT(EncodeMethod):
    """Hyper-parameters of EViT.

    Attributes:
        keep_rate: share of the tokens of a shrinking block that stay, rounded up (the paper's base rate 0.7).
        retention_ratio: instead, share of each view's or frame's tokens that are left in the end, of those that the
            language model gets without EViT, a fused token counted; every shrinking block keeps about the same share.
        tokens_per_view: the same as a count.
        tokens: how many stay in each of the shrinking blocks, a fused one not counted.
        blocks: the shrinking blocks, counted from 0. None: after a quarter, a half and three quarters of those that
            run (3, 6, 9 of 12 as in the paper; 6, 12, 18 of CLIP-L's).
        fuse_token: whether the others become one more token.
        normalize_fused: whether the weights of that token are made to sum to one. The official code does not, so that
            the token's norm is small.
        token_order: order in which the language model reads the tokens. "as_is": by attention, as the last shrinking
            block leaves them; "raster": as they stand in the image, fused tokens at the end.
        unmerge: whether every patch returns behind the encoder, those that were fused as copies of the fused token;
            needs ``fuse_token``.
    """

    title: ClassVar[str] = "EViT"
    paper: ClassVar[str] = "arXiv 2202.07800"
    code: ClassVar[str] = "youweiliang/evit@5ca95a7c"
    licence: ClassVar[str] = "Apache-2.0"
    misleading: ClassVar[Mapping[str, str]] = {
        "tokens_per_image": "it shrinks every view of an image by itself; give tokens_per_view",
        "tokens_per_frame": "frames are views; give tokens_per_view",
    }

    keep_rate: float | None = share(0.7, budget=True)
    retention_ratio: float | None = share(None, budget=True)
    tokens_per_view: int | None = integer(None, low=1, budget=True)
    tokens: tuple[int, ...] | None = integers(None, low=1, budget=True)
    blocks: tuple[int, ...] | None = integers(None, low=0)
    fuse_token: bool = flag(False)
    normalize_fused: bool = flag(False)
    token_order: str = choice("as_is", "as_is", "raster")
    unmerge: bool = flag(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens is not None and self.blocks is not None and len(self.tokens) != len(self.blocks):
            raise MethodError(f"{self.name}: tokens and blocks must be as many, got {self.tokens} and {self.blocks}.")
        if self.unmerge and not self.fuse_token:
            raise MethodError(f"{self.name}: unmerge fills the holes with the fused token; set fuse_token=True.")

    @property
    def keeps_grid(self) -> bool:
        return self.unmerge

    def encode_blocks(self, num_blocks: int) -> tuple[int, ...]:
        return self.blocks or quarters(num_blocks)

    def encode(self, step: EncodeStep) -> Merge | None:
        if step.special > 1:
            raise MethodError(f"{self.name}: encoders with a distillation token are not supported.")
        count = step.hidden.shape[1] - step.special
        left = self.left(step, count)
        if left >= count:
            return None
        scores = step.cls_attention() if step.special else step.received_attention()
        return reorganize(step.hidden, scores, left, step.special, self.fuse_token, self.normalize_fused)

    def left(self, step: EncodeStep, count: int) -> int:
        """How many of the ``count`` tokens of a block stay, without the fused one."""
        blocks = sorted(set(self.encode_blocks(step.num_blocks)))
        number = blocks.index(step.block)
        if self.tokens is not None:
            if len(self.tokens) != len(blocks):
                raise MethodError(f"{self.name}: {len(self.tokens)} counts for the {len(blocks)} blocks {blocks}.")
            return self.tokens[number]
        if self.keep_rate is not None:
            return left_of(count, self.keep_rate)
        target = self.tokens_per_view
        if target is None:
            target = max(1, int(step.num_tokens * self.retention_ratio))
        if target >= step.num_patches or self.retention_ratio == 1:
            return count
        # the same share in every block, and exactly the target in the last
        share_left = (target / step.num_patches) ** ((number + 1) / len(blocks))
        goal = target if number == len(blocks) - 1 else max(target, round(step.num_patches * share_left))
        return max(1, goal - self.fuse_token)

    def arrange(self, tokens: TokenMap) -> Tensor | None:
        if self.token_order == "as_is":
            return None
        behind = tokens.owner.shape[1] + torch.arange(tokens.stands.shape[1], device=tokens.stands.device)
        return torch.where(tokens.stands >= 0, tokens.stands, behind).argsort(dim=1)


def quarters(num_blocks: int) -> tuple[int, ...]:
    """The blocks after a quarter, a half and three quarters of ``num_blocks``."""
    found = (math.ceil(num_blocks * part / 4) for part in (1, 2, 3))
    return tuple(dict.fromkeys(block for block in found if block < num_blocks)) or (0,)


def left_of(count: int, keep_rate: float) -> int:
    """``count`` times ``keep_rate``, rounded up as Python multiplies: 0.55 of 100 are 56."""
    return math.ceil(keep_rate * count)


def keep_rate_at(step: int, epoch: int, start: int, total: int, per_epoch: int, base: float, top: float = 1.0) -> float:
    """Keep rate in training: ``top`` before epoch ``start``, ``base`` from epoch ``total`` on, a half cosine between.

    Args:
        step: iterations since training began; per_epoch: iterations of an epoch.
    """
    if epoch < start:
        return top
    if epoch >= total:
        return base
    share_done = (step - start * per_epoch) / (per_epoch * (total - start))
    return base + (top - base) * (math.cos(math.pi * share_done) + 1) * 0.5


def reorganize(x: Tensor, scores: Tensor, left: int, special: int, fuse: bool, normalize: bool = False) -> Merge:
    """The ``left`` tokens of highest score in descending order, behind the special ones and before the fused one.

    Args:
        x: [V, S + N, C]; scores: [V, N].
    """
    views, length = len(x), x.shape[1]
    order = by_score(scores)
    kept = order[:, :left] + special
    front = torch.arange(special, device=x.device).expand(views, -1)
    source = torch.cat([front, kept], dim=1)
    owner = torch.full((views, length), special + left if fuse else -1, dtype=torch.long, device=x.device)
    owner.scatter_(1, source, torch.arange(special + left, device=x.device).expand_as(source))
    # the fused token overwrites a copy of the first: all others are copied once
    tokens = pick_rows(x, torch.cat([source, source[:, :1]], dim=1) if fuse else source)
    if fuse:
        weights = scores.float().scatter(1, kept - special, 0)  # of the others alone
        if normalize:
            weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        tokens[:, -1:] = weights[:, None].to(x.dtype) @ x[:, special:]
        source = torch.cat([source, torch.full_like(source[:, :1], -1)], dim=1)
    return Merge(tokens, owner, source)
