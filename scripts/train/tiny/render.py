"""Pixels of a planned clip, and the mp4 round trip that every clip takes before a model sees it."""

from __future__ import annotations

import functools
import io

import av
import numpy as np
from generator import FRAMES, SIDE, Clip, Thing, clip_rng
from PIL import Image

CRF = "28"
FPS = 4


@functools.lru_cache(maxsize=1)
def _textures(count: int = 160) -> np.ndarray:
    """A fixed bank of textures [count, SIDE, SIDE, 3], zero mean, a few octaves of smoothed noise each."""
    rng = np.random.default_rng(20251121)
    bank = np.zeros((count, SIDE, SIDE, 3), np.float32)
    for image in bank:
        for grid, gain in ((3, 10.0), (7, 7.0), (16, 5.0), (40, 4.0)):
            gain *= rng.uniform(0.2, 1.0)
            small = rng.uniform(-1, 1, (grid, grid, 3)).astype(np.float32)
            if rng.random() < 0.6:
                small[:] = small[:, :, :1]
            layers = [Image.fromarray(small[:, :, k]).resize((SIDE, SIDE), Image.BILINEAR) for k in range(3)]
            image += gain * np.stack([np.asarray(layer) for layer in layers], -1)
    return bank


@functools.lru_cache(maxsize=1)
def _noise() -> np.ndarray:
    return np.random.default_rng(7).standard_normal((6, SIDE + 96, SIDE + 96, 3)).astype(np.float32)


def _background(base: tuple[float, float, float], look: int) -> np.ndarray:
    rng = np.random.default_rng(look)
    bank = _textures()
    texture = bank[int(rng.integers(len(bank)))]
    if rng.random() < 0.5:
        texture = texture[:, ::-1]
    if rng.random() < 0.5:
        texture = texture[::-1]
    image = np.asarray(base, np.float32) + texture * float(rng.uniform(0.6, 1.3))
    if rng.random() < 0.3:
        angle, period = rng.uniform(0, np.pi), rng.uniform(9, 40)
        y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
        image += (
            float(rng.uniform(3, 9)) * np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period)[..., None]
        )
    return image


def shape_mask(shape: int, radius: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Antialiased coverage of a shape around the origin; ``x`` and ``y`` are pixel centres relative to its centre."""
    r = np.hypot(x, y)
    if shape == 0:  # circle
        d = r - 0.95 * radius
    elif shape == 1:  # rectangle, wider than high
        d = np.maximum(np.abs(x) - radius, np.abs(y) - 0.66 * radius)
    elif shape == 2:  # triangle
        d = np.maximum(y - 0.8 * radius, (2 * np.abs(x) - y - radius) / 5**0.5)
    elif shape == 3:  # cross
        bar = 0.36 * radius
        d = np.minimum(np.maximum(np.abs(x) - radius, np.abs(y) - bar), np.maximum(np.abs(y) - radius, np.abs(x) - bar))
    elif shape == 4:  # ring
        d = np.abs(r - 0.75 * radius) - 0.27 * radius
    elif shape == 5:  # diamond
        d = (np.abs(x) + np.abs(y) - 1.1 * radius) / 2**0.5
    else:  # star with five points
        angle = np.mod(np.arctan2(x, -y), 2 * np.pi / 5)
        angle = np.minimum(angle, 2 * np.pi / 5 - angle) / (np.pi / 5)
        d = r - radius * (1.15 - 0.72 * angle)
    return np.clip(0.5 - d, 0, 1).astype(np.float32)


def paste(image: np.ndarray, shape: int, radius: float, rgb: tuple[float, float, float], centre: np.ndarray) -> None:
    """Blend one object into a float image [SIDE, SIDE, 3] in place."""
    cx, cy = centre
    pad = radius * 1.25 + 2
    x0, x1 = max(0, int(cx - pad)), min(SIDE, int(cx + pad) + 1)
    y0, y1 = max(0, int(cy - pad)), min(SIDE, int(cy + pad) + 1)
    y, x = np.mgrid[y0:y1, x0:x1]
    mask = shape_mask(shape, radius, x + 0.5 - cx, y + 0.5 - cy)[..., None]
    region = image[y0:y1, x0:x1]
    region += mask * (np.asarray(rgb, np.float32) - region)


def render_clip(clip: Clip) -> np.ndarray:
    """Frames of a clip as uint8 [16, SIDE, SIDE, 3], before compression."""
    rng = clip_rng(clip.split, clip.index, stream=1)
    frames = np.empty((FRAMES, SIDE, SIDE, 3), np.uint8)
    sigma = float(rng.uniform(2, 6))
    for scene in clip.scenes:
        background = _background(scene.base, scene.look)
        for t in range(scene.first, scene.last + 1):
            image = background.copy()
            for thing in clip.things:
                spot = thing.at(t)
                if spot is not None:
                    paste(image, thing.shape, thing.radius, thing.rgb, spot)
            k, dy, dx = int(rng.integers(6)), int(rng.integers(96)), int(rng.integers(96))
            image += sigma * _noise()[k, dy : dy + SIDE, dx : dx + SIDE]
            image += float(rng.uniform(-3, 3))
            frames[t] = np.clip(image + 0.5, 0, 255)
    return frames


def encode_mp4(frames: np.ndarray, crf: str = CRF) -> bytes:
    """H.264 in mp4, 4:2:0, no B-frames, one encoder thread (so that the bytes do not depend on the machine's cores)."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {"crf": crf, "preset": "veryfast", "bf": "0", "threads": "1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def decode_mp4(data: bytes) -> np.ndarray:
    """All frames as uint8 [T, H, W, 3]."""
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def cover_map(thing: Thing, spot: np.ndarray, grid: int) -> np.ndarray:
    """Pixels of one object at ``spot`` in every cell of a ``grid x grid`` division of the frame."""
    pad = thing.radius * 1.25 + 2
    x0, x1 = max(0, int(spot[0] - pad)), min(SIDE, int(spot[0] + pad) + 1)
    y0, y1 = max(0, int(spot[1] - pad)), min(SIDE, int(spot[1] + pad) + 1)
    y, x = np.mgrid[y0:y1, x0:x1]
    mask = shape_mask(thing.shape, thing.radius, x + 0.5 - spot[0], y + 0.5 - spot[1])
    cell = y * grid // SIDE * grid + x * grid // SIDE
    return np.bincount(cell.ravel(), mask.ravel(), grid * grid).reshape(grid, grid).astype(np.float32)


__all__ = ["CRF", "cover_map", "decode_mp4", "encode_mp4", "paste", "render_clip", "shape_mask"]
