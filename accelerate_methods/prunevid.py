"""PruneVid: visual token pruning for efficient video large language models (ACL 2025 Findings, arXiv 2412.16117).

Two stages, for videos only:

* **merging**, between projector and decoder: the frames are clustered into scenes; inside a scene, positions that
  hardly change are averaged over time, and what is left of every frame, as well as the averaged positions, is merged
  around density peaks. The question plays no part.
* **selection**, after decoder layer M of the prefill: of every scene's static tokens and of every frame's dynamic
  tokens, the share alpha to which the question attends most goes on, in the layers above and in the whole KV cache.

The official code knows PLLaVA only; here the method runs on every video layout: one newline is left after the merged
tokens where the checkpoint has newlines. The steps named below are those of docs/methods/prunevid.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from accelerate_methods.ops.density import dpc_knn
from accelerate_methods.ops.merge import group_means
from accelerate_methods.ops.segment import refine_runs, run_lengths
from accelerate_methods.ops.select import by_score, mask_to_indices, on_device
from accelerate_methods.registry import register
from accelerate_methods.stages.compress import Compressed, CompressMethod, VisualItem
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.fields import flag, integer, real, share
from accelerate_methods.stages.prefill import PrefillMethod, PrefillStep, Selection, VisualSpan

_ALIKE = 0.8  # groups of at least this share of the largest one's tokens are clustered together with it
_ROW_LIMIT = 2**26  # attention probabilities looked at in one go


@register("prunevid")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneVid(CompressMethod, PrefillMethod):
    """Hyper-parameters of PruneVid, defaults as in the official evaluation script.

    Attributes:
        gamma: frame clusters per frame (``temporal_segment_ratio``).
        tau: a position whose mean cosine between the frames of a scene is above this is static; above 1 nothing is.
        beta: clusters per token of the spatial merge (``cluster_ratio``).
        alpha: share of each group's tokens that goes on in the LLM.
        selected_layer: M, 0-based decoder layer after which they are selected (5 in the VideoChatGPT-Bench script).
        k: neighbours of the density estimate.
        min_tokens: groups of no more tokens than this are not merged spatially.
        merging: whether the stage before the LLM acts.
        selection: whether the stage inside the LLM acts.
        tie_noise: amplitude of the official density noise (1e-6 there, drawn anew in every call); 0 is deterministic.
    """

    title: ClassVar[str] = "PruneVid"
    paper: ClassVar[str] = "arXiv 2412.16117"
    code: ClassVar[str] = "Visual-AI/PruneVid@b12600c6"
    licence: ClassVar[str] = "CC BY-NC-SA 4.0"
    modalities: ClassVar[frozenset[str]] = frozenset({"video"})
    needs_grid: ClassVar[bool] = True
    positions: ClassVar[str] = "compact"

    gamma: float = share(0.25, aliases=("temporal_segment_ratio",))
    tau: float = real(0.8, low=-1)
    beta: float = share(0.5, aliases=("cluster_ratio",))
    alpha: float = share(0.4)
    selected_layer: int = integer(10, low=0)
    k: int = integer(7, low=1)
    min_tokens: int = integer(14, low=0)
    merging: bool = flag(True)
    selection: bool = flag(True)
    tie_noise: float = real(0.0, low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.merging and not self.selection:
            raise MethodError("prunevid: merging and selection are both off; leave at least one on.")

    def stages_off(self) -> tuple[str, ...]:
        return (*(() if self.merging else ("compress",)), *(() if self.selection else ("prefill",)))

    # -- before the LLM ----------------------------------------------------------------------------------------------

    def compress(self, item: VisualItem) -> Compressed:
        features = item.features
        source = features.detach().float()
        noise = _Noise(self.tie_noise, features.device)
        sizes = run_lengths(frame_scenes(source, self.gamma, self.k, noise)[1])
        similarity, means = static_similarity(source, sizes)
        static = similarity > self.tau
        plan = self.plan(sizes, static.sum(1).tolist(), item.tokens_per_frame)
        owner, anchors = self._cluster(source, means, static, plan, noise)
        return Compressed(
            tokens=group_means(features.flatten(0, 1), owner.flatten(), plan.total)[0],
            positions=item.positions.flatten()[anchors],
            owner=owner,
            info={
                "static_sizes": plan.static_sizes,
                "dynamic_sizes": plan.dynamic_sizes,
                "window_sizes": plan.window_sizes,
            },
            order="given",
            newlines="last",
        )

    def merged(self, count: int) -> int:
        """Tokens that the spatial merge leaves of ``count`` (step 4)."""
        return count if count <= self.min_tokens else max(1, int(count * self.beta))

    def plan(self, sizes: Sequence[int], static: Sequence[int], per_frame: int) -> MergePlan:
        """Groups of tokens that are merged among themselves, in output order (step 5).

        Args:
            sizes: frames of each scene; static: static positions of each scene.
        """
        plan, start = MergePlan([], [], list(sizes), {}, 0), 0
        for scene, (frames, still) in enumerate(zip(sizes, static, strict=True)):
            moving = per_frame - still
            groups = [(True, still, start), *((False, moving, start + i) for i in range(frames))]
            for is_static, count, frame in groups:
                if count:
                    plan.sets.setdefault((is_static, count), []).append((scene, frame, plan.total))
                    plan.total += self.merged(count)
            plan.static_sizes.append(self.merged(still))
            plan.dynamic_sizes.append(self.merged(moving) * frames)
            start += frames
        return plan

    def _cluster(
        self, source: Tensor, means: Tensor, static: Tensor, plan: MergePlan, noise: _Noise
    ) -> tuple[Tensor, Tensor]:
        """owner [F, N] of every token, and anchors [K]: the token (frame*N + position) where each output stands.

        Groups of about equal size are clustered as one batch. A static group stands in the first frame of its scene.
        """
        frames, per_frame = source.shape[:2]
        device = source.device
        batches = self._batches(plan.sets)
        groups = [group for batch in batches for group in batch]
        counts = [group[1] for group in groups]
        clusters = [self.merged(count) for count in counts]
        starts = [0 if is_static else per_frame - count for is_static, count, *_ in groups]
        _, _, *members = zip(*groups, strict=True)
        scene, frame, base, count, number, start = on_device([*members, counts, clusters, starts], device)[:, :, None]
        # static positions first, then dynamic ones, both ascending; a group is filled up with its last token
        by_kind = torch.sort(static.to(torch.uint8), dim=1, descending=True, stable=True).indices
        place = torch.arange(max(counts), device=device)
        index = by_kind[scene, start + torch.minimum(place, count - 1)]
        labels, centres, done = [], [], 0
        for batch in batches:
            part, sizes = slice(done, done + len(batch)), [group[1] for group in batch]
            done += len(batch)
            chosen = index[part, : max(sizes)]
            if max(sizes) <= self.min_tokens:
                label = centre = place[: max(sizes)].expand_as(chosen)
            else:
                tokens = means[scene[part], chosen] if batch[0][0] else source[frame[part], chosen]
                label, centre = dpc_knn(tokens, clusters[part], self.k, noise(chosen.shape), counts=sizes)
            labels.append(_widened(label, max(counts)))
            centres.append(_widened(centre, max(clusters)))
        # one spare place in a frame, and one spare output, take what fills up
        owner = torch.zeros(frames, per_frame + 1, dtype=torch.long, device=device)
        owner[frame, torch.where(place < count, index, per_frame)] = base + torch.cat(labels)
        output = place[: max(clusters)]
        anchors = torch.zeros(plan.total + 1, dtype=torch.long, device=device)
        anchors[torch.where(output < number, base + output, plan.total)] = frame * per_frame + index.gather(
            1, torch.cat(centres)
        )
        owner = owner[:, :per_frame]
        scenes, first = on_device(list(zip(*plan.scenes(), strict=True)), device)
        return torch.where(static[scenes], owner[first], owner), anchors[:-1]

    def _batches(
        self, sets: dict[tuple[bool, int], list[tuple[int, int, int]]]
    ) -> list[list[tuple[bool, int, int, int, int]]]:
        """Groups (is static, tokens, scene, frame, first output token) that are clustered together.

        Those of one kind, the smallest not much smaller than the largest: what it is filled up with costs time, too.
        Groups too small to be merged are together, whatever they are.
        """
        batches: list[list[tuple[bool, int, int, int, int]]] = []
        previous: tuple[bool | None, int] = (None, 0)
        for is_static, count in sorted(sets, key=lambda form: (form[1] <= self.min_tokens, *form), reverse=True):
            form = (None if count <= self.min_tokens else is_static, count)
            alike = batches and form[0] == previous[0] and (form[0] is None or count >= _ALIKE * previous[1])
            if not alike:
                batches.append([])
                previous = form
            batches[-1] += [(is_static, count, *group) for group in sets[is_static, count]]
        return batches

    # -- inside the LLM ----------------------------------------------------------------------------------------------

    def prefill_layers(self, num_layers: int) -> tuple[int, ...]:
        if self.selected_layer >= num_layers:
            raise MethodError(
                f"prunevid: selected_layer={self.selected_layer}, but the decoder has layers 0..{num_layers - 1}."
            )
        return (self.selected_layer + 1,)

    def prefill(self, step: PrefillStep) -> Selection | None:
        batch, length = step.visual.shape
        samples = [self._groups(spans, length) for spans in step.spans]
        dropped = [sum(group.count - group.quota for group in groups) for groups in samples]
        if not any(dropped):
            return None
        # without a group nothing is scored, and the rows need not reach back
        starts = [
            _query_start(spans[-1]) if groups else length - 1 for spans, groups in zip(step.spans, samples, strict=True)
        ]
        keep = best_per_group(question_scores(step, starts), step.visual, samples)
        if batch == 1:
            indices = mask_to_indices(keep, length - dropped[0])
            return Selection(indices=indices, trim_cache=True)
        return Selection.from_mask(keep if step.valid is None else keep & step.valid, trim_cache=True)

    def _groups(self, spans: Sequence[VisualSpan], length: int) -> list[Group]:
        """The groups of a sample: those of the merging, or a whole video where something else has compressed it."""
        if not spans or _query_start(spans[-1]) >= length:
            return []  # nothing to select, or nothing to select by
        groups = []
        for span in spans:
            sizes = group_sizes(span.info)
            if sum(sizes) != span.num_content:
                groups.append(Group(span.start, span.length, span.num_content, int(span.num_content * self.alpha)))
                continue
            start = span.start
            for size in sizes:
                groups.append(Group(start, size, size, int(size * self.alpha)))
                start += size
        return groups


@dataclasses.dataclass
class MergePlan:
    """Sizes of a compressed video, all known to the host.

    Attributes:
        static_sizes, dynamic_sizes, window_sizes: per scene: static tokens, dynamic tokens of all frames, frames.
        sets: (is static, tokens) -> the groups of that form, as (scene, frame, first output token).
        total: K, output tokens.
    """

    static_sizes: list[int]
    dynamic_sizes: list[int]
    window_sizes: list[int]
    sets: dict[tuple[bool, int], list[tuple[int, int, int]]]
    total: int

    def scenes(self) -> list[tuple[int, int]]:
        """For every frame its scene and that scene's first frame."""
        out: list[tuple[int, int]] = []
        for scene, frames in enumerate(self.window_sizes):
            out += [(scene, len(out))] * frames
        return out


