"""FlashVID: efficient video large language models via training-free tree-based merging (ICLR 2026, arXiv 2602.08024).

Between projector and decoder layer 0, without looking at the question:

1. **DySeg** cuts the frames into segments of similar content.
2. **ADTS** keeps, per frame, tokens that differ from each other and to which the vision encoder attends, unchanged.
3. **TSTM** links each of the others to its most similar one in the frame before; trees of linked tokens become one
   token each, and what is left of a frame is merged around density peaks.

Inside the LLM, before decoder layer K, the visual rows to which the last prompt token attends most go on (as FastV).
``retention_ratio`` is what the decoder layers see on average: more tokens enter the LLM than it says
(``expansion``), since the last layers get few. The steps named below are those of docs/methods/flashvid.md.
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
from accelerate_methods.ops.diversity import farthest_first_sets, finite_rows
from accelerate_methods.ops.merge import group_means
from accelerate_methods.ops.segment import consecutive_similarity, segment_sizes
from accelerate_methods.ops.select import by_score, mask_to_indices, on_device, top_mask
from accelerate_methods.ops.trees import links_to_previous, roots_of, tree_values
from accelerate_methods.registry import register
from accelerate_methods.stages.compress import Compressed, CompressMethod, VisualItem, everything, selection
from accelerate_methods.stages.fields import choice, flag, integer, real, share
from accelerate_methods.stages.prefill import (
    PrefillMethod,
    PrefillStep,
    Selection,
    counted_selection,
    last_token_scores,
)
from accelerate_methods.stages.shapes import ItemShape

NEIGHBOURS = 7  # k of the density estimate, a constant of the released code


@register("flashvid")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashVID(CompressMethod, PrefillMethod):
    """Hyper-parameters of FlashVID, defaults as the released wrapper has them.

    Attributes:
        retention_ratio: r, tokens that the decoder layers see on average; ``expansion`` times as many enter the LLM. 1
            changes nothing.
        tokens_per_frame: B, tokens per frame that enter the LLM, as a count instead.
        expansion: tokens that enter the LLM, relative to r.
        alpha: share of a frame's tokens that is kept as it is; the rest is merged.
        do_segment: whether the video is cut into segments at all.
        segment_threshold: cut wherever the similarity of consecutive frames is below this.
        min_segment_num: cut at the weakest transitions until there are as many segments.
        complementary_segment: whether ``min_segment_num`` counts.
        token_selection_method: how tokens are kept: attention alone, diversity alone, both, or both and how much a
            token resembles its segment.
        temporal_threshold: a token is merged into one of the frame before whose cosine similarity is above this; from
            1 on nothing is merged along time.
        trees: what becomes of merged tokens: as in the released code (long trees grow in length), or their mean.
        pruning_layer: K, decoder layer before which the LLM prunes; none at or above the number of layers.
        llm_retention_ratio: share of the visual rows that goes on there; 1 prunes nothing.
    """

    title: ClassVar[str] = "FlashVID"
    paper: ClassVar[str] = "arXiv 2602.08024"
    code: ClassVar[str] = "Fanziyang-v/FlashVID@1d37422c"
    licence: ClassVar[str] = "MIT"
    signals: ClassVar[frozenset[str]] = frozenset({"received_attention"})
    modalities: ClassVar[frozenset[str]] = frozenset({"video"})
    positions: ClassVar[str] = "compact"
    frame_marks: ClassVar[bool] = False

    retention_ratio: float | None = share(0.25, budget=True)
    tokens_per_frame: int | None = integer(None, low=1, budget=True)
    expansion: float = real(1.25, low=0)
    alpha: float = real(0.7, low=0, high=1)
    do_segment: bool = flag(True)
    segment_threshold: float = real(0.9, low=-1, high=1)
    min_segment_num: int = integer(8, low=1)
    complementary_segment: bool = flag(True)
    token_selection_method: str = choice("attn_div_v2", "attn_div_v2", "attn_div", "div", "attn")
    temporal_threshold: float = real(0.8, low=-1)
    trees: str = choice("released", "released", "mean")
    pruning_layer: int = integer(20, low=1)
    llm_retention_ratio: float = share(0.3)

    def stages_off(self) -> tuple[str, ...]:
        return ("prefill",) if 1 in (self.retention_ratio, self.llm_retention_ratio) else ()

    # -- before the LLM ----------------------------------------------------------------------------------------------

    def budgets(self, per_frame: int) -> tuple[int, int]:
        """A and T: tokens of each frame that are kept as they are, and that the others are merged into."""
        total = self.tokens_per_frame
        if total is None:
            total = max(1, math.ceil(per_frame * self.retention_ratio * self.expansion))  # left to right, in float64
        salient = math.ceil(total * self.alpha)
        return salient, total - salient

    def count(self, shape: ItemShape) -> int | None:
        salient, merged = self.budgets(shape.tokens_per_frame)
        if self.retention_ratio == 1 or salient + merged >= shape.tokens_per_frame:
            return shape.num_tokens
        return None if merged else salient * shape.num_frames

    def compress(self, item: VisualItem) -> Compressed:
        per_frame = item.tokens_per_frame
        kept, merged = self.budgets(per_frame)
        info: dict[str, object] = {"newline_behind": item.layout == "one_token"}
        if self.retention_ratio == 1 or kept + merged >= per_frame:
            return everything(item, info)
        states, _ = finite_rows(item.features)
        means = states.mean(1)
        sizes = self.segments(means)
        info |= {"segment_lengths": sizes, "per_frame": [kept, merged]}
        salient = self.salient(states, means, item.signal("received_attention"), sizes, kept)
        index = mask_to_indices(salient.view(1, -1), kept * item.num_frames)[0]
        if not merged:
            return _closed(selection(item, index, info), item)
        least = self.temporal_threshold
        trees = grow_trees(states, salient, sizes, (kept, merged), least, mean=self.trees == "mean")
        tokens, anchors, group = merge_in_space(trees.values, trees.counts, cluster_counts(trees.counts, sizes, merged))
        holder = torch.cat([group, group.new_zeros(1)])[trees.owner] + len(index)  # salient ones have no tree
        number = salient.view(-1).cumsum(0) - 1
        out = Compressed(
            tokens=torch.cat([item.features.flatten(0, 1)[index], tokens.to(item.features.dtype)]),
            positions=item.positions.flatten()[torch.cat([index, trees.roots[anchors]])],
            owner=torch.where(salient.view(-1), number, holder).view(salient.shape),
            info=info,
        )
        return _closed(out, item)

    def segments(self, means: Tensor) -> list[int]:
        """Frames of each segment (step 1), of [F, D] mean features. One device read: every size depends on them."""
        if not self.do_segment:
            return [len(means)]
        least = self.min_segment_num if self.complementary_segment else 1
        return segment_sizes(consecutive_similarity(means).cpu(), least, self.segment_threshold)

    def salient(self, states: Tensor, means: Tensor, attention: Tensor, sizes: Sequence[int], count: int) -> Tensor:
        """[F, N] True at the ``count`` tokens of each frame that are kept as they are (step 2).

        Args:
            states: [F, N, D]; means: [F, D] their means; attention: [F, N]; sizes: frames of each segment.
        """
        attention = attention.float()
        if self.token_selection_method == "attn":
            return top_mask(attention, count)
        weights = None if self.token_selection_method == "div" else attention
        if self.token_selection_method == "attn_div_v2":
            segment = _segment_of(sizes, means.device)
            centre = group_means(means, segment, len(sizes))[0][segment]
            weights = attention * torch.bmm(states, centre[:, :, None])[..., 0]
        picks = farthest_first_sets(states, count, weights)
        return torch.zeros(attention.shape, dtype=torch.bool, device=picks.device).scatter_(1, picks, True)

    # -- inside the LLM ----------------------------------------------------------------------------------------------

    def prefill_layers(self, num_layers: int) -> tuple[int, ...]:
        return (self.pruning_layer,) if self.pruning_layer < num_layers else ()

    def prefill(self, step: PrefillStep) -> Selection | None:
        visual, totals = candidates(step)
        kept = [math.ceil(total * self.llm_retention_ratio) for total in totals]
        if kept == totals:
            return None
        best = top_mask(last_token_scores(step).masked_fill(~visual, -torch.inf), kept)
        return counted_selection(step, ~visual | best, totals, kept)


def _closed(compressed: Compressed, item: VisualItem) -> Compressed:
    """What is said of newlines and marks: every frame keeps its newline, none the marks around it."""
    compressed.newlines = "all" if item.layout == "frame" else "closing"
    compressed.frame_marks = FlashVID.frame_marks
    return compressed


def _segment_of(sizes: Sequence[int], device: torch.device) -> Tensor:
    """[F] number of each frame's segment."""
    return on_device([number for number, size in enumerate(sizes) for _ in range(size)], device)


