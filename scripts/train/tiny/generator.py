"""Seeded plans of "shapes" clips and the questions about them.

A clip is a pure function of ``(split, index)``: 16 frames, one to three scenes separated by hard cuts, small static
objects, slow movers, and a "star" that is visible for only two or three frames. Everything here is geometry and text;
pixels are in ``render.py``.
"""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np

FRAMES = 16
SIDE = 182  # 13 patches of 14 pixels; 2x2 bilinear pooling gives ceil(13 / 2) = 7 cells per side
CELLS = 7
CELL = SIDE / CELLS
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "black": (0, 0, 0),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
}
COLOR_NAMES = list(COLORS)
SHAPE_NAMES = ["circle", "rectangle", "triangle", "cross", "ring", "diamond"]
STAR = len(SHAPE_NAMES)
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
QUESTION_TYPES = ["exist", "attribute", "place", "event"]
EXTRA_TYPES = ["motion", "order"]
CROWDED = ("train", "val")  # the benchmark and the last part of the training are sparse
BRIEF = ("star", "brief")
LIFE = {"static": (3, 6), "mover": (4, 8), "star": (2, 3), "brief": (2, 3)}  # frames; in crowded clips only for BRIEF
BUSY = 3  # most objects in one frame of a sparse clip (a star comes on top)
MARGIN = 12  # least distance of an object's centre from the border of the frame
MIDLINE = 9  # no "place" question for objects whose centre is closer than this to a midline


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object: its look, its life span (first and last frame, inclusive) and its centre in each of those frames."""

    color: int
    shape: int
    radius: float
    rgb: tuple[float, float, float]
    first: int
    last: int
    path: np.ndarray  # [last - first + 1, 2] centres (x, y) in pixels
    kind: str  # static | mover | brief | star
    motion: str = ""

    @property
    def pair(self) -> tuple[int, int]:
        return self.color, self.shape

    def at(self, frame: int) -> np.ndarray | None:
        return self.path[frame - self.first] if self.first <= frame <= self.last else None


@dataclasses.dataclass(frozen=True)
class Scene:
    """Frames ``first..last`` share one background (``look`` seeds its texture)."""

    first: int
    last: int
    base: tuple[float, float, float]
    look: int


@dataclasses.dataclass(frozen=True)
class Clip:
    split: str
    index: int
    scenes: tuple[Scene, ...]
    things: tuple[Thing, ...]


@dataclasses.dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


def clip_rng(split: str, index: int, stream: int = 0) -> np.random.Generator:
    """Independent random stream of a clip; ``stream`` separates plan, pixels and questions."""
    return np.random.default_rng([zlib.crc32(split.encode()), index, stream])


def _scene_lengths(rng: np.random.Generator) -> list[int]:
    count = int(rng.choice([1, 2, 3], p=[0.15, 0.40, 0.45]))
    while True:
        cuts = np.sort(rng.choice(np.arange(1, FRAMES), count - 1, replace=False))
        lengths = np.diff(np.concatenate([[0], cuts, [FRAMES]]))
        if lengths.min() >= 4:
            return [int(n) for n in lengths]


def _clear(path: np.ndarray, first: int, radius: float, others: list[Thing], gap: float = 5.0) -> bool:
    """True if an object on ``path`` keeps its distance from all ``others`` in every shared frame."""
    for step, centre in enumerate(path):
        for other in others:
            spot = other.at(first + step)
            if spot is not None and np.hypot(*(spot - centre)) < radius + other.radius + gap:
                return False
    return True


def plan_clip(split: str, index: int) -> Clip:
    """The plan of clip ``index`` of ``split``: scenes and objects with their paths. No pixels are touched.

    ``CROWDED`` splits show 4 to 7 objects in every frame, all through their scene. All others are sparse: objects come
    and go (``LIFE``), at most ``BUSY`` at a time.
    """
    rng, crowded = clip_rng(split, index), split in CROWDED
    pairs = [(c, s) for c in range(len(COLOR_NAMES)) for s in range(len(SHAPE_NAMES))]
    rng.shuffle(pairs)
    lengths = _scene_lengths(rng)
    star_scene = int(rng.integers(len(lengths))) if rng.random() < 0.9 else -1
    brief_scene = int(rng.integers(len(lengths))) if rng.random() < 0.4 else -1
    scenes, things, start = [], [], 0
    for number, length in enumerate(lengths):
        end = start + length - 1
        base = tuple(float(v) for v in rng.uniform(165, 245, 3))
        scenes.append(Scene(start, end, base, int(rng.integers(1 << 30))))
        if crowded:
            objects = int(rng.integers(*{1: (6, 8), 2: (5, 7), 3: (4, 6)}[len(lengths)]))
            movers = 1 + int(rng.random() < 0.3)
        else:
            objects = 1 + round(length * rng.uniform(0.38, 0.55))
            movers = min(objects, 1 + int(rng.random() < 0.2))
        kinds = ["mover"] * movers + ["static"] * (objects - movers)
        kinds += ["star"] * (number == star_scene) + ["brief"] * (number == brief_scene)
        placed: list[Thing] = []
        shown = np.zeros(FRAMES, int)
        for kind in kinds:
            for _ in range(300):
                radius, motion = float(rng.uniform(8, 11)), ""
                life = length
                if kind in BRIEF or not crowded:
                    low, high = LIFE[kind]
                    life = min(length, int(rng.integers(low, high + 1)))
                first = start + int(rng.integers(length - life + 1))
                last = first + life - 1
                spot = rng.uniform(MARGIN, SIDE - MARGIN, 2)
                path = np.repeat(spot[None], life, 0)
                if kind == "mover":
                    motion = list(MOTIONS)[int(rng.integers(4))]
                    travel = rng.uniform(2 * CELL, 4 * CELL)
                    path = path + np.linspace(-0.5, 0.5, life)[:, None] * travel * np.array(MOTIONS[motion])[None]
                if path.min() < MARGIN or path.max() > SIDE - MARGIN or not _clear(path, first, radius, placed):
                    continue
                if not crowded and shown[first : last + 1].max() >= BUSY + (kind == "star"):
                    continue
                shown[first : last + 1] += 1
                color, shape = (int(rng.integers(len(COLOR_NAMES))), STAR) if kind == "star" else pairs.pop()
                rgb = tuple(float(v) for v in np.array(COLORS[COLOR_NAMES[color]]) + rng.uniform(-14, 14, 3))
                placed.append(Thing(color, shape, radius, rgb, first, last, path, kind, motion))
                break
        things += placed
        start = end + 1
    return Clip(split, index, tuple(scenes), tuple(things))


def _phrase(pair: tuple[int, int]) -> str:
    return f"{COLOR_NAMES[pair[0]]} {SHAPE_NAMES[pair[1]]}"


def candidate_questions(
    clip: Clip, rng: np.random.Generator, frames: list[int] | None = None
) -> dict[str, list[Question]]:
    """Every question that can be asked when only ``frames`` are shown (default: all), by type, shuffled.

    The word that decides stands right before the question mark wherever the language allows it.
    """
    shown = set(range(FRAMES) if frames is None else frames)
    seen = [t for t in clip.things if any(f in shown for f in range(t.first, t.last + 1))]
    stars = [t for t in seen if t.kind == "star"]
    plain = [t for t in seen if t.kind != "star"]
    out: dict[str, list[Question]] = {kind: [] for kind in QUESTION_TYPES + EXTRA_TYPES}
    present = {t.pair for t in plain}
    colors = [c for c, _ in present]
    shapes = [s for _, s in present]
    absent = [(c, s) for c in range(len(COLOR_NAMES)) for s in range(len(SHAPE_NAMES)) if (c, s) not in present]
    near = [p for p in absent if p[0] in colors and p[1] in shapes]
    far = [p for p in absent if p not in near]
    for pair in present:
        out["exist"].append(Question("exist", f"is there a {_phrase(pair)}?", "yes"))
        pool = near if (rng.random() < 0.7 and near) or not far else far
        out["exist"].append(Question("exist", f"is there a {_phrase(pool[int(rng.integers(len(pool)))])}?", "no"))
    for pair in present:
        if colors.count(pair[0]) == 1 and not any(t.color == pair[0] for t in stars):
            out["attribute"].append(
                Question("attribute", f"what shape is {COLOR_NAMES[pair[0]]}?", SHAPE_NAMES[pair[1]])
            )
        if shapes.count(pair[1]) == 1:
            out["attribute"].append(
                Question("attribute", f"what color is the {SHAPE_NAMES[pair[1]]}?", COLOR_NAMES[pair[0]])
            )
    for thing in plain:
        x, y = thing.path[0]
        if thing.kind != "mover" and min(abs(x - SIDE / 2), abs(y - SIDE / 2)) >= MIDLINE:
            answer = f"{'top' if y < SIDE / 2 else 'bottom'} {'left' if x < SIDE / 2 else 'right'}"
            out["place"].append(Question("place", f"where is the {_phrase(thing.pair)}?", answer))
    out["event"] = [Question("event", "what color is the star?", COLOR_NAMES[t.color]) for t in stars]
    for thing in plain:
        moved = [thing.at(f) for f in sorted(shown) if thing.at(f) is not None]
        if thing.kind == "mover" and np.hypot(*(moved[-1] - moved[0])) >= 1.5 * CELL:
            out["motion"].append(Question("motion", f"which way goes the {_phrase(thing.pair)}?", thing.motion))
    for early in plain:
        for late in plain:
            onset = [min(f for f in shown if t.first <= f <= t.last) for t in (early, late)]
            if onset[1] - onset[0] >= 3 and early.last < late.first:
                yes = f"does the {_phrase(early.pair)} come before the {_phrase(late.pair)}?"
                no = f"does the {_phrase(late.pair)} come before the {_phrase(early.pair)}?"
                out["order"] += [Question("order", yes, "yes"), Question("order", no, "no")]
    for kind in out:
        order = rng.permutation(len(out[kind]))
        out[kind] = [out[kind][i] for i in order]
    return out


def corpus() -> list[str]:
    """Every sentence the generator can produce (used to train the tokenizer)."""
    lines = [
        "what color is the star?",
        "top left",
        "top right",
        "bottom left",
        "bottom right",
        "up",
        "down",
        "yes",
        "no",
    ]
    for c in COLOR_NAMES:
        lines += [c, f"what shape is {c}?"]
        for s in SHAPE_NAMES:
            lines += [f"is there a {c} {s}?", f"where is the {c} {s}?", f"which way goes the {c} {s}?"]
            lines += [f"does the {c} {s} come before the {c} {s}?", s, f"what color is the {s}?"]
    return lines