class _Noise:
    """Density noise from a generator of its own: results must not depend on what ran before."""

    def __init__(self, amplitude: float, device: torch.device):
        self._amplitude, self._device = amplitude, device
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, shape: Sequence[int]) -> Tensor | None:
        if not self._amplitude:
            return None
        return on_device(self._amplitude * torch.rand(shape, generator=self._generator), self._device)


def frame_scenes(features: Tensor, gamma: float, k: int, noise: _Noise | None = None) -> tuple[list[int], list[int]]:
    """Cluster the frames [F, N, D]: labels of the clusters, and of the scenes made of them (step 2).

    One device read: the static positions of a scene, and with them every size that follows (a second read), depend on
    the scenes. Fewer frames than neighbours, or than a cluster each, are no error here.
    """
    frames = features.mean(1)[None]
    drawn = None if noise is None else noise(frames.shape[:2])
    labels = dpc_knn(frames, int(frames.shape[1] * gamma), k, drawn, exact=True)[0][0].tolist()
    return labels, refine_runs(labels)


def static_similarity(features: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """How alike each position stays within each scene (step 3).

    The mean over all pairs of distinct frames needs no pairs: with unit tokens u_w it follows from ``|sum_w u_w|^2``.

    Args:
        features: [F, N, D] float32, without gradient; sizes: frames of each scene.

    Returns:
        [S, N] mean cosine between distinct frames at the same position (-inf in a scene of one frame), and [S, N, D]
        the mean of the features over the frames of each scene.
    """
    inverse = torch.linalg.vector_norm(features, dim=-1).clamp(min=1e-12).reciprocal()
    # [F, N, 2]: what makes of a frame its unit tokens, and its share in the mean of its scene
    share = on_device([1.0 / frames for frames in sizes for _ in range(frames)], features.device)
    weights = torch.stack([inverse, share[:, None].expand_as(inverse)], dim=-1)
    # [N, 2, W] x [N, W, D] for each scene: sum of unit tokens and mean in one pass over the features
    sums = features.new_empty(len(sizes), features.shape[1], 2, features.shape[2])
    with torch.autocast(features.device.type, enabled=False):
        for out, weight, part in zip(sums, weights.split(list(sizes)), features.split(list(sizes)), strict=True):
            torch.bmm(weight.permute(1, 2, 0), part.transpose(0, 1), out=out)
    total, means = sums.unbind(2)
    frames = on_device([[float(frames)] for frames in sizes], features.device)
    similarity = (total.square().sum(-1) - frames) / (frames * (frames - 1))
    return similarity.masked_fill(frames == 1, -torch.inf), means


def _widened(values: Tensor, width: int) -> Tensor:
    """[G, W] -> [G, width], zeros at the end."""
    missing = width - values.shape[1]
    return torch.nn.functional.pad(values, (0, missing)) if missing else values


# -- selection ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Group:
    """Tokens that compete with each other: ``count`` visual ones in ``length`` rows from ``start``; ``quota`` go on."""

    start: int
    length: int
    count: int
    quota: int


def group_sizes(info: dict[str, object]) -> list[int]:
    """Sizes of the groups of a video that the merging stage has merged, in order; nothing for any other."""
    if "static_sizes" not in info:
        return []
    sizes: list[int] = []
    for still, moving, frames in zip(info["static_sizes"], info["dynamic_sizes"], info["window_sizes"], strict=True):
        sizes += [still] + [moving // frames] * frames
    return sizes


def _query_start(span: VisualSpan) -> int:
    """First row after the last visual token: a newline at the end of the video is a query row (step 9)."""
    return span.end - (span.length > span.num_content)


def question_scores(step: PrefillStep, starts: Sequence[int]) -> Tensor:
    """[B, L] the most attention, over all heads, that any row from ``starts`` on pays to each row (step 6).

    Position-free and without a causal mask. Visual rows ask nothing.
    """
    batch, length = step.visual.shape
    first, device = min(starts), step.visual.device
    asks = ~step.visual[:, first:]
    if batch > 1:
        asks &= torch.arange(first, length, device=device) >= on_device(starts, device)[:, None]
    chunk = max(1, _ROW_LIMIT // (batch * step.num_heads * length))
    scores = step.hidden_states.new_zeros(batch, length)
    for begin in range(first, length, chunk):
        rows = torch.arange(begin, min(begin + chunk, length), device=device)
        attention = step.attention(rows, rotary=False, causal=False).amax(1)
        attention = attention.masked_fill(~asks[:, rows - first, None], 0.0)
        scores = torch.maximum(scores, attention.amax(1))
    return scores


def best_per_group(scores: Tensor, visual: Tensor, samples: Sequence[Sequence[Group]]) -> Tensor:
    """[B, L] mask: of each group the ``quota`` highest scores, of equal ones the first; everything outside the groups.

    Args:
        scores, visual: [B, L]; samples: the groups of each sample, which share no rows.
    """
    batch, length = scores.shape
    most = max(len(groups) for groups in samples)
    # group `most` is everything else
    group_of = torch.full((batch, length), most)
    starts, quotas = torch.zeros(batch, most + 1, dtype=torch.long), torch.full((batch, most + 1), length)
    for row, groups in enumerate(samples):
        if groups:
            begin, lengths, counts, quota = torch.tensor([dataclasses.astuple(group) for group in groups]).unbind(1)
            rows = torch.arange(int(lengths.sum())) + (begin - lengths.cumsum(0) + lengths).repeat_interleave(lengths)
            group_of[row, rows] = torch.arange(len(groups)).repeat_interleave(lengths)
            starts[row, 1 : len(groups) + 1] = counts.cumsum(0)
            starts[row, len(groups) + 1 :] = int(counts.sum())
            quotas[row, : len(groups)] = quota
    packed = on_device(torch.cat([group_of, starts, quotas], dim=1), scores.device)
    group_of, starts, quotas = packed.split([length, most + 1, most + 1], dim=1)
    group_of = torch.where(visual, group_of, most)
    order = by_score(scores)
    group_of, within = torch.sort(group_of.gather(1, order), dim=1, stable=True)
    order = order.gather(1, within)
    rank = torch.arange(length, device=scores.device) - starts.gather(1, group_of)
    return torch.zeros_like(visual).scatter_(1, order, rank < quotas.gather(1, group_of))