@dataclasses.dataclass
class Trees:
    """What is left of a video's frames after merging along time.

    Attributes:
        values: [R, D] float32, the trees; roots: [R] the token (frame*N + position) at which each stands, ascending.
        owner: [F*N] number of the tree that holds each token, R for those in none.
        counts: trees that stand in each frame.
    """

    values: Tensor
    roots: Tensor
    owner: Tensor
    counts: list[int]


def grow_trees(
    states: Tensor,
    salient: Tensor,
    sizes: Sequence[int],
    budget: tuple[int, int],
    threshold: float,
    mean: bool = False,
) -> Trees:
    """Merge tokens along time (step 3). One device read: how many are left of each frame.

    Args:
        states: [F, N, D] float32; salient: [F, N] tokens that take no part, except in segments of one frame.
        sizes: frames of each segment.
        budget: tokens of each frame that are salient, and that the others will be merged into: linking goes no further.
    """
    (frames, per_frame), device = salient.shape, salient.device
    starts = [0, *accumulate(sizes)][:-1]
    alone = on_device([size == 1 for size in sizes for _ in range(size)], device)[:, None]
    available = ~salient | alone
    own = torch.arange(frames * per_frame, device=device).view(frames, per_frame)
    if threshold < 1 and max(sizes) > 1:
        similarity, parent = links_to_previous(states, available, starts)
        spare = per_frame - sum(budget)
        linked = similarity > link_threshold(similarity, sizes, spare, threshold)
        parent = torch.where(linked, own[:, :1] - per_frame + parent, own).flatten()
    else:
        linked, parent = torch.zeros_like(salient), own.flatten()
    is_root = available & ~linked
    counts = is_root.sum(1).tolist()
    roots = mask_to_indices(is_root.view(1, -1), sum(counts))[0]
    number = is_root.view(-1).cumsum(0) - 1
    owner = torch.where(available.view(-1), number[roots_of(parent, max(sizes))], len(roots))
    used = sum(size * (per_frame if size == 1 else per_frame - budget[0]) for size in sizes)
    return Trees(tree_values(states.flatten(0, 1), parent, owner, roots, used, mean), roots, owner, counts)


