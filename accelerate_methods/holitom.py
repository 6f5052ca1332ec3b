"""HoliTom: holistic token merging for fast video large language models (NeurIPS 2025, arXiv 2505.21334).

Outer part, between projector and decoder layer 0, without looking at the question:

1. The video is cut into **windows** of frames so that as many tokens as possible hardly change within theirs; such a
   static token becomes its mean over the window.
2. Of the other tokens each frame keeps those that the vision encoder attends to most; static tokens are merged around
   density peaks of their window.

Inner part, before decoder layer ``k``: the visual rows to which the last prompt token attends least are merged into
the most similar ones of the others. All rules and the differences to the official code: docs/methods/holitom.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from accelerate_methods.ops.density import alike, dpc_knn
from accelerate_methods.ops.merge import group_means
from accelerate_methods.ops.segment import place_similarity
from accelerate_methods.ops.select import mask_to_indices, on_device, top_mask
from accelerate_methods.registry import register
from accelerate_methods.stages.compress import Compressed, CompressMethod, VisualItem, everything
from accelerate_methods.stages.fields import flag, integer, real, share
from accelerate_methods.stages.least_attended import LeastAttendedMerge


@register("holitom")
@dataclasses.dataclass(frozen=True, kw_only=True)
class HoliTom(CompressMethod, LeastAttendedMerge):
    """Hyper-parameters of HoliTom, defaults as released for LLaVA-OneVision-7B.

    Attributes:
        retention_ratio: r, share of the tokens that the outer part leaves, newlines not counted; 1 changes nothing.
        tau: a token is static from one frame to the next if its cosine similarity is above this (0.65 for r = 0.1).
        beta: weight of a static token at a density peak against the mean of those merged into it.
        neighbours: of the density estimate, at most as many as there are peaks.
        max_window_size: frames that a window has at most.
        inner: whether rows are merged in the LLM, too; without it, it is the paper's "w/o M".
        k: decoder layer before which they are; None for the released one, 18 of 28, or that at the same depth.
        r: share of the rows, newlines counted, that is merged into the others.
        causal_score_layer: False lets every row of decoder layer k - 1 see those behind it, as the released code does.
    """

    title: ClassVar[str] = "HoliTom"
    paper: ClassVar[str] = "arXiv 2505.21334"
    code: ClassVar[str] = "cokeshao/HoliTom@e9b2972f"
    licence: ClassVar[str] = "Apache-2.0"
    signals: ClassVar[frozenset[str]] = frozenset({"received_attention"})
    modalities: ClassVar[frozenset[str]] = frozenset({"video"})
    needs_grid: ClassVar[bool] = True
    positions: ClassVar[str] = "compact"

    retention_ratio: float | None = share(0.15, budget=True, aliases=("retain_ratio",))
    tau: float = real(0.8, low=-1, high=1)
    beta: float = real(0.6, low=0, high=1)
    neighbours: int = integer(7, low=1)
    max_window_size: int = integer(1024, low=1)
    inner: bool = flag(True)
    k: int | None = integer(None, low=1, aliases=("holitom_k",))
    r: float = real(0.5, low=0, high=1, aliases=("holitom_r",))
    causal_score_layer: bool = flag(True)

    def compress(self, item: VisualItem) -> Compressed:
        frames, per_frame = item.num_frames, item.tokens_per_frame
        if self.retention_ratio == 1:
            return everything(item)
        since = static_since(place_similarity(item.features), self.tau)
        counts = still_counts(since).tolist()  # the one read: the windows decide every size that follows
        windows, saved = best_windows(counts, self.max_window_size)
        still = [counts[end][start] if end > start else 0 for start, end in windows]
        ratio = adjusted_ratio(self.retention_ratio, frames * per_frame, saved)
        plan = plan_windows(windows, still, per_frame, ratio)
        tokens, rows, owner = self._merged(item, since, plan)
        info = {"windows": windows, "total_reduced": saved, "adjusted_ratio": ratio}
        return Compressed(
            tokens=tokens,
            positions=item.positions.flatten()[rows],
            owner=owner,
            info=info | {"static_per_window": plan.static, "dynamic_per_frame": plan.dynamic},
            order="layout" if item.layout == "grid" else "given",
        )

    def _merged(self, item: VisualItem, since: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [K, D] in order, rows [K] of the F*N at which they stand, owner [F, N]."""
        features, device = item.features.flatten(0, 1), since.device
        per_frame = since.shape[1]
        window, first_dynamic = on_device([plan.window_of, plan.first_dynamic], device)
        starts, ends, merges = on_device([*zip(*plan.windows, strict=True), plan.static], device)[..., None]
        still = (since[ends[:, 0]] <= starts) & (starts < ends)  # [W, N]
        scores = item.signal("received_attention").masked_fill(still[window], -torch.inf)
        kept = top_mask(scores, plan.dynamic)
        owner = torch.where(kept, kept.cumsum(1) - 1 + first_dynamic[:, None], -1)
        chosen = mask_to_indices(kept.view(1, -1), sum(plan.dynamic))[0]
        tokens, rows = features.new_empty(plan.total, features.shape[-1]), chosen.new_empty(plan.total)
        at = owner.flatten()[chosen]
        tokens[at], rows[at] = features[chosen], chosen
        if not any(plan.static):
            return tokens, rows, owner
        still &= merges > 0
        number = still.flatten().cumsum(0).view(still.shape) - 1  # of each static token that is not dropped
        is_still, total = still[window], plan.averaged
        group = torch.where(is_still, number[window], total)
        means = group_means(features, group.flatten(), total, used=plan.averaged_from)[0]
        held, anchors, outputs, merged = merge_static(means, plan, self.neighbours, self.beta)
        places = mask_to_indices(still.view(1, -1), total)[0][anchors]
        tokens[outputs] = merged
        rows[outputs] = starts[places // per_frame, 0] * per_frame + places % per_frame
        owner = torch.where(is_still, held[group.clamp(max=total - 1)], owner)
        return tokens, rows, owner


def static_since(similarity: Tensor, tau: float) -> Tensor:
    """[F, N] the first frame from which on each token has been static up to each frame.

    Args:
        similarity: [F-1, N] of consecutive frames; what is not a number is a change.
    """
    moves, per_frame = similarity.shape
    frame = torch.arange(1, moves + 1, device=similarity.device)[:, None]
    since = torch.where(similarity > tau, 0, frame).cummax(0).values if moves else frame.new_zeros(0, per_frame)
    return torch.cat([since.new_zeros(1, per_frame), since])


def still_counts(since: Tensor) -> Tensor:
    """[F, F] entry (end, start): how many tokens are static from frame ``start`` to frame ``end``."""
    frames = len(since)
    begins = since.new_zeros(frames, frames).scatter_add_(1, since, torch.ones_like(since))
    return begins.cumsum(1)


def best_windows(counts: Sequence[Sequence[int]], longest: int = 1024) -> tuple[list[tuple[int, int]], int]:
    """The windows that save most tokens, as (first, last) frame, and how many they save.

    A window saves all but one of its static tokens. Of equal cuts the one whose last window is shorter.

    Args:
        counts: [F][F] as in :func:`still_counts`; longest: frames of a window at most.
    """
    saved, cuts = [0], []  # of the first frames: the most that they save, and where the last window begins
    for end, row in enumerate(counts):
        starts = range(end, max(-1, end - longest), -1)
        gains = [saved[start] + row[start] * (end - start) for start in starts]
        saved.append(max(gains))
        cuts.append(starts[gains.index(saved[-1])])
    windows, end = [], len(counts) - 1
    while end >= 0:
        windows.append((cuts[end], end))
        end = cuts[end] - 1
    return windows[::-1], saved[-1]


def adjusted_ratio(ratio: float, tokens: int, saved: int) -> float:
    """Share of what the windows leave that stays, so that it is ``ratio`` of all ``tokens``; 1 at most."""
    return min(ratio / ((tokens - saved) / tokens), 1.0)


@dataclasses.dataclass
class Plan:
    """Sizes of a compressed video, all known to the host.

    Attributes:
        windows: (first, last) frame of each; still: static tokens of each; static: what they are merged into.
        dynamic: tokens that each frame keeps.
        window_of, first_dynamic: per frame: its window, and the number of the first output token of those.
        first_static: per window: number of its first output token.
        total: K, output tokens.
    """

    windows: list[tuple[int, int]]
    still: list[int]
    static: list[int]
    dynamic: list[int] = dataclasses.field(default_factory=list)
    window_of: list[int] = dataclasses.field(default_factory=list)
    first_dynamic: list[int] = dataclasses.field(default_factory=list)
    first_static: list[int] = dataclasses.field(default_factory=list)
    total: int = 0

    @property
    def merging(self) -> list[int]:
        """Windows whose static tokens are not all dropped."""
        return [number for number, count in enumerate(self.static) if count]

    @property
    def averaged(self) -> int:
        """Static tokens of these windows; each is the mean of several, ``averaged_from`` in all."""
        return sum(self.still[number] for number in self.merging)

    @property
    def averaged_from(self) -> int:
        return sum(self.still[n] * (self.windows[n][1] - self.windows[n][0] + 1) for n in self.merging)


def plan_windows(windows: Sequence[tuple[int, int]], still: Sequence[int], per_frame: int, ratio: float) -> Plan:
    """How many tokens each window and frame keeps (steps 3 and 4), at least one in all, and where they stand."""
    plan = Plan(list(windows), list(still), [round(count * ratio) for count in still])
    if per_frame * len(windows) == sum(still) and not any(plan.static):
        plan.static[still.index(max(still))] = 1
    for number, ((start, end), count) in enumerate(zip(windows, still, strict=True)):
        plan.first_static.append(plan.total)
        plan.total += plan.static[number]
        moving = math.ceil((per_frame - count) * ratio)
        for _ in range(start, end + 1):
            plan.window_of.append(number)
            plan.first_dynamic.append(plan.total)
            plan.dynamic.append(moving)
            plan.total += moving
    return plan


def merge_static(
    means: Tensor, plan: Plan, neighbours: int, beta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge the static tokens of each window around its density peaks (step 5).

    Args:
        means: [S, D], window by window.

    Returns:
        held [S] the output token that holds each; anchors [T] the peaks; outputs [T] their numbers among the output
        tokens; merged [T, D].
    """
    held = torch.empty(len(means), dtype=torch.long, device=means.device)
    counts = [plan.still[number] for number in plan.merging]
    firsts = [0, *accumulate(counts)]
    parts = []
    for sets in alike(counts):  # windows of about equal size are one batch
        sizes, merging = [counts[i] for i in sets], [plan.merging[i] for i in sets]
        clusters = [plan.static[number] for number in merging]
        numbers = [plan.first_static[n] + i for n, m in zip(merging, clusters, strict=True) for i in range(m)]
        first, size = on_device([[firsts[i] for i in sets], sizes], means.device)[..., None]
        place = torch.arange(max(sizes), device=means.device)
        index = first + torch.minimum(place, size - 1)  # a set is filled up with its last token
        near = [min(neighbours, count) for count in clusters]
        merged, peaks, slot = density_merge(means[index], clusters, near, beta, sizes)
        outputs = on_device(numbers, means.device)
        real = mask_to_indices((place < size).view(1, -1), sum(sizes))[0]
        held[index.flatten()[real]] = outputs[slot.flatten()[real]]
        parts.append((index.flatten()[peaks], outputs, merged))
    return held, *(torch.cat(part) for part in zip(*parts, strict=True))


def density_merge(
    tokens: Tensor, clusters: Sequence[int], neighbours: int | Sequence[int], beta: float, counts: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Density peaks of each set, each with the mean of the tokens that are nearest to it.

    A peak becomes ``beta * peak + (1 - beta) * mean``, or stays as it is if nothing is merged into it.

    Args:
        tokens: [B, M, D]; clusters: peaks of each set; neighbours: of the density, of all sets or of each.
        counts: tokens of each set, the others fill it up (see ``ops.density.dpc_knn``).

    Returns:
        merged [T, D], the peaks of a set in the order of its tokens; peaks [T] which of the B*M tokens they are;
        slot [B, M] the peak (0..T-1) that holds each token, -1 for what fills up.
    """
    sets, size, _ = tokens.shape
    labels, centres = dpc_knn(tokens, clusters, neighbours, counts=counts)
    first = [0, *accumulate(clusters)]
    total = first.pop()
    wanted, real, first = on_device([list(clusters), list(counts), first], tokens.device)[..., None]
    taken = torch.arange(centres.shape[1], device=tokens.device) < wanted
    order = centres.masked_fill(~taken, size).argsort(1)
    rank = order.argsort(1)  # of each centre by place
    row = torch.arange(0, sets * size, size, device=tokens.device)[:, None]
    peaks = (centres.gather(1, order) + row).flatten()[mask_to_indices(taken.view(1, -1), total)[0]]
    belongs = torch.arange(size, device=tokens.device) < real
    slot = torch.where(belongs, first + rank.gather(1, labels), -1)
    joins = belongs.flatten().index_fill(0, peaks, False)
    flat, owner = tokens.flatten(0, 1), torch.where(joins, slot.flatten(), total)
    mean, sizes = group_means(flat, owner, total, used=sum(counts) - total)
    own = flat[peaks]
    return torch.where(sizes[:, None] > 0, beta * own + (1 - beta) * mean, own), peaks, slot
