"""Frames of a video that become fewer behind a block of the vision encoder: what a method sees and says of them.

Frames do not attend to each other there, so that later blocks have less to do with every frame that is merged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from accelerate_methods.ops.select import on_device
from accelerate_methods.stages.encode import EncodeMethod, EncodeStep, Merge, PatchMap
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.printing import ShapesShown


@dataclasses.dataclass(repr=False)
class FrameStep(ShapesShown):
    """What an encode method sees of one video behind a block.

    Attributes:
        block: 0-based index of the block; num_blocks: blocks that run.
        hidden: [T, S + P, C] output of the block for the frames that are left, S special tokens in front.
        special: S.
        received: gives :meth:`received_attention`.
    """

    block: int
    num_blocks: int
    hidden: Tensor
    special: int
    received: Callable[[], Tensor]

    @property
    def patches(self) -> Tensor:
        """[T, P, C]."""
        return self.hidden[:, self.special :]

    def received_attention(self) -> Tensor:
        """[T, N] attention that each token of a frame received in this block, mean over heads and queries; float32.

        N counts patches, or groups of them where the model makes one token of several. Computed when asked for.
        """
        return self.received()


@dataclasses.dataclass(repr=False)
class FrameMerge(ShapesShown):
    """What a method says of one video behind a block: T frames become T'.

    Attributes:
        mixing: [T', T] float, on the host: the share of each frame that came in, in each that goes on. A frame that has
            no share in any is dropped; no frame may have one in several.
        info: what the compress stage is told (``VisualItem.frames``).
        values: [T, N] each, by name: what the method wants to know of the tokens in its compress stage. They are mixed
            as the frames are, now and later, pooled as the features are, and stand among the signals of the item.
    """

    mixing: Tensor
    info: dict[str, object] = dataclasses.field(default_factory=dict)
    values: dict[str, Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(repr=False)
class FrameMap(ShapesShown):
    """Where the T frames of one video went, of which T' are left; on the host but for the values.

    Attributes:
        mixing: [T', T] as in :class:`FrameMerge`, over all blocks.
        info, values: of the last merge that said something.
    """

    mixing: Tensor
    info: dict[str, object] = dataclasses.field(default_factory=dict)
    values: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, frames: int) -> FrameMap:
        """Before any block."""
        return cls(torch.eye(frames))

    @property
    def before(self) -> int:
        """T."""
        return self.mixing.shape[1]

    @property
    def left(self) -> int:
        """T'."""
        return self.mixing.shape[0]

    def after(self, merge: FrameMerge) -> FrameMap:
        """With one more merge."""
        values = {name: mixed(value, merge.mixing) for name, value in {**self.values, **merge.values}.items()}
        return FrameMap(merge.mixing.float() @ self.mixing, {**self.info, **merge.info}, values)

    @property
    def holder(self) -> Tensor:
        """[T] for each frame the one that holds it now (0..T'-1), -1 if none does."""
        shares = self.mixing.abs()
        return torch.where(shares.amax(0) > 0, shares.argmax(0), -1)

    @property
    def stands(self) -> Tensor:
        """[T'] the frame at whose place each stands: the first of those with the largest share in it."""
        return torch.tensor([row.index(max(row)) for row in self.mixing.tolist()], dtype=torch.long)

    def patch_map(self, per_frame: int, grid: tuple[int, int] | None, device: torch.device) -> PatchMap:
        """Over all T frames of ``per_frame`` tokens, whose place within a frame is what it was."""
        holder, place = on_device(self.holder, device)[:, None], torch.arange(per_frame, device=device)
        owner = torch.where(holder >= 0, holder * per_frame + place, -1)
        standing = torch.zeros(self.before, dtype=torch.bool)
        standing[self.stands] = True
        return PatchMap(owner, on_device(standing, device)[:, None].expand(-1, per_frame), grid)


def mixed(values: Tensor, mixing: Tensor) -> Tensor:
    """[T, ...] -> [T', ...] by the shares of ``mixing`` [T', T], which is on the host.

    Frames that stay alone are copied; no number of another frame comes near them.
    """
    shares = mixing.tolist()
    alone = [sum(share != 0 for share in row) <= 1 and max(row) == 1 for row in shares]
    first = [next((number for number, share in enumerate(row) if share != 0), 0) for row in shares]
    out = values.index_select(0, on_device(first, values.device))
    rows = [number for number, single in enumerate(alone) if not single]
    if not rows:
        return out
    used = [number for number, column in enumerate(zip(*(shares[row] for row in rows), strict=True)) if any(column)]
    weights = on_device(mixing[rows][:, used], values.device).to(values.dtype)
    parts = values.index_select(0, on_device(used, values.device)).flatten(1)
    return out.index_copy_(0, on_device(rows, values.device), (weights @ parts).unflatten(1, values.shape[1:]))


def mixed_in_turn(values: Tensor, mixings: Sequence[Tensor]) -> Tensor:
    """[V, ...] of several videos behind each other -> [V', ...], each by its own shares."""
    parts = values.split([mixing.shape[1] for mixing in mixings])
    return torch.cat([mixed(part, mixing) for part, mixing in zip(parts, mixings, strict=True)])


def standing_rows(maps: Sequence[FrameMap], values: Tensor) -> Tensor:
    """[V', ...] of the frames that are left -> [V, ...] one for every frame: that of the frame that holds it.

    A frame that nothing holds gets numbers that mean nothing.
    """
    first, rows = 0, []
    for one in maps:
        rows.append(one.holder.clamp(min=0) + first)
        first += one.left
    return values.index_select(0, on_device(torch.cat(rows), values.device))


class FrameMergeMethod(EncodeMethod):
    """Merges or drops whole frames of a video behind blocks of the vision encoder; images pass untouched.

    What is left of a video is laid out as a video of so many frames.
    """

    modalities: ClassVar[frozenset[str]] = frozenset({"video"})

    @property
    def keeps_grid(self) -> bool:
        return True

    @property
    def shortens(self) -> bool:
        return True

    def encode(self, step: EncodeStep) -> Merge | None:
        """Tokens stay what they are; :meth:`encode_frames` is asked, behind the MLP of the blocks."""
        return None

    def encode_frames(self, step: FrameStep) -> FrameMerge | None:
        """What becomes of the frames of one video behind a block of :meth:`encode_blocks`; None leaves them."""
        raise NotImplementedError


def check_frame_merge(method: str, merge: Any, frames: int) -> None:
    """
    Raises:
        MethodError: ``merge`` is no :class:`FrameMerge`, or does not fit the ``frames`` that came in.
    """
    where = f"{method}.encode_frames"
    if not isinstance(merge, FrameMerge):
        got = type(merge).__name__
        raise MethodError(f"{where} must return FrameMerge, or None, which leaves the frames; got {got}.")
    mixing = merge.mixing
    fits = isinstance(mixing, Tensor) and mixing.ndim == 2 and mixing.is_floating_point()
    if not fits or mixing.shape[1] != frames or not 0 < mixing.shape[0] <= frames:
        got = list(mixing.shape) if isinstance(mixing, Tensor) else type(mixing).__name__
        raise MethodError(f"{where}: mixing must be a float tensor [T', {frames}] with 0 < T' <= {frames}, got {got}.")
    if mixing.device.type != "cpu":
        raise MethodError(f"{where}: mixing must be on the host, so that nobody waits for the device.")
    if bool(((mixing != 0).sum(0) > 1).any()):
        raise MethodError(f"{where}: a frame has a share in several frames that go on; it may have one in one only.")
    if bool((mixing == 0).all(1).any()):
        raise MethodError(f"{where}: a frame that goes on has no share of any.")
    for name, value in merge.values.items():
        if value.ndim != 2 or value.shape[0] != frames:
            raise MethodError(f"{where}: value {name!r} must be [{frames}, N], got {list(value.shape)}.")