def link_threshold(similarity: Tensor, sizes: Sequence[int], spare: int, threshold: float) -> Tensor:
    """[F, 1] what a link's similarity must exceed, so that a segment of L frames loses at most ``spare * L`` tokens.

    Where more would be lost, it is the lowest similarity of so many: one token less, and of equal ones none, is linked.

    Args:
        similarity: [F, N], -1 where there is no link; sizes: frames of each segment; spare: at least 1.
    """
    per_frame, device = similarity.shape[1], similarity.device
    segment = _segment_of(sizes, device)
    order = by_score(similarity.view(1, -1))[0]
    grouped = torch.sort(segment[order // per_frame], stable=True).indices
    falling = similarity.flatten()[order[grouped]]
    last = [start * per_frame + size * spare - 1 for start, size in zip(accumulate([0, *sizes]), sizes, strict=False)]
    last = on_device(last, device)
    least = torch.where(falling[last + 1] > threshold, falling[last], threshold)
    return least[segment][:, None]


def cluster_counts(counts: Sequence[int], sizes: Sequence[int], merged: int) -> list[int]:
    """Tokens that the trees of each frame are merged into: ``merged`` per frame, shared out in each segment (step 4).

    Args:
        counts: trees of each frame; sizes: frames of each segment.
    """
    wanted: list[int] = []
    for size in sizes:
        part = counts[len(wanted) : len(wanted) + size]
        ratio = merged * size / sum(part)
        wanted += part if ratio >= 1 else [math.ceil(count * ratio) for count in part]
    return wanted


def merge_in_space(values: Tensor, counts: Sequence[int], wanted: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the trees of each frame around density peaks (step 4); frames of about equal size are one batch.

    Args:
        values: [R, D] frame after frame; counts: trees of each frame; wanted: tokens of each, not more.

    Returns:
        [K, D] means of the clusters; [K] the tree that each stands at; [R] number of the token that holds each tree.
    """
    total, trees, device = sum(wanted), len(values), values.device
    starts, firsts = [0, *accumulate(counts)], [0, *accumulate(wanted)]
    frames = list(zip(counts, wanted, firsts, starts, strict=False))
    every = torch.arange(trees)
    # a spare tree and a spare token take what fills up
    group = torch.full((trees + 1,), total)
    for count, number, first, start in frames:
        if number == count:
            group[start : start + count] = torch.arange(first, first + count)
    group, every = on_device(torch.stack([group, torch.cat([every, every.new_zeros(1)])]), device)
    anchors = torch.zeros(total + 1, dtype=torch.long, device=device).scatter_(0, group, every)
    busy = [frame for frame, (count, number, *_) in enumerate(frames) if number < count]
    for batch in alike([counts[frame] for frame in busy]):
        size, number, first, start = zip(*(frames[busy[i]] for i in batch), strict=True)
        near = [min(clusters, NEIGHBOURS) for clusters in number]
        place = torch.arange(max(size), device=device)
        sizes, numbers, first, start = on_device([size, number, first, start], device)[:, :, None]
        rows = start + torch.minimum(place, sizes - 1)
        labels, centres = dpc_knn(values[rows], number, near, counts=size)
        group[torch.where(place < sizes, rows, trees)] = first + labels
        place = place[: max(number)]
        anchors[torch.where(place < numbers, first + place, total)] = rows.gather(1, centres)
    if not busy:
        return values, anchors[:-1], group[:-1]
    return group_means(values, group[:-1], total)[0], anchors[:-1], group[:-1]


def candidates(step: PrefillStep) -> tuple[Tensor, list[int]]:
    """[B, L] rows among which the LLM prunes (step 6), and how many there are of each sample.

    Visual tokens and the newlines of their rows and frames, but not the one behind a whole video.
    """
    if all(span.length == span.num_content for spans in step.spans for span in spans):
        visual = step.visual
    else:
        visual = step.block & (step.where().frame >= 0)
    if step.rows is not None:  # rows have gone since the prompt: only the device knows which
        return visual, visual.sum(1).tolist()
    counts = [sum(s.length - bool(s.info.get("newline_behind")) for s in spans) for spans in step.spans]
    return visual, counts
