"""EVS: efficient video sampling, pruning temporally redundant tokens (NVIDIA, arXiv 2510.14624).

Between projector and decoder layer 0, without looking at the question: every token of a video is compared with the
one at the same place of the frame before, and those that change most in the whole video go on, unchanged; the first
frame stays whole. How many stay follows from the number of frames alone.

This is the algorithm of vLLM's implementation, which ranks the cosine distance of embeddings; a description of the
paper ranks differences of pixels. Kept tokens of models with several position ids per token keep those of their place;
on others the shorter sequence is counted anew. :func:`vllm_positions` is how vLLM numbers what is left, which differs
for Qwen2.5-VL. All rules: docs/methods/evs.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from accelerate_methods.ops.segment import place_similarity
from accelerate_methods.ops.select import top_indices
from accelerate_methods.registry import register
from accelerate_methods.stages.compress import Compressed, CompressMethod, VisualItem, selection
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.fields import real
from accelerate_methods.stages.shapes import ItemShape

FIRST_FRAME = 255.0  # how much a token of the first frame counts as changed; the largest distance is 2


@register("evs")
@dataclasses.dataclass(frozen=True, kw_only=True)
class EVS(CompressMethod):
    """Hyper-parameters of EVS.

    Attributes:
        pruning_rate: q, share of a video's tokens that goes, below 1; less goes where the first frame alone is more
            than what should stay.
    """

    title: ClassVar[str] = "EVS"
    paper: ClassVar[str] = "arXiv 2510.14624"
    code: ClassVar[str] = "vllm-project/vllm@d750efb1"
    licence: ClassVar[str] = "Apache-2.0; the file has a notice of NVIDIA that reserves all rights"
    modalities: ClassVar[frozenset[str]] = frozenset({"video"})
    needs_grid: ClassVar[bool] = True
    positions: ClassVar[str] = "compact"

    pruning_rate: float = real(0.75, low=0, high=1, budget=True, aliases=("video_pruning_rate",))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pruning_rate == 1:
            raise MethodError("evs: pruning_rate=1 is outside the allowed range [0, 1): the first frame always stays.")

    def count(self, shape: ItemShape) -> int:
        kept = int(shape.num_frames * shape.tokens_per_frame * (1 - self.pruning_rate))  # in float64, truncated
        return max(shape.tokens_per_frame, kept)

    def compress(self, item: VisualItem) -> Compressed:
        count = self.count(item.shape)
        if count == item.num_tokens:
            return selection(item, torch.arange(count, device=item.features.device))
        return selection(item, top_indices(changes(item.features).view(1, -1), count)[0])


def changes(features: Tensor) -> Tensor:
    """[F, N] float64 cosine distance of each token of [F, N, D] to the same place of the frame before."""
    return torch.nn.functional.pad(1 - place_similarity(features), (0, 0, 1, 0), value=FIRST_FRAME)


# -- how vLLM numbers the tokens ---------------------------------------------------------------------------------------


def vllm_media_positions(grid: tuple[int, int, int], time_per_frame: float) -> Tensor:
    """[T*H*W, 4] position of each token of a Qwen2.5-VL video within it (t, h, w), and how far the text behind it is.

    Args:
        grid: (T, H, W) frames, rows and columns of merged tokens.
        time_per_frame: positions per frame, truncated after the product with the number of the frame.
    """
    frames, rows, columns = grid
    time = (torch.arange(frames) * time_per_frame).long()
    cells = torch.cartesian_prod(time, torch.arange(rows), torch.arange(columns))
    return torch.cat([cells, torch.full((len(cells), 1), columns)], dim=1)


def vllm_positions(ids: Tensor, media: Sequence[Tensor], vision_start: int) -> tuple[Tensor, int]:
    """Position ids of a prompt that has lost tokens, as vLLM computes them anew once the media are encoded.

    Args:
        ids: [L] the prompt that is left.
        media: of each image or video, in order, the rows (t, h, w, text) [4, R] of Qwen2.5-VL (only tokens that are
            left; the text behind them starts at the last row's ``text``), or (t, h, w, is vision start, is a video
            token) [5, R] of Qwen3-VL (of a video from the first timestamp to the last vision end, of an image only its
            tokens; text follows the largest).
        vision_start: id of the token in front of a medium.

    Returns:
        [3, L] position ids; how far generated tokens lie from their number in the sequence.
    """
    length = len(ids)
    out = torch.arange(length).repeat(3, 1)
    starts = (ids == vision_start).nonzero().squeeze(1).tolist()
    done = 0  # rows that are final; those behind count up from there
    for rows in media:
        marker = next(at for at in starts if at >= done)
        marked = len(rows) == 5 and bool(rows[3].any())  # the marker is among the rows, behind the timestamps
        begin = marker - int(rows[3].argmax()) if marked else marker + 1
        done = begin + rows.shape[1]
        base = int(out[0, begin - 1]) + 1 if begin else 0
        out[:, begin:done] = rows[:3] + base
        text = base + int(rows[3, -1] if len(rows) == 4 else rows[:3].max() + 1)
        out[:, done:] = text + torch.arange(length - done)
    return out, int(out.max()) + 1 - length
