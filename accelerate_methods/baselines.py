"""Baselines that every result should be compared with: what does a budget cost without any cleverness?"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch

from accelerate_methods.ops.select import on_device, random_indices, random_mask
from accelerate_methods.registry import register
from accelerate_methods.stages.budget import BudgetedMethod, floor_share
from accelerate_methods.stages.compress import Compressed, CompressMethod, VisualItem, everything, selection
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.fields import integer, share
from accelerate_methods.stages.prefill import PrefillMethod, PrefillStep, Selection
from accelerate_methods.stages.sample import SampleMethod
from accelerate_methods.stages.shapes import ItemShape


@register("random")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomTokens(BudgetedMethod, CompressMethod):
    """Keep a random subset of each image's or video's tokens; the same ``seed`` keeps the same positions.

    The draw depends on the seed and the number of tokens only, so that batch size and order of requests do not matter.

    Attributes:
        seed: the same seed keeps the same positions.
    """

    title: ClassVar[str] = "Random"
    paper: ClassVar[str] = "baseline"
    baseline: ClassVar[bool] = True
    positions: ClassVar[str] = "original"

    seed: int = integer(0)

    def count(self, shape: ItemShape) -> int:
        return self.budget(shape)

    def compress(self, item: VisualItem) -> Compressed:
        kept = random_indices(item.num_tokens, self.budget(item), self.seed)
        return selection(item, on_device(kept, item.features.device), order="given")  # ascending


@register("uniform")
@dataclasses.dataclass(frozen=True, kw_only=True)
class UniformTokens(BudgetedMethod, CompressMethod):
    """Keep tokens at an even stride over the whole image or video.

    The stride is fractional, so that it walks over the columns of the grid instead of locking onto a few of them.
    """

    title: ClassVar[str] = "Uniform stride"
    paper: ClassVar[str] = "baseline"
    baseline: ClassVar[bool] = True
    positions: ClassVar[str] = "original"

    def count(self, shape: ItemShape) -> int:
        return self.budget(shape)

    def compress(self, item: VisualItem) -> Compressed:
        total, count = item.num_tokens, self.budget(item)
        # floor((i + 1/2) * total / count) in integers: exact for any size
        kept = (2 * torch.arange(count, device=item.features.device) + 1) * total // (2 * count)
        return selection(item, kept, order="given")  # ascending


@register("pool")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PooledTokens(BudgetedMethod, CompressMethod):
    """Average neighbouring tokens down to the budget: on the token grid where there is one, along the row otherwise.

    With a grid of h x w the pooled grid is the largest h' x w' of about the same shape with h'*w' tokens within the
    frame's budget, so the realised count can be below it.
    """

    title: ClassVar[str] = "Average pooling"
    paper: ClassVar[str] = "baseline"
    baseline: ClassVar[bool] = True
    positions: ClassVar[str] = "original"

    def count(self, shape: ItemShape) -> int:
        budget, frames = self.budget(shape), shape.num_frames
        if budget >= shape.num_tokens or shape.grid is None or budget < frames:
            return budget
        return frames * math.prod(pooled_grid(*shape.grid, budget // frames))

    def compress(self, item: VisualItem) -> Compressed:
        budget = self.budget(item)
        frames, per_frame = item.num_frames, item.tokens_per_frame
        if budget >= item.num_tokens:
            return everything(item)
        if item.grid is None or budget < frames:
            # no common grid, or less than a token per frame: pool the whole row
            owner = torch.arange(item.num_tokens, device=item.features.device) * budget // item.num_tokens
            count = budget
        else:
            rows, columns = item.grid
            new_rows, new_columns = pooled_grid(rows, columns, budget // frames)
            row = torch.arange(rows, device=item.features.device) * new_rows // rows
            column = torch.arange(columns, device=item.features.device) * new_columns // columns
            frame = torch.arange(frames, device=item.features.device) * (new_rows * new_columns)
            owner = (frame[:, None, None] + row[:, None] * new_columns + column).flatten()
            count = frames * new_rows * new_columns
        tokens = torch.zeros(count, item.features.shape[-1], dtype=torch.float32, device=item.features.device)
        tokens.index_add_(0, owner, item.features.flatten(0, 1).float())
        sizes = tokens.new_zeros(count).index_add_(0, owner, tokens.new_ones(()).expand_as(owner))
        first = torch.full((count,), item.length, dtype=torch.long, device=owner.device)
        first.scatter_reduce_(0, owner, item.positions.flatten(), reduce="amin")
        return Compressed(
            tokens=(tokens / sizes[:, None]).to(item.features.dtype),
            positions=first,
            owner=owner.view(frames, per_frame),
        )


@register("downsample")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DownsampledInput(SampleMethod):
    """Feed smaller images: each view is resized so that it has about ``retention_ratio`` of its patches.

    The tower interpolates its position embeddings. The side is a multiple of the patch size, so the realised count
    differs from the ratio; it is reported per request.

    Attributes:
        retention_ratio: share of a view's patches that stay, approximately.
    """

    title: ClassVar[str] = "Smaller input"
    paper: ClassVar[str] = "baseline"
    baseline: ClassVar[bool] = True

    retention_ratio: float = share(0.25, budget=True)

    def input_side(self, side: int, patch: int) -> int:
        patches = side // patch
        kept = max(1, int(patches * math.sqrt(self.retention_ratio) + 1e-9))
        return side if kept == patches else patch * kept  # a side need not be a multiple of the patch


@register("fewer_frames")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FewerFrames(SampleMethod):
    """Show fewer frames of a video, each with all of its tokens: what a method has to beat at equal tokens.

    They are spread evenly over the stretch that the model would see. Frames are whole, so the realised count can be
    below the ratio; models that make one token of two frames get an even number. Images are left alone.

    Attributes:
        retention_ratio: share of the frames that stay, rounded down, at least one.
        num_frames: their number instead.
    """

    title: ClassVar[str] = "Fewer frames"
    paper: ClassVar[str] = "baseline"
    baseline: ClassVar[bool] = True
    modalities: ClassVar[frozenset[str]] = frozenset({"video"})

    retention_ratio: float | None = share(None, budget=True)
    num_frames: int | None = integer(None, low=1, budget=True)

    def frame_count(self, count: int) -> int:
        wanted = self.num_frames or floor_share(count, self.retention_ratio)
        return max(1, min(wanted, count))


@register("random_prefill")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomPrefill(PrefillMethod):
    """Drop random visual tokens before decoder layer ``layer``: what in-LLM pruning has to beat.

    Attributes:
        retention_ratio: share of each sample's visual tokens that goes on.
        layer: 0-based decoder layer before which they are dropped.
        seed: the same seed keeps the same tokens.
    """

    title: ClassVar[str] = "Random (in the LLM)"
    paper: ClassVar[str] = "baseline"
    baseline: ClassVar[bool] = True

    retention_ratio: float = share(0.25, budget=True)
    layer: int = integer(2, low=0)
    seed: int = integer(0)

    def prefill_layers(self, num_layers: int) -> tuple[int, ...]:
        if self.layer >= num_layers:
            raise MethodError(f"{self.name}: layer={self.layer}, but the decoder has layers 0..{num_layers - 1}.")
        return (self.layer,)

    def prefill(self, step: PrefillStep) -> Selection:
        if step.rows is None:
            totals = [sum(span.num_content for span in sample) for sample in step.spans]
        else:  # rows have gone since the prompt: only the device knows which
            totals = step.visual.sum(1).tolist()
        counts = [max(1, floor_share(total, self.retention_ratio)) if total else 0 for total in totals]
        keep = ~step.visual | random_mask(step.visual, totals, counts, self.seed)
        return Selection.from_mask(keep if step.valid is None else keep & step.valid)


def pooled_grid(rows: int, columns: int, budget: int) -> tuple[int, int]:
    """Largest grid of about the shape rows x columns with at most ``budget`` cells (and at least one)."""
    scale = min(1.0, math.sqrt(budget / (rows * columns)))
    best = (1, 1)
    for new_rows in {max(1, math.floor(rows * scale)), max(1, min(rows, math.ceil(rows * scale)))}:
        new_columns = min(columns, budget // new_rows)
        if new_columns >= 1 and new_rows * new_columns > best[0] * best[1]:
            best = (new_rows, new_columns)
    return best
