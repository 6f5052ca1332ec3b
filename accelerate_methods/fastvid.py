"""FastVID: dynamic density pruning for fast video large language models (NeurIPS 2025, arXiv 2503.11187).

Three steps between projector and decoder layer 0, none of which looks at the question:

1. **DySeg** cuts the frames into segments of similar content (``ops.segment.dynamic_segments``).
2. **ATS** keeps, per frame, the tokens with the largest attention of the vision encoder's pooling head, unchanged.
3. **DTM** picks density peaks in a few anchor frames per segment and blends each with the mean of the segment tokens
   that are most similar to it.

The authors released three code trees that differ in budget rounding and merge pools; they are the ``variant`` values
below. ``auto`` takes the one whose newline layout the video has. Kept tokens keep their original position ids.
The steps named below are those of docs/methods/fastvid.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from accelerate_methods.ops.density import density_peak_scores
from accelerate_methods.ops.merge import merge_to_anchors
from accelerate_methods.ops.segment import consecutive_similarity, dynamic_segments
from accelerate_methods.ops.select import mask_to_indices, top_mask
from accelerate_methods.registry import register
from accelerate_methods.stages.budget import floor_share
from accelerate_methods.stages.compress import Compressed, CompressMethod, VisualItem, selection
from accelerate_methods.stages.fields import choice, integer, real, share

VARIANTS = ("onevision", "llava_video", "qwen2_5_vl")
NEIGHBOURS = 4  # k of the density estimate, a constant of the paper's code


@register("fastvid")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FastVID(CompressMethod):
    """Hyper-parameters of FastVID, defaults as in the official evaluation scripts.

    Attributes:
        retention_ratio: r, share of each frame's tokens that the budget is computed from; 1 changes nothing.
        tokens_per_frame: the budget as a count instead.
        c: DySeg, minimum number of segments.
        tau: DySeg, cut wherever the similarity of consecutive frames is below this.
        d: share of the budget spent on density-merged context tokens (the rest is salient tokens).
        p: one anchor frame every p frames of a segment.
        beta: weight of the anchor itself in a merged token (alpha / dtm_alpha in older code).
        ignore: qwen2_5_vl only: frames more similar than this to the next one get no tokens.
        variant: which official tree to follow; "auto" decides by the newline layout.
        tie_noise: amplitude of the official density noise; 0 (default) is deterministic.
    """

    title: ClassVar[str] = "FastVID"
    paper: ClassVar[str] = "arXiv 2503.11187"
    code: ClassVar[str] = "LunarShen/FastVID@a40a109"
    licence: ClassVar[str] = "MIT"
    signals: ClassVar[frozenset[str]] = frozenset({"frame_features", "pooling_attention"})
    modalities: ClassVar[frozenset[str]] = frozenset({"video"})
    positions: ClassVar[str] = "original"

    retention_ratio: float | None = share(0.1, budget=True)
    tokens_per_frame: int | None = integer(None, low=1, budget=True)
    c: int = integer(8, low=1)
    tau: float = real(0.9, low=-1, high=1)
    d: float = real(0.4, low=0, high=1)
    p: int = integer(4, low=1)
    beta: float = real(0.6, low=0, high=1)
    ignore: float = real(0.95, low=-1, high=1)
    variant: str = choice("auto", "auto", *VARIANTS)
    tie_noise: float = real(0.0, low=0)

    def compress(self, item: VisualItem) -> Compressed:
        per_frame = item.tokens_per_frame
        quota = self.frame_budget(per_frame)
        if quota >= per_frame:
            return selection(item, torch.arange(item.num_tokens, device=item.features.device))
        variant = self.variant if self.variant != "auto" else "llava_video" if item.layout == "grid" else "onevision"
        frame_features = item.signal("frame_features")
        sizes = dynamic_segments(frame_features, self.c, self.tau)
        similarity = consecutive_similarity(frame_features).tolist() if variant == "qwen2_5_vl" else []
        plan = plan_quotas(sizes, per_frame, quota, self.d, self.p, variant, similarity, self.ignore)
        counts = torch.tensor([plan.salient, plan.context], device=item.features.device)
        salient = top_mask(item.signal("pooling_attention"), counts[0])
        context = context_mask(item.features, salient, plan, counts[1], self.tie_noise)
        return _merge(item, salient, context, plan, variant, self.beta)

    def frame_budget(self, per_frame: int) -> int:
        """q: tokens per frame that the quotas are computed from (at least 1)."""
        if self.tokens_per_frame is not None:
            return min(self.tokens_per_frame, per_frame)
        return max(1, floor_share(per_frame, self.retention_ratio))


@dataclasses.dataclass
class Problem:
    """One merging problem: ``anchor_frames`` of ``count`` context tokens each share the pool of frames [start, end)."""

    start: int
    end: int
    anchor_frames: list[int]
    count: int


@dataclasses.dataclass
class Quotas:
    """Token quotas of every frame (host integers) and the merging problems that follow from them."""

    sizes: list[int]
    salient: list[int]
    context: list[int]
    problems: list[Problem]

    @property
    def total(self) -> int:
        return sum(self.salient) + sum(self.context)


def plan_quotas(
    sizes: Sequence[int],
    per_frame: int,
    quota: int,
    d: float,
    p: int,
    variant: str,
    similarity: Sequence[float] = (),
    ignore: float = 1.0,
) -> Quotas:
    """Salient and context tokens of each frame (step 3).

    Args:
        sizes: segment sizes, summing to F.
        per_frame: N, tokens per frame; quota: q, budget per frame.
        d: share of context tokens; p: anchor stride.
        similarity: [F-1] of consecutive frames, used (with ``ignore``) by qwen2_5_vl only.

    A context quota is clipped to the non-salient tokens of its frame, where the official code would stop.
    """
    plan = Quotas(list(sizes), [], [], [])
    start = 0
    for length in sizes:
        if variant == "onevision":
            salient, context = _quotas_per_frame(length, quota, d, p)
        elif variant == "llava_video":
            salient, context = _quotas_per_segment(length, quota, d, p)
        else:
            inside = similarity[start : start + length - 1]
            salient, context = _quotas_static(length, quota, d, p, inside, ignore, per_frame)
        context = [min(c, per_frame - s) for c, s in zip(context, salient, strict=True)]
        # onevision merges an anchor frame within itself when its quota is just the per-frame context share
        own = variant == "onevision"
        alone = [start + i for i, c in enumerate(context) if c and own and c == int(quota * d)]
        for count in sorted({c for i, c in enumerate(context) if c and start + i not in alone}):
            frames = [start + i for i, c in enumerate(context) if c == count]
            plan.problems.append(Problem(start, start + length, frames, count))
        plan.problems.extend(Problem(f, f + 1, [f], context[f - start]) for f in alone)
        plan.salient += salient
        plan.context += context
        start += length
    return plan


def _anchor_positions(length: int, p: int) -> range:
    """Anchors inside a segment: the last frame, then every p-th before it."""
    return range(length - 1, -1, -p)


def _spread(total: int, parts: int) -> list[int]:
    """``total`` over ``parts``, the remainder going to the first ones."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def _quotas_per_frame(length: int, quota: int, d: float, p: int) -> tuple[list[int], list[int]]:
    share = int(quota * d)
    anchors = _anchor_positions(length, p)
    context = [0] * length
    for position in anchors:
        context[position] = share * length // len(anchors)
    return [quota - share] * length, context


