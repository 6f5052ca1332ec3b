"""Long videos: features in place of pixels, and a placeholder for each of their tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from accelerate_methods.ops.select import on_device
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.model.splice import Prompts


def is_features(visual: Tensor, width: int) -> bool:
    """Whether this is [F, N, C] of the tower, C = ``width``, and no picture [3, S, S]."""
    return visual.ndim == 3 and visual.shape[-1] == width and tuple(visual.shape[:2]) != (3, width)


def movie_prompt(subtitles: Sequence[str], question: str) -> str:
    """The user's turn about a movie: two placeholders and the subtitle of each frame, then the question."""
    frames = "".join(DEFAULT_IMAGE_TOKEN * 2 + text for text in subtitles)
    return (
        "Below is a movie. Memorize the content and answer my question after watching this movie."
        f"{frames}Now the movie end.\n{question}"
    )


def without_repeats(input_ids: Tensor, mask: Tensor | None, samples: Sequence[bool]) -> Tensor:
    """[B, n] mask in which one placeholder stands for those that follow it directly, in the ``samples`` marked."""
    holes = input_ids == IMAGE_TOKEN_INDEX
    repeats = holes & functional.pad(holes[:, :-1], (1, 0))
    repeats &= on_device([[sample] for sample in samples], repeats.device)
    return (torch.ones_like(holes) if mask is None else mask.bool().to(holes.device)) & ~repeats


def run_lengths(prompts: Prompts) -> list[int]:
    """For how many placeholders each one that :func:`without_repeats` left stands."""
    holes = (prompts.ids_on_host[0] == IMAGE_TOKEN_INDEX).flatten()
    number = prompts.on_host[0].flatten().cumsum(0)
    return torch.bincount(number[holes], minlength=1)[1:].tolist()


def spread(tokens: Tensor, runs: Sequence[int]) -> list[Tensor]:
    """A video's tokens [F, k, D] over its placeholders.

    Args:
        runs: placeholders that stand beside each other, with text between the runs.

    Returns:
        For each run [f, k, D] of whole frames, or [1, n, D] where it ends inside a frame.

    Raises:
        ValueError: there is neither one placeholder nor one for each token.
    """
    frames, per_frame, width = tokens.shape
    if list(runs) == [1]:
        return [tokens]
    if sum(runs) != frames * per_frame:
        raise ValueError(
            f"a video of {frames} frames has {frames * per_frame} tokens, but {sum(runs)} placeholders stand for it in "
            "the prompt: give one, or one for each token."
        )
    parts = tokens.view(-1, width).split(list(runs))
    whole = all(run % per_frame == 0 for run in runs)
    return [part.view(-1, per_frame, width) if whole else part[None] for part in parts]
