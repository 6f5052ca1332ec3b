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
from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import ClassVar

import torch
from torch import Tensor

from accelerate_methods.ops.density import density_peak_scores
from accelerate_methods.ops.merge import AnchorSets, Membership, blend_into_anchors, nearest_anchors
from accelerate_methods.ops.segment import consecutive_similarity, segment_sizes
from accelerate_methods.ops.select import counted_to_indices, mask_to_indices, on_device, top_mask
from accelerate_methods.registry import register
from accelerate_methods.stages.budget import floor_share
from accelerate_methods.stages.compress import Compressed, CompressMethod, VisualItem, everything
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
    c: int = integer(8, low=1, aliases=("dyseg_c",))
    tau: float = real(0.9, low=-1, high=1, aliases=("dyseg_tau",))
    d: float = real(0.4, low=0, high=1, aliases=("stprune_d",))
    p: int = integer(4, low=1, aliases=("dtm_p",))
    beta: float = real(0.6, low=0, high=1, aliases=("dtm_beta", "dtm_alpha"))
    ignore: float = real(0.95, low=-1, high=1)
    variant: str = choice("auto", "auto", *VARIANTS)
    tie_noise: float = real(0.0, low=0)

    def compress(self, item: VisualItem) -> Compressed:
        per_frame = item.tokens_per_frame
        quota = self.frame_budget(per_frame)
        if quota >= per_frame:
            return everything(item)
        variant = self.variant if self.variant != "auto" else "llava_video" if item.layout == "grid" else "onevision"
        # The one read: how the frames are cut decides every size that follows.
        similarity = consecutive_similarity(item.signal("frame_features")).cpu()
        sizes = segment_sizes(similarity, self.c, self.tau)
        alike = similarity.tolist() if variant == "qwen2_5_vl" else []
        plan = plan_quotas(sizes, per_frame, quota, self.d, self.p, variant, alike, self.ignore)
        salient = top_mask(item.signal("pooling_attention"), plan.salient)
        context = context_tokens(item.features, salient, plan, self.tie_noise)
        return _merge(item, salient, context, plan, variant, self.beta)

    def frame_budget(self, per_frame: int) -> int:
        """q: tokens per frame that the quotas are computed from (at least 1)."""
        if self.tokens_per_frame is not None:
            return min(self.tokens_per_frame, per_frame)
        return max(1, floor_share(per_frame, self.retention_ratio))


@dataclasses.dataclass
class Quotas:
    """Token quotas of every frame (host integers) and the merging problems that follow from them.

    Attributes:
        sizes: frames of each segment.
        salient, context: tokens of each frame.
        problems: pools and anchors, both counted in tokens; the sets of a problem are neighbouring anchor frames.
    """

    sizes: list[int]
    salient: list[int]
    context: list[int]
    problems: list[AnchorSets]

    @property
    def anchor_frames(self) -> list[int]:
        return [frame for frame, count in enumerate(self.context) if count]

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
        alone = int(quota * d) if variant == "onevision" else 0
        anchors = [(start + i, c) for i, c in enumerate(context) if c]
        first = sum(plan.context)
        for count, frames in groupby(anchors, key=lambda anchor: anchor[1]):
            frames = [frame for frame, _ in frames]
            pools = [(f, f + 1, 1) for f in frames] if count == alone else [(start, start + length, len(frames))]
            for begin, end, sets in pools:
                plan.problems.append(AnchorSets(begin * per_frame, end * per_frame, first, sets, count))
                first += sets * count
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


