"""Training material: rendered clips as mp4 bytes, per-patch labels of frames, and easy-VQA images."""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import pickle
import re
from pathlib import Path

import numpy as np
from generator import CELLS, COLOR_NAMES, COLORS, SHAPE_NAMES, SIDE, STAR, Clip, plan_clip
from PIL import Image
from render import cover_map, decode_mp4, encode_mp4, render_clip

GRID = 13  # patches per side
PAIRS = len(COLOR_NAMES) * (len(SHAPE_NAMES) + 1)  # the last shape is the star


def _encode(split: str, index: int) -> bytes:
    return encode_mp4(render_clip(plan_clip(split, index)))


def load_clips(work: Path, split: str, count: int, processes: int = 2) -> list[bytes]:
    """mp4 bytes of the first ``count`` clips of a split; rendered on first use and kept in ``work``."""
    path = work / f"clips_{split}.pkl"
    clips: list[bytes] = pickle.loads(path.read_bytes()) if path.exists() else []
    if len(clips) < count:
        with multiprocessing.Pool(processes) as pool:
            clips += pool.map(functools.partial(_encode, split), range(len(clips), count), chunksize=16)
        path.write_bytes(pickle.dumps(clips))
    return clips[:count]


def cell_labels(things: list[tuple[int, int, np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """Targets of the 7x7 pooled cells: the object with the largest share of itself there.

    ``things`` holds (colour, shape, centre, pixels per cell). An object's best cell always counts, others from a share
    of 0.35; cells with less than 0.05 of any object are background, those between are left out.
    """
    best = np.zeros((CELLS, CELLS), np.float32)
    color, shape = np.zeros((CELLS, CELLS), np.int64), np.zeros((CELLS, CELLS), np.int64)
    offset = np.zeros((CELLS, CELLS, 2), np.float32)
    centres = (np.stack(np.meshgrid(np.arange(CELLS), np.arange(CELLS)), -1) + 0.5) * SIDE / CELLS
    for c, s, spot, area in things:
        share = area / max(area.sum(), 1.0)
        strong = (share >= 0.35) | (share == share.max())
        win = strong & (share > best)
        color[win], shape[win] = c + 1, s + 1 if s >= 0 else -100
        offset[win] = (spot - centres)[win] / (SIDE / CELLS)
        faint = ~strong & (share >= 0.05) & (color == 0)
        color[faint], shape[faint] = -100, -100
        best = np.maximum(best, np.where(strong, share, 0))
    return {"cell_color": color.reshape(-1), "cell_shape": shape.reshape(-1), "cell_offset": offset.reshape(-1, 2)}


def frame_labels(clip: Clip, frame: int) -> dict[str, np.ndarray]:
    """Targets of one frame: per patch colour and shape (0 = background, -100 = unclear) and offset; then per frame."""
    color = np.zeros((GRID, GRID), np.int64)
    shape = np.zeros((GRID, GRID), np.int64)
    offset = np.zeros((GRID, GRID, 2), np.float32)
    pairs = np.zeros(PAIRS, np.float32)
    best = np.zeros((GRID, GRID), np.float32)
    centres = (np.stack(np.meshgrid(np.arange(GRID), np.arange(GRID)), -1) + 0.5) * SIDE / GRID
    count, cells = 0, []
    for thing in clip.things:
        spot = thing.at(frame)
        if spot is None:
            continue
        count += 1
        pairs[thing.color * (STAR + 1) + thing.shape] = 1
        cells.append((thing.color, thing.shape, spot, cover_map(thing, spot, CELLS)))
        area = cover_map(thing, spot, GRID)
        win = (area > best) & (area >= 14)
        color[win], shape[win] = thing.color + 1, thing.shape + 1
        offset[win] = (spot - centres)[win] / (SIDE / GRID)
        faint = (area >= 2) & (area < 14) & (best < 14)
        color[faint], shape[faint] = -100, -100
        best = np.maximum(best, area)
    scene = next(k for k, s in enumerate(clip.scenes) if s.first <= frame <= s.last)
    return {
        "color": color.reshape(-1),
        "shape": shape.reshape(-1),
        "offset": offset.reshape(-1, 2),
        "pairs": pairs,
        "count": np.int64(min(count, 8)),
        "base": np.asarray(clip.scenes[scene].base, np.float32) / 127.5 - 1,
        "scene": np.int64(clip.index * 3 + scene),
        **cell_labels(cells),
    }


def frame_pool(clips: list[bytes], split: str, seed: int) -> dict[str, np.ndarray]:
    """Four frames of every clip with labels, in pairs of one scene (two scenes where there are two)."""
    rng = np.random.default_rng(seed)
    pixels = np.empty((4 * len(clips), SIDE, SIDE, 3), np.uint8)
    labels: list[dict[str, np.ndarray]] = []
    for index, data in enumerate(clips):
        clip = plan_clip(split, index)
        frames = decode_mp4(data)
        scenes = rng.choice(len(clip.scenes), 2, replace=len(clip.scenes) < 2)
        stars = [f for t in clip.things if t.kind == "star" for f in range(t.first, t.last + 1)]
        for number in scenes:
            scene = clip.scenes[int(number)]
            picks = [int(f) for f in rng.choice(np.arange(scene.first, scene.last + 1), 2, replace=False)]
            here = [f for f in stars if scene.first <= f <= scene.last]
            if here and rng.random() < 0.5:
                picks[0] = here[0]
            for f in picks:
                pixels[len(labels)] = frames[f]
                labels.append(frame_labels(clip, f))
    return {"pixels": pixels, **{key: np.stack([row[key] for row in labels]) for key in labels[0]}}


def easy_vqa(split: str) -> list[dict]:
    """easy-VQA of package ``easy-vqa``: one dict per image with its 64x64 picture and its (question, answer) list."""
    import easy_vqa as package

    paths = package.get_train_image_paths() if split == "train" else package.get_test_image_paths()
    asked = package.get_train_questions() if split == "train" else package.get_test_questions()
    rows = {
        int(k): {"id": int(k), "image": np.asarray(Image.open(p).convert("RGB")), "qa": []} for k, p in paths.items()
    }
    for question, answer, image in zip(*asked, strict=True):
        rows[int(image)]["qa"].append((question, answer))
    return [rows[k] for k in sorted(rows)]


def enlarge(image: np.ndarray) -> np.ndarray:
    """Bicubic resize with PIL to the side of the tower, as the SigLIP processor does."""
    return np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.BICUBIC))


def easy_cells(color: int, shape: int, centre: np.ndarray, area: np.ndarray) -> dict[str, np.ndarray]:
    """Pooled-cell targets of one large object: every well covered cell belongs to it."""
    out = cell_labels([(color, shape, centre, area)])
    flat = area.reshape(-1)
    on = flat >= min(200, flat.max())
    out["cell_color"] = np.where(on, color + 1, np.where(flat > 0, -100, 0))
    out["cell_shape"] = np.where(on, shape + 1 if shape >= 0 else -100, np.where(flat > 0, -100, 0))
    out["cell_offset"] = out["cell_offset"] * on[:, None]
    return out


def easy_pool(rows: list[dict]) -> dict[str, np.ndarray]:
    """Frame labels for easy-VQA images; the object is whatever differs from the background colour."""
    known = np.array(list(COLORS.values()), np.float32)
    pixels, labels = [], []
    for row in rows:
        image = row["image"].astype(np.float32)
        flat = row["image"].reshape(-1, 3)
        colors, counts = np.unique(flat, axis=0, return_counts=True)
        light = np.argsort(-counts)[:6]
        base = colors[max(light, key=lambda k: (colors[k].min() >= 200) * counts[k])].astype(np.float32)
        big = enlarge(row["image"])
        mask = np.abs(big.astype(np.float32) - base).max(-1) > 60
        small = np.abs(image - base).max(-1) > 60
        color = int(np.argmin(np.abs(known - np.median(image[small], 0)).sum(1)))
        shape = -1
        for question, answer in row["qa"]:
            word = answer if answer in SHAPE_NAMES else None
            named = re.search("|".join(SHAPE_NAMES[:3]), question)
            if named and (answer == "yes") != (" not " in question or " no " in question):
                word = named.group()
            if named and answer in COLOR_NAMES:
                word = named.group()
            shape = SHAPE_NAMES.index(word) if word else shape
        y, x = np.nonzero(mask)
        centre = np.array([x.mean(), y.mean()])
        cell = np.bincount(y * GRID // SIDE * GRID + x * GRID // SIDE, minlength=GRID * GRID)
        on, faint = cell >= 30, (cell >= 2) & (cell < 30)
        grid = (np.stack(np.meshgrid(np.arange(GRID), np.arange(GRID)), -1).reshape(-1, 2) + 0.5) * SIDE / GRID
        area = np.bincount(y * CELLS // SIDE * CELLS + x * CELLS // SIDE, minlength=CELLS * CELLS).reshape(CELLS, CELLS)
        pairs = np.zeros(PAIRS, np.float32)
        if shape >= 0:
            pairs[color * (STAR + 1) + shape] = 1
        pixels.append(big)
        labels.append(
            {
                "color": np.where(on, color + 1, np.where(faint, -100, 0)),
                "shape": np.where(on, shape + 1 if shape >= 0 else -100, np.where(faint, -100, 0)),
                "offset": ((centre - grid) / (SIDE / GRID) * on[:, None]).astype(np.float32),
                "pairs": pairs,
                "count": np.int64(1),
                "base": base / 127.5 - 1,
                "scene": np.int64(-1 - row["id"]),
                **easy_cells(color, shape, centre, area),
            }
        )
    return {"pixels": np.stack(pixels), **{key: np.stack([row[key] for row in labels]) for key in labels[0]}}


def main() -> None:
    parser = argparse.ArgumentParser(description="render clips into the work folder")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--count", type=int, default=4000)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    clips = load_clips(args.work, args.split, args.count)
    print(f"{len(clips)} clips, mean {np.mean([len(c) for c in clips]):.0f} bytes, largest {max(map(len, clips))}")


if __name__ == "__main__":
    main()
