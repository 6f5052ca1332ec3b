"""EarlyTom: frames merged inside the vision encoder, then tokens chosen frame by frame (CVPR 2026, arXiv 2605.30010).

1. Behind a few blocks of the vision encoder the video is cut into **groups** of frames that resemble the group's first.
   A group keeps its first and last frame; neighbours among those between are merged, all patches of two frames at once,
   where they resemble each other more than the two ends do. Later blocks have fewer frames to work on.
2. Before the LLM, the ends of a group keep the tokens that the encoder attended to most, the frames between them the
   best of each of some evenly spaced windows. What the merged frames would have taken is left to the others.
3. In the LLM, before layer ``k``, the least attended visual rows are merged into the others, as HoliTom does.

All rules, and what the official code does otherwise than its page says: docs/methods/earlytom.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from accelerate_methods.ops.segment import cosines
from accelerate_methods.ops.select import mask_to_indices, on_device, top_mask
from accelerate_methods.registry import register
from accelerate_methods.stages.compress import Compressed, CompressMethod, VisualItem, everything, selection
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.fields import choice, flag, integer, integers, real, share
from accelerate_methods.stages.frames import FrameMerge, FrameMergeMethod, FrameStep
from accelerate_methods.stages.least_attended import LeastAttendedMerge

ATTENTION = "frame_attention"  # the item's signal: what the last chosen block attended to, mixed as the frames were
#: blocks of the README's example, of the 26 that LLaVA-OneVision's tower runs
BLOCKS, DEPTH = (8, 21, 23), 26


@register("earlytom")
@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyTom(FrameMergeMethod, CompressMethod, LeastAttendedMerge):
    """Hyper-parameters of EarlyTom, defaults as in the README of the release.

    Attributes:
        retention_ratio: r, share of the video's tokens that goes on to the LLM, of all frames that there were; 1
            changes nothing.
        tau: a group ends where its running similarity is below this.
        max_window: M; a group has fewer frames than this, and one at least.
        ema: weight of a frame in the running similarity to the group's first.
        merge_mode: "mixing": neighbours in pairs, as in the paper; "naive_mixing": the mean of all frames between the
            ends, whatever they resemble.
        keep_last_middle: whether the last frame between the ends stays where it resembles its neighbour too little, and
            counts as much where it is merged. The released loop never emits it.
        layers: blocks of the vision encoder (0-based) behind which frames are merged; None for the released ones, or,
            in an encoder of fewer blocks, those at the same depth.
        grid_newlines: layout "grid" (LLaVA-Video). "rows": a newline behind each row that still holds a token;
            "as_released": one behind every token of groups of two frames at most, and of the first frame of others,
            whose other frames are lost.
        inner: whether rows are merged in the LLM, too; the paper's "M".
        k: decoder layer before which they are; None for the released one, 18 of 28, or that at the same depth.
        r: share of the rows, newlines counted, that is merged into the others.
        causal_score_layer: False lets every row of decoder layer k - 1 see those behind it, as the released code does.
    """

    title: ClassVar[str] = "EarlyTom"
    paper: ClassVar[str] = "arXiv 2605.30010"
    code: ClassVar[str] = "viridisGreen/EarlyTom@b9093221"
    licence: ClassVar[str] = "Apache-2.0"
    modalities: ClassVar[frozenset[str]] = frozenset({"video"})
    needs_grid: ClassVar[bool] = True
    positions: ClassVar[str] = "compact"

    retention_ratio: float | None = share(0.2, budget=True, aliases=("retain_ratio",))
    tau: float = real(0.5, low=-1, high=1)
    max_window: int = integer(6, low=1)
    ema: float = real(0.9, low=0, high=1)
    merge_mode: str = choice("mixing", "mixing", "merging", "naive_mixing")
    keep_last_middle: bool = flag(False)
    layers: tuple[int, ...] | None = integers(None, low=0, aliases=("prune_layers",))
    grid_newlines: str = choice("rows", "rows", "as_released")
    inner: bool = flag(True)
    k: int | None = integer(None, low=1, aliases=("inner_k",))
    r: float = real(0.5, low=0, high=1, aliases=("inner_r",))
    causal_score_layer: bool = flag(True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            self.check_rising("layers", self.layers)

    # -- inside the vision encoder -----------------------------------------------------------------------------------

    def encode_blocks(self, num_blocks: int) -> tuple[int, ...]:
        if self.layers is not None:
            return self.layers
        fewer = dict.fromkeys(block * num_blocks // DEPTH for block in BLOCKS)
        return BLOCKS if num_blocks > BLOCKS[-1] else tuple(fewer)

    def encode_frames(self, step: FrameStep) -> FrameMerge | None:
        if self.retention_ratio == 1:
            return None
        products = frame_products(step.patches)
        similar = frame_similarity(products).tolist()  # read: how many frames are left decides every size that follows
        mixing = self.merged_frames(similar)
        if step.block < max(self.encode_blocks(step.num_blocks)):
            return FrameMerge(mixing) if len(mixing) < len(similar) else None
        if len(mixing) < len(similar):
            weights = on_device(mixing, products.device).to(products.dtype)
            similar = frame_similarity(weights @ products @ weights.T).tolist()
        groups = frame_groups(similar, self.tau, self.max_window, self.ema)
        return FrameMerge(mixing, {"groups": groups}, {ATTENTION: step.received_attention().detach()})

    def merged_frames(self, similar: Sequence[Sequence[float]]) -> Tensor:
        """[T', T] the share of each frame in those that go on, from the similarities [T][T] of all."""
        rows: list[dict[int, float]] = []
        for start, end in frame_groups(similar, self.tau, self.max_window, self.ema):
            rows.append({start: 1.0})
            rows += self._between(similar, start, end)
            if end > start:
                rows.append({end: 1.0})
        mixing = torch.zeros(len(rows), len(similar))
        for out, row in zip(mixing, rows, strict=True):
            out[list(row)] = torch.tensor(list(row.values()))
        return mixing

    def _between(self, similar: Sequence[Sequence[float]], start: int, end: int) -> list[dict[int, float]]:
        """What becomes of the frames between the ends of a group (step 3 of the page)."""
        middle = range(start + 1, end)
        if len(middle) > 1 and self.merge_mode == "naive_mixing":
            return [dict.fromkeys(middle, 1 / len(middle))]
        if len(middle) == 1:
            return [{start + 1: 1.0}]
        rows, frame, last = [], start + 1, end - 1
        while frame < last:
            here = similar[frame][frame + 1]
            following = similar[frame + 1][frame + 2] if frame + 1 < last else None
            if here > similar[start][end] and (following is None or here > following):
                rows.append(self._pair(frame, here, following))
                frame += 2
            else:
                rows.append({frame: 1.0})
                frame += 1
        if frame == last and self.keep_last_middle:
            rows.append({frame: 1.0})
        return rows

    def _pair(self, frame: int, here: float, following: float | None) -> dict[int, float]:
        """Shares of a frame and the next one, as much alike as ``here`` says, in what they become."""
        if following is None and self.keep_last_middle:
            return {frame: 0.5, frame + 1: 0.5}
        if not following or here + following == 0:
            return {frame: 1.0}
        share_of_first = here / (here + following)
        return {frame: share_of_first, frame + 1: 1 - share_of_first}

    # -- before the LLM ----------------------------------------------------------------------------------------------

    def compress(self, item: VisualItem) -> Compressed:
        if self.retention_ratio == 1:
            return everything(item)
        if item.frames is None or "groups" not in item.frames.info:
            raise MethodError(f"{self.name}: the frames of this video were not seen inside the vision encoder.")
        groups, size = item.frames.info["groups"], item.tokens_per_frame
        ratio = adjusted_ratio(self.retention_ratio, item.num_frames * size, item.frames.before * size)
        info = {"groups": groups, "ratio": ratio, "frames": item.num_frames, "initial_frames": item.frames.before}
        mask, counts = select(item.signal(ATTENTION), groups, ratio)
        total = sum(counts)
        as_released = self.grid_newlines == "as_released" and item.layout == "grid" and item.newlines is not None
        if as_released:  # frames behind the first of a longer group are lost
            lost = [frame for start, end in groups if end - start > 1 for frame in range(start + 1, end + 1)]
            total -= sum(counts[frame] for frame in lost)
            mask = mask.index_fill(0, on_device(torch.tensor(lost, dtype=torch.long), mask.device), False)
        compressed = selection(item, mask_to_indices(mask.view(1, -1), total)[0], info)
        compressed.newlines = "each" if as_released else "closing"
        return compressed


def frame_products(features: Tensor) -> Tensor:
    """[N, T, T] float64 inner products of all frames of [T, N, C] with each other, at each place; no gradients."""
    states = features.detach().float().transpose(0, 1)
    return (states @ states.mT).double()


def frame_similarity(products: Tensor) -> Tensor:
    """[T, T] cosine similarity of frames at the same place, averaged over places, of [N, T, T] inner products."""
    squares = products.diagonal(dim1=1, dim2=2)
    return cosines(products, squares[:, :, None] * squares[:, None]).mean(0)


def frame_groups(
    similar: Sequence[Sequence[float]], tau: float, max_window: int, ema: float
) -> list[tuple[int, int]]:
    """(first, last) frame of each group (step 1 of the page).

    Args:
        similar: [T][T] similarities of all frames.
    """
    groups, start, running = [], 0, 1.0
    for frame in range(1, len(similar)):
        running = ema * similar[start][frame] + (1 - ema) * running
        if running < tau or frame - start + 1 >= max_window:
            groups.append((start, frame - 1))
            start, running = frame, 1.0
    return [*groups, (start, len(similar) - 1)]


def adjusted_ratio(ratio: float, left: int, tokens: int) -> float:
    """Share of the ``left`` tokens that stays, so that it is ``ratio`` of all ``tokens`` there were; 1 at most."""
    return min(ratio / (left / tokens), 1.0)


def select(attention: Tensor, groups: Sequence[tuple[int, int]], ratio: float) -> tuple[Tensor, list[int]]:
    """Which tokens stay (steps 5 and 6 of the page), and how many of each frame.

    Args:
        attention: [T, N]; groups: (first, last) frame of each; ratio: share of the tokens that stays.

    Returns:
        [T, N] bool, and the True entries of each row.
    """
    frames, size = attention.shape
    ends = sorted({frame for group in groups for frame in group})
    between = sorted(set(range(frames)) - set(ends))
    mask = torch.zeros(attention.shape, dtype=torch.bool, device=attention.device)
    most, spread = math.ceil(size * ratio), max(1, round(size * ratio))  # halves to even
    rows = on_device(ends, attention.device)
    mask[rows] = top_mask(attention[rows], most)
    if between:
        rows = on_device(between, attention.device)
        mask[rows] = best_of_windows(attention[rows], spread)
    return mask, [spread if frame in between else most for frame in range(frames)]


def best_of_windows(scores: Tensor, count: int) -> Tensor:
    """[F, N] bool: the highest of ``scores`` [F, N] in each of ``count`` windows, the first ones longer by one."""
    length, longer = divmod(scores.shape[1], count)
    number = torch.arange(count, device=scores.device)[:, None]
    place = torch.arange(length + bool(longer), device=scores.device)
    index = number * length + number.clamp(max=longer) + place
    beyond = place >= length + (number < longer).long()
    index = torch.where(beyond, scores.shape[1] - 1, index)
    windows = scores[:, index].masked_fill(beyond, -torch.inf).flatten(0, 1)
    best = mask_to_indices(top_mask(windows, 1), 1).view(len(scores), count)
    chosen = index[number[:, 0], best]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)