def context_tokens(features: Tensor, salient: Tensor, plan: Quotas, tie_noise: float = 0.0) -> Tensor:
    """Flat indices, ascending, of the density peaks among each anchor frame's non-salient tokens (step 5).

    All anchor frames are scored as one batch (padded where they differ in candidates); other frames are not looked at.

    Args:
        features: [F, N, D]; salient: [F, N] bool.
    """
    per_frame, device = features.shape[1], features.device
    if not plan.anchor_frames:
        return torch.zeros(0, dtype=torch.long, device=device)
    candidates = [per_frame - plan.salient[frame] for frame in plan.anchor_frames]
    quotas = [plan.context[frame] for frame in plan.anchor_frames]
    frames, sizes, counts = on_device([plan.anchor_frames, candidates, quotas], device)
    rest = mask_to_indices(~salient[frames], max(candidates))
    flat = rest + frames[:, None] * per_frame
    noise = None
    if tie_noise:
        # A generator of our own, seeded per call: results must not depend on what ran before.
        noise = tie_noise * torch.rand(rest.shape, generator=torch.Generator().manual_seed(0))
        noise = on_device(noise, device)
    padded = sizes if min(candidates) < max(candidates) else None
    _, score = density_peak_scores(features.flatten(0, 1)[flat], NEIGHBOURS, noise, padded)
    peaks = top_mask(score, counts if min(quotas) < max(quotas) else quotas[0])
    chosen = mask_to_indices(peaks.view(1, -1), sum(quotas))[0]
    return flat.flatten()[chosen]


def _merge(item: VisualItem, salient: Tensor, context: Tensor, plan: Quotas, variant: str, beta: float) -> Compressed:
    """Steps 6 and 7: merge into the context tokens, gather everything in order of position."""
    features = item.features.flatten(0, 1)
    is_salient = salient.flatten()
    is_kept = is_salient.index_fill(0, context, True)
    number = is_kept.cumsum(0)
    kept = counted_to_indices(is_kept[None], number[None], plan.total)[0]
    rank = number - 1
    tokens = features[kept]
    merged: Tensor | int = -1
    if plan.problems:
        anchors, row = features[context], rank[context]
        member = nearest_anchors(features, anchors, plan.problems)
        blocked = is_salient.index_select(0, member.token)
        used = len(member.token) - _salient_entries(plan, item.tokens_per_frame)
        if variant != "onevision":  # an anchor frame's own context tokens are not merged into each other
            frame = context[member.anchor] // item.tokens_per_frame
            own = ~blocked & is_kept[member.token] & (member.token // item.tokens_per_frame == frame)
            blocked = blocked | own
            used -= sum(plan.context)
        tokens[row] = blend_into_anchors(features, anchors, member, ~blocked, used, beta)
        merged = _most_similar(member, blocked, row, is_kept.shape[0])
    info = {
        "variant": variant,
        "segment_sizes": plan.sizes,
        "salient_per_frame": plan.salient,
        "context_per_frame": plan.context,
    }
    return Compressed(
        tokens=tokens,
        positions=item.positions.flatten()[kept],
        owner=torch.where(is_kept, rank, merged).view(salient.shape),
        info=info,
        order="given",  # ascending
    )


def _salient_entries(plan: Quotas, per_frame: int) -> int:
    """Salient tokens in the pools, once for every set that looks at the pool."""
    before = [0, *accumulate(plan.salient)]
    return sum(p.sets * (before[p.end // per_frame] - before[p.start // per_frame]) for p in plan.problems)


def _most_similar(member: Membership, blocked: Tensor, row: Tensor, total: int) -> Tensor:
    """[total] output row that each token was merged into, -1 where it was not.

    A pool token may feed one anchor of every anchor frame; provenance names the most similar of them.
    """
    at = member.place * total + member.token
    similarity = member.similarity.new_full((member.most_places * total,), -torch.inf)
    similarity.scatter_(0, at, member.similarity.masked_fill(blocked, -torch.inf))
    anchor = torch.zeros_like(similarity, dtype=torch.long).scatter_(0, at, member.anchor)
    best, place = similarity.view(-1, total).max(0)
    anchor = anchor.view(-1, total).gather(0, place[None])[0]
    return torch.where(best > -torch.inf, row[anchor], -1)
