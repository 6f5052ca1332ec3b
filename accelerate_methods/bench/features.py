"""Made-up features with the statistics that content-dependent methods react to. For measuring time, never accuracy."""

from __future__ import annotations

import torch
from torch import Tensor


def video_like_features(
    frames: int, tokens: int, width: int, *, scenes: int = 4, moving: float = 0.3, clusters: int = 24, seed: int = 0
) -> Tensor:
    """[F, N, D] features of a made-up clip: scenes with a still background and a moving part.

    Independent random features have no similar neighbours, no still positions and no scenes, so that segments, clusters
    and merges come out unlike anything a video gives. Here every position shows one of ``clusters`` materials; the
    background repeats from frame to frame but for a little noise, and a share ``moving`` of the positions changes.

    Args:
        scenes: cuts are spread evenly over the clip.
        moving: share of positions whose material is drawn anew in every frame.
    """
    generator = torch.Generator().manual_seed(seed)
    materials = torch.randn(scenes, clusters, width, generator=generator)
    scene = torch.arange(frames) * scenes // frames
    background = torch.randint(clusters, (scenes, tokens), generator=generator)
    drawn = torch.randint(clusters, (frames, tokens), generator=generator)
    still = torch.rand(scenes, tokens, generator=generator) >= moving
    index = torch.where(still[scene], background[scene], drawn)
    features = materials[scene[:, None], index]
    features += 0.3 * torch.randn(scenes, tokens, width, generator=generator)[scene]  # texture of the position
    features += 0.1 * torch.randn(frames, tokens, width, generator=generator)  # noise of the frame
    return features


def video_like_patches(frames: int, side: int, width: int, *, block: int = 2, **statistics: float) -> Tensor:
    """[F, side*side, D] patch features of a made-up clip: :func:`video_like_features` before spatial pooling.

    Neighbouring patches show the same thing: blocks of ``block`` x ``block`` patches share their features but for a
    little noise, so that what pooling leaves still has the statistics that ``statistics`` ask for.
    """
    coarse = -(-side // block)
    features = video_like_features(frames, coarse * coarse, width, **statistics).view(frames, coarse, coarse, width)
    fine = features.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :side, :side].flatten(1, 2)
    generator = torch.Generator().manual_seed(1)
    return fine + 0.05 * torch.randn(fine.shape, generator=generator)


def picture_patches(rows: int, columns: int, *, screen: bool = False, seed: int = 0) -> Tensor:
    """[R * C * 4, 1536] pixels in [0, 1] of a made-up picture of R x C tokens of 2 x 2 patches, of 256 levels.

    Args:
        screen: 70 % of the tokens have one colour, of areas of 4 x 4 tokens in three close shades; the others, or all
            of them, are noise.
    """
    draw = torch.Generator().manual_seed(seed)
    levels = torch.rand(rows * columns, 4 * 1536, generator=draw)
    if screen:
        areas = torch.randint(6, (-(-rows // 4), -(-columns // 4)), generator=draw) / 8
        colours = areas.repeat_interleave(4, 0)[:rows].repeat_interleave(4, 1)[:, :columns]
        colours = (colours + 0.012 * torch.randint(3, (rows, columns), generator=draw)).flatten()
        plain = torch.rand(rows * columns, generator=draw) >= 0.3
        levels[plain] = colours[plain, None]
    return levels.mul(255).round().div(255).view(-1, 1536)
