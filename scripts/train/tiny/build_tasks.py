"""Write the data of the lmms-eval tasks: clips and questions of ``shapes_video``, question lists of ``easy_vqa``."""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from data import _encode, easy_vqa
from generator import COLOR_NAMES, QUESTION_TYPES, SHAPE_NAMES, Question, candidate_questions, clip_rng, plan_clip

SPLIT = "bench"  # never used in training (splits "train" and "val")
QUICK, FULL = 100, 400


def clip_questions(index: int) -> list[Question]:
    """Up to seven questions: exist yes and no, two attribute, two place, one event; as far as the clip has them."""
    pools = candidate_questions(plan_clip(SPLIT, index), clip_rng(SPLIT, index, 2))
    exist = [next(q for q in pools["exist"] if q.answer == answer) for answer in ("yes", "no")]
    return [*exist, *pools["attribute"][:2], *pools["place"][:2], *pools["event"][:1]]


def shapes_rows(count: int) -> list[dict]:
    rows = []
    for index in range(count):
        for number, q in enumerate(clip_questions(index)):
            rows.append(
                {
                    "id": f"{index:04d}-{number}",
                    "video": f"{index:04d}.mp4",
                    "question": q.text,
                    "answer": q.answer,
                    "type": q.kind,
                }
            )
    return rows


def easy_type(question: str, answer: str) -> str:
    if answer in COLOR_NAMES:
        return "color"
    return "shape" if answer in SHAPE_NAMES else "yes_no"


def easy_rows(balanced: int | None = None) -> list[dict]:
    """All published test questions, or a balanced subset: half yes/no, a quarter colour, a quarter shape answers."""
    rows = []
    for image in easy_vqa("test"):
        for question, answer in image["qa"]:
            rows.append(
                {"image": image["id"], "question": question, "answer": answer, "type": easy_type(question, answer)}
            )
    rows = [{"id": str(k), **row} for k, row in enumerate(rows)]
    if balanced is None:
        return rows
    groups: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        groups[row["answer"]].append(row)
    rng = np.random.default_rng(0)
    quota = {"yes": balanced // 4, "no": balanced // 4}
    quota |= {s: balanced // 12 for s in SHAPE_NAMES[:3]}
    colors = [c for c in COLOR_NAMES if groups[c]]
    share = [len(part) for part in np.array_split(np.arange(balanced // 4), len(colors))]
    quota |= dict(zip(colors, share, strict=True))
    picked = [groups[a][int(k)] for a, n in quota.items() for k in rng.choice(len(groups[a]), n, replace=False)]
    return sorted(picked, key=lambda row: int(row["id"]))


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(path, len(rows), dict(Counter(row["type"] for row in rows)), dict(Counter(row["answer"] for row in rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=Path, required=True, help="folder that holds shapes_video/ and easy_vqa/")
    args = parser.parse_args()
    video, easy = args.tasks / "shapes_video", args.tasks / "easy_vqa"
    rows = shapes_rows(FULL)
    write_jsonl(video / "data" / "full.jsonl", rows)
    write_jsonl(video / "data" / "quick.jsonl", [row for row in rows if int(row["video"][:4]) < QUICK])
    write_jsonl(easy / "data" / "full.jsonl", easy_rows())
    write_jsonl(easy / "data" / "quick.jsonl", easy_rows(300))
    (video / "clips").mkdir(exist_ok=True)
    with multiprocessing.Pool(2) as pool:
        for index, data in enumerate(pool.imap(functools.partial(_encode, SPLIT), range(FULL))):
            (video / "clips" / f"{index:04d}.mp4").write_bytes(data)
    sizes = [p.stat().st_size for p in (video / "clips").glob("*.mp4")]
    print(f"{len(sizes)} clips, {sum(sizes) / 1e6:.2f} MB, largest {max(sizes)} bytes; types {QUESTION_TYPES}")


if __name__ == "__main__":
    main()
