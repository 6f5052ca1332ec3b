"""The encode stage: between attention and MLP of the vision encoder's blocks, where later blocks get fewer tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from accelerate_methods.ops.select import pick_rows
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.method import Method
from accelerate_methods.stages.printing import ShapesShown


@dataclasses.dataclass(repr=False)
class Merge(ShapesShown):
    """What an encode method gives back of one block: T tokens became T'. Special tokens stay in front.

    Attributes:
        hidden: [V, T', C] what goes on to the MLP of the block.
        owner: [V, T] for each token that came in the one that now holds it (0..T'-1), -1 if none does.
        source: [V, T'] the token that each one continues (it keeps its place and its rotary position), -1 for a new
            one, made of several.
        sizes: [V, T'] patches that each token stands for, given to the next step; None if the method does not count.
    """

    hidden: Tensor
    owner: Tensor
    source: Tensor
    sizes: Tensor | None = None


@dataclasses.dataclass(repr=False)
class TokenMap(ShapesShown):
    """Where the patches of V views went.

    Attributes:
        owner: [V, P] for each patch the token (0..N-1, special ones not counted) that holds it, -1 if none does.
        stands: [V, N] the patch at which each token stands, -1 for a new one.
        sizes: [V, S + N] patches of each token, special ones first; None if the method does not count.
    """

    owner: Tensor
    stands: Tensor
    sizes: Tensor | None = None

    def first_patch(self) -> Tensor:
        """[V, N] smallest patch that each token holds; P for one that holds none."""
        count, patches = self.stands.shape[1], self.owner.shape[1]
        first = self.owner.new_full((self.owner.shape[0], count + 1), patches)  # a spare slot takes the dropped ones
        numbers = torch.arange(patches, device=first.device).expand_as(self.owner)
        first.scatter_reduce_(1, torch.where(self.owner < 0, count, self.owner), numbers, reduce="amin")
        return first[:, :-1]

    def places(self) -> Tensor:
        """[V, N] where each token stands, a new one at the first patch that it holds."""
        first = self.first_patch().clamp(max=self.owner.shape[1] - 1)
        return torch.where(self.stands >= 0, self.stands, first)


@dataclasses.dataclass(repr=False)
class PatchMap(ShapesShown):
    """Where the patches of one image or video are, of whose views an encode method has left tokens without a grid.

    Attributes:
        owner: [F, P] for each patch the content token (frame * N + token) that holds it, -1 if none does.
        stands: [F, P] True where a token stands.
        grid: (rows, columns) of a view's patches, None if they are not known.
    """

    owner: Tensor
    stands: Tensor
    grid: tuple[int, int] | None

    @classmethod
    def of(cls, tokens: TokenMap, grid: tuple[int, int] | None) -> PatchMap:
        views, count = tokens.stands.shape
        patches = tokens.owner.shape[1]
        first = torch.arange(0, views * count, count, device=tokens.owner.device)[:, None]
        stands = torch.zeros(views, patches + 1, dtype=torch.bool, device=first.device)
        stands.scatter_(1, torch.where(tokens.stands < 0, patches, tokens.stands), True)  # a spare slot: nowhere
        return cls(torch.where(tokens.owner < 0, -1, tokens.owner + first), stands[:, :patches], grid)


class EncodeStep:
    """What an encode method sees of one block, after the attention's residual and before the MLP.

    Attributes:
        block: 0-based index of the block; num_blocks: blocks that run; depth: blocks that the encoder has.
        num_patches: patches of each view before any block (in encoders whose patches go on in groups: groups).
        num_tokens: how many of a view's or frame's tokens the language model gets without a method: fewer than patches
            where frames are pooled.
        hidden: [V, T, C] all views of the request; of grouped patches [V, T, patches * C].
        special: tokens in front that are no patches (CLS, distillation); every view has the same.
        sizes: [V, T] as the last merge of this request gave them, None if it gave none.
    """

    def __init__(self, attention: Any, hidden: Tensor, sizes: Tensor | None, counts: tuple[int, ...]):
        self._attention = attention
        self.hidden, self.sizes = hidden, sizes
        self.block, self.num_blocks, self.depth, self.num_patches, self.num_tokens = counts
        self.special: int = attention.special

    def keys(self) -> Tensor:
        """[V, T, d] keys of this block, before any rotation, averaged over heads."""
        return self._attention.keys()

    def cls_attention(self) -> Tensor:
        """[V, T - special] attention of the first token, averaged over heads; float32, softmax over all T tokens.

        One row of the attention map is computed.
        """
        if not self.special:
            raise MethodError("this vision encoder has no CLS token, so there is no cls_attention().")
        return self._attention.cls_attention()

    def received_attention(self) -> Tensor:
        """[V, T - special] attention that a token receives, averaged over heads and all T tokens; float32.

        In a block that attends within windows, tokens of other windows give nothing.
        """
        return self._attention.received_attention()


def keep(step: EncodeStep, kept: Tensor) -> Merge:
    """A pure selection: the patches ``kept`` [V, K] (0..T - special - 1) of each view go on, in output order."""
    front = torch.arange(step.special, device=kept.device).expand(len(kept), -1)
    source = torch.cat([front, kept + step.special], dim=1)
    owner = source.new_full(step.hidden.shape[:2], -1)
    owner.scatter_(1, source, torch.arange(source.shape[1], device=source.device).expand_as(source))
    return Merge(pick_rows(step.hidden, source), owner, source)


class EncodeMethod(Method):
    """Acts inside the blocks of the vision encoder, on every image and frame that it is shown.

    The token grid is then gone: what follows neither pools nor unpads, and puts one newline behind an image or video
    where the checkpoint has newlines. Where nothing was merged, all is as without the method. A method that
    ``keeps_grid`` has every patch back after the last block, as a copy of the token that holds it.
    """

    stage = "encode"

    @property
    def proportional(self) -> bool:
        """Whether attention counts a token as often as the patches that it stands for (log size added to its logit)."""
        return False

    @property
    def keeps_grid(self) -> bool:
        """Whether the full grid is restored behind the encoder."""
        return False

    @property
    def shortens(self) -> bool:
        """Whether the language model gets fewer tokens of an image or video than without it."""
        return not self.keeps_grid

    def encode_blocks(self, num_blocks: int) -> tuple[int, ...]:
        """0-based indices of the blocks in which the method acts, out of those that run."""
        raise NotImplementedError

    def encode(self, step: EncodeStep) -> Merge | None:
        """What becomes of the tokens of one block; None leaves them."""
        raise NotImplementedError

    def arrange(self, tokens: TokenMap) -> Tensor | None:
        """[V, N] the order in which the tokens are read, as indices; None: as they came out of the last block."""
        return None
