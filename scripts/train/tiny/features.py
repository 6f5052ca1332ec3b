"""fp16 cache of the frozen tower's raw features, for clips (after the mp4 round trip) and easy-VQA images."""

from __future__ import annotations

import argparse
import multiprocessing
import time
from pathlib import Path

import numpy as np
import torch
from data import GRID, easy_vqa, enlarge, load_clips
from generator import CELLS, COLOR_NAMES, FRAMES, SHAPE_NAMES, plan_clip
from render import cover_map, decode_mp4
from tower import CONFIG, build_tower, normalise, raw_features
from transformers import SiglipVisionModel

WORDS = len(COLOR_NAMES) + len(SHAPE_NAMES) + 1


def load_tower(work: Path) -> SiglipVisionModel:
    tower = build_tower()
    tower.load_state_dict(torch.load(work / "tower.pt")["tower"])
    return tower.eval()


@torch.no_grad()
def encode(tower: SiglipVisionModel, pixels: np.ndarray) -> np.ndarray:
    return raw_features(tower, normalise(pixels)).half().numpy()


def clip_cover(split: str, index: int) -> np.ndarray:
    """Share of every object in every pooled cell, summed per colour and per shape: [16, 49, 8 + 7]."""
    out = np.zeros((FRAMES, CELLS * CELLS, WORDS), np.float16)
    for thing in plan_clip(split, index).things:
        for frame in range(thing.first, thing.last + 1):
            area = cover_map(thing, thing.path[frame - thing.first], CELLS).reshape(-1)
            out[frame, :, thing.color] += area / area.sum()
            out[frame, :, len(COLOR_NAMES) + thing.shape] += area / area.sum()
    return out


_worker: dict[str, SiglipVisionModel] = {}


def _start_worker(work: Path) -> None:
    torch.set_num_threads(1)
    _worker["tower"] = load_tower(work)


def _clip_job(job: tuple[str, int, bytes]) -> tuple[np.ndarray, np.ndarray]:
    split, index, data = job
    return encode(_worker["tower"], decode_mp4(data)), clip_cover(split, index)


def clip_features(work: Path, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, 16, 169, width] and coverage [n, 16, 49, 15] of the first ``count`` clips, cached as .npy."""
    paths = [work / f"{name}_{split}_{count}.npy" for name in ("features", "cover")]
    if not paths[1].exists():
        jobs = [(split, k, data) for k, data in enumerate(load_clips(work, split, count))]
        shape = (count, FRAMES, GRID * GRID, CONFIG["hidden_size"])
        store = np.lib.format.open_memmap(paths[0], "w+", np.float16, shape)
        cover = []
        with multiprocessing.get_context("spawn").Pool(2, _start_worker, (work,)) as pool:
            for k, (features, part) in enumerate(pool.imap(_clip_job, jobs, chunksize=8)):
                store[k] = features
                cover.append(part)
        store.flush()
        np.save(paths[1], np.stack(cover))
    return np.load(paths[0], mmap_mode="r"), np.load(paths[1])


def easy_features(work: Path, split: str, count: int) -> tuple[np.ndarray, list[dict]]:
    """Features [n, 169, width] and rows of the first ``count`` easy-VQA images."""
    rows = easy_vqa(split)[:count]
    path = work / f"features_easy_{split}_{count}.npy"
    if not path.exists():
        tower = load_tower(work)
        parts = [
            encode(tower, np.stack([enlarge(row["image"]) for row in rows[k : k + 32]]))
            for k in range(0, len(rows), 32)
        ]
        np.save(path, np.concatenate(parts))
    return np.load(path), rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--train", type=int, default=4000)
    parser.add_argument("--val", type=int, default=100)
    parser.add_argument("--prefix", default="", help='"sparse_" for the sparse splits')
    args = parser.parse_args()
    torch.set_num_threads(2)
    for label, call in (
        ("val", lambda: clip_features(args.work, args.prefix + "val", args.val)),
        ("easy test", lambda: easy_features(args.work, "test", 200)),
        ("easy train", lambda: easy_features(args.work, "train", 4000)),
        ("train", lambda: clip_features(args.work, args.prefix + "train", args.train)),
    ):
        began = time.time()
        print(label, call()[0].shape, f"{time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