def _quotas_per_segment(length: int, quota: int, d: float, p: int) -> tuple[list[int], list[int]]:
    total = quota * length
    merged = int(total * d)
    anchors = _anchor_positions(length, p)
    context = [0] * length
    for position, count in zip(anchors, _spread(merged, len(anchors)), strict=True):
        context[position] = count
    return _spread(total - merged, length), context


def _quotas_static(
    length: int, quota: int, d: float, p: int, similarity: Sequence[float], ignore: float, per_frame: int
) -> tuple[list[int], list[int]]:
    total = quota * length
    merged = max(int(total * d), 1)
    if length == 1:
        return [total - merged], [merged]
    valid = [i for i, s in enumerate(similarity) if s < ignore] + [length - 1]
    anchors = [valid[i] for i in _anchor_positions(len(valid), p)]
    salient, context = [0] * length, [0] * length
    for position, count in zip(anchors, _spread(merged, len(anchors)), strict=True):
        context[position] = min(count, per_frame // 2)
    for position, count in zip(valid, _spread(total - merged, len(valid)), strict=True):
        salient[position] = min(count, per_frame - context[position])
    return salient, context


def context_mask(features: Tensor, salient: Tensor, plan: Quotas, counts: Tensor, tie_noise: float = 0.0) -> Tensor:
    """[F, N] mask of the density peaks among each anchor frame's non-salient tokens (step 5).

    Anchor frames with the same number of candidates are scored as one batch; other frames are not looked at.
    """
    mask = torch.zeros_like(salient)
    per_frame = features.shape[1]
    by_candidates: dict[int, list[int]] = {}
    for frame, count in enumerate(plan.context):
        if count:
            by_candidates.setdefault(per_frame - plan.salient[frame], []).append(frame)
    for candidates, frames in by_candidates.items():
        index = torch.tensor(frames, device=features.device)
        rest = mask_to_indices(~salient[index], candidates)
        noise = None
        if tie_noise:
            # A generator of our own, seeded per call: results must not depend on what ran before.
            noise = tie_noise * torch.rand(rest.shape, generator=torch.Generator().manual_seed(0))
            noise = noise.to(features.device)
        _, score = density_peak_scores(features[index[:, None], rest], NEIGHBOURS, noise)
        peaks = top_mask(score, counts[index])
        mask[index] = mask[index].scatter(1, rest, peaks)
    return mask


def _merge(item: VisualItem, salient: Tensor, context: Tensor, plan: Quotas, variant: str, beta: float) -> Compressed:
    """Steps 6 and 7: merge into the context tokens, gather everything in order of position."""
    features, per_frame = item.features, item.tokens_per_frame
    kept_mask = (salient | context).flatten()
    kept = mask_to_indices(kept_mask[None], plan.total)[0]
    rank = kept_mask.long().cumsum(0) - 1
    tokens = features.flatten(0, 1)[kept]
    owner = torch.full((item.num_frames, per_frame), -1, dtype=torch.long, device=features.device)
    best = torch.full(owner.shape, -torch.inf, device=features.device, dtype=features.dtype)
    for batch in _batched(plan.problems):
        frames = torch.tensor([p.anchor_frames for p in batch], device=features.device)  # [P, A]
        start, end, count = batch[0].start, batch[0].end, batch[0].count
        if len(batch) == 1:
            pool, rows = features[start:end].flatten(0, 1)[None], slice(start, end)
        else:  # single-frame problems
            pool, rows = features[frames[:, 0]], frames[:, 0]
        index = mask_to_indices(context[frames.flatten()], count).view(*frames.shape, count)
        anchors = features[frames[..., None], index]
        in_pool = ~salient[rows].view(len(batch), 1, -1)
        flat_index = index + (frames * per_frame)[..., None]
        if variant != "onevision":
            own = torch.zeros(len(batch), frames.shape[1], pool.shape[1], dtype=torch.bool, device=pool.device)
            own.scatter_(2, flat_index - (start if len(batch) == 1 else frames[:, :1, None]) * per_frame, True)
            in_pool = in_pool & ~own
        merged, assignment, similarity = merge_to_anchors(pool, anchors, in_pool, beta)
        tokens[rank[flat_index]] = merged
        # A pool token may feed one anchor of every anchor frame; provenance names the most similar of them.
        similarity, winner = similarity.max(dim=1)
        target = rank[flat_index].gather(2, assignment).gather(1, winner[:, None])[:, 0]
        similarity, target = similarity.view(-1, per_frame), target.view(-1, per_frame)
        better = similarity > best[rows]
        owner[rows] = torch.where(better, target, owner[rows])
        best[rows] = torch.where(better, similarity, best[rows])
    owner = torch.where(kept_mask, rank, owner.flatten()).view(owner.shape)
    info = {
        "variant": variant,
        "segment_sizes": plan.sizes,
        "salient_per_frame": plan.salient,
        "context_per_frame": plan.context,
    }
    return Compressed(tokens=tokens, positions=item.positions.flatten()[kept], owner=owner, info=info)


def _batched(problems: list[Problem]) -> Iterator[list[Problem]]:
    """Single-frame problems of equal count together, every other problem alone."""
    single: dict[int, list[Problem]] = {}
    for problem in problems:
        if problem.end - problem.start == 1:
            single.setdefault(problem.count, []).append(problem)
        else:
            yield [problem]
    yield from single.values()
