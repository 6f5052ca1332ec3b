"""Stages 2 and 3: align the projector with the decoder's words, then train projector and decoder on questions."""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from decoder import Shape, TinyLlava, Watch, initialise
from features import clip_features, easy_features
from generator import (
    CELLS,
    COLOR_NAMES,
    EXTRA_TYPES,
    FRAMES,
    QUESTION_TYPES,
    SHAPE_NAMES,
    Question,
    candidate_questions,
    clip_rng,
    plan_clip,
)
from optim import Pair, schedule
from text import Text
from torch import Tensor
from torch import distributed as dist
from tower import to_cells

N = CELLS * CELLS
SHARES = {"exist": 5, "attribute": 4, "place": 5, "event": 2}
BLIND_LAYERS = 3
WATCHED = (1, 2)  # layers whose attention from the last prompt token is trained to prefer cells with objects


@dataclasses.dataclass(frozen=True)
class Stage:
    """A leg of the curriculum: frames per clip, clips and questions per step, shares of the visual tokens to keep."""

    steps: int
    frames: int
    clips: int
    asks: int
    keep: tuple[float, ...] = (1.0,)
    split: str = "train"
    rate: tuple[float, float] = (1.0, 1.0)  # learning-rate multiplier at its beginning and end
    blind: float = 0.5  # share of steps in which questions see no visual token in the first BLIND_LAYERS layers
    saliency: float = 0.0  # weight of the early-attention term
    extra: int = 0  # share of motion and of order questions, next to SHARES


CURRICULUM = [
    Stage(600, 1, 24, 8),
    Stage(500, 4, 10, 14, (1.0, 0.5)),
    Stage(300, 16, 6, 16, (0.33, 0.45), rate=(1.0, 0.9)),
    Stage(700, 16, 8, 14, (0.2, 0.33), "sparse_train", rate=(0.75, 0.27)),
    Stage(300, 16, 6, 14, (1.0, 1.0, 0.25), "sparse_train", rate=(0.27, 0.1)),
    Stage(900, 16, 6, 16, (0.2, 0.35, 1.0), "sparse_train", rate=(0.4, 0.0), blind=0.3, saliency=0.1, extra=4),
]


class Asker:
    """Turns questions into padded id tensors and supervised positions."""

    def __init__(self, text: Text) -> None:
        self.text = text
        self.memo: dict[tuple[str, str], tuple[list[int], list[tuple[int, int, float]]]] = {}

    def encode(self, q: Question) -> tuple[list[int], list[tuple[int, int, float]]]:
        """Input ids, and (position, target, weight): the answer, and early read-outs up to the question mark."""
        key = (q.text, q.answer)
        if key not in self.memo:
            ask, reply = self.text.ask(q.text), self.text.reply(q.answer)
            targets = [(len(ask) - 1 + k, token, 1.0 if k + 1 < len(reply) else 0.2) for k, token in enumerate(reply)]
            mark = ask.index(self.text.mark)
            targets.append((mark, reply[-2], 0.5))
            if q.kind != "easy":
                targets += [(mark - 1, token, 0.7) for token in reply[:-1]]
            self.memo[key] = (ask + reply[:-1], targets)
        return self.memo[key]

    def batch(self, rows: list[list[Question]]) -> tuple[Tensor, Tensor]:
        """ids [B, Q, T] and supervision [n, 5]: clip, question, position, target, 100 * weight."""
        coded = [[self.encode(q) for q in row] for row in rows]
        width = max(len(ids) for row in coded for ids, _ in row)
        out = torch.full((len(rows), max(map(len, rows)), width), self.text.end)
        marks = []
        for b, row in enumerate(coded):
            for k, (ids, targets) in enumerate(row):
                out[b, k, : len(ids)] = torch.tensor(ids)
                marks += [(b, k, p, token, round(100 * w)) for p, token, w in targets]
        return out, torch.tensor(marks)


def sample_questions(
    pools: dict[str, list[Question]], count: int, rng: np.random.Generator, extra: int
) -> list[Question]:
    """``count`` questions, types by SHARES (``extra`` for motion and order), no repeats while there are others."""
    shares = {**SHARES, "motion": extra, "order": extra}
    left = {k: list(v) for k, v in pools.items() if shares[k] and v}
    out: list[Question] = []
    while len(out) < count:
        live = [k for k in left if left[k]]
        if not live:
            out.append(out[int(rng.integers(len(out)))])
            continue
        weights = np.array([shares[k] for k in live], float)
        out.append(left[live[int(rng.choice(len(live), p=weights / weights.sum()))]].pop())
    return out


def easy_questions(row: dict, count: int, rng: np.random.Generator) -> list[Question]:
    picks = rng.choice(len(row["qa"]), count, replace=len(row["qa"]) < count)
    return [Question("easy", *row["qa"][int(k)]) for k in picks]


def prefix_of(
    model: TinyLlava, text: Text, visual: Tensor, places: Tensor, end: Tensor, newline: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """System text, visual tokens (at ``places``), newline: embeddings [B, P, D], positions [B, P], next [B]."""
    b, s = len(visual), len(text.before)
    before = model.embed_tokens(torch.tensor(text.before)).expand(b, -1, -1)
    parts, where = [before, visual], [torch.arange(s).expand(b, -1), places + s]
    if newline:
        parts.append(model.image_newline.expand(b, 1, -1))
        where.append((end + s)[:, None])
    return torch.cat(parts, 1), torch.cat(where, 1), end + s + int(newline)


def choose(cover: Tensor, keep: int, generator: torch.Generator) -> Tensor:
    """Indices [B, keep] in order: all cells with an object if they fit, the rest at random."""
    score = torch.rand(cover.shape[:2], generator=generator) + 2.0 * (cover.amax(-1) > 0.05)
    return score.topk(keep, 1).indices.sort(1).values


def align(
    model: TinyLlava,
    axes: Tensor,
    feats: np.ndarray,
    cover: np.ndarray,
    text: Text,
    steps: int,
    rng: np.random.Generator,
) -> None:
    """Stage 2: projected and pooled tokens should equal the words of what is in the cell, plus a little place."""
    words = torch.stack(
        [model.embed_tokens.weight[text.encode(" " + w)[-1]] for w in [*COLOR_NAMES, *SHAPE_NAMES, "star"]]
    ).detach()
    line = torch.tanh(2 * torch.linspace(1, -1, CELLS))
    place = 1.2 * (line[:, None, None] * axes[0] + line[None, :, None] * axes[1]).reshape(1, 1, N, -1)
    optimiser = torch.optim.AdamW(model.mm_projector.parameters(), 4e-3, weight_decay=0.0)
    for step in range(steps):
        take = rng.integers(len(feats), size=12)
        frame = rng.integers(FRAMES, size=(12, 2))
        x = torch.as_tensor(feats[take[:, None], frame]).float()
        c = torch.as_tensor(cover[take[:, None], frame]).float()
        target = 1.5 * c.sqrt() @ words + place
        out = to_cells(model.mm_projector(x.flatten(0, 1))).unflatten(0, (12, 2))
        loss = F.mse_loss(out, target) / target.square().mean()
        loss.backward()
        optimiser.param_groups[0]["lr"] = 4e-3 * schedule(step, steps)
        optimiser.step()
        optimiser.zero_grad()
        if (step + 1) % 200 == 0:
            print("align", step + 1, round(loss.item(), 3), flush=True)


class Trainer:
    def __init__(self, work: Path, clips: int, sparse: int, seed: int) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.work, self.rng = work, np.random.default_rng([seed, self.rank])
        self.generator = torch.Generator().manual_seed(seed * 1000 + self.rank)
        self.text = Text(work / "tok")
        self.asker = Asker(self.text)
        sizes = {"train": clips, "sparse_train": sparse}
        self.sets = {split: clip_features(work, split, size) for split, size in sizes.items()}
        self.plans = {split: [plan_clip(split, k) for k in range(size)] for split, size in sizes.items()}
        self.val = clip_features(work, "sparse_val", 100)
        self.easy, self.easy_rows = easy_features(work, "train", 4000)
        self.easy_test = easy_features(work, "test", 200)
        torch.manual_seed(seed)  # all ranks start from the same weights
        self.model = TinyLlava(Shape(vocab=self.text.size))

    def video_batch(self, stage: Stage, share: float) -> tuple[Tensor, ...]:
        """This rank's part of a step: questions, prefix, positions, question starts; ``share`` of the tokens kept."""
        rng, f, clips = self.rng, stage.frames, stage.clips // self.world
        feats, covers = self.sets[stage.split]
        take = rng.integers(len(feats), size=clips)
        start = rng.integers(FRAMES - f + 1, size=clips)
        rows = []
        for k, s in zip(take, start, strict=True):
            pools = candidate_questions(self.plans[stage.split][k], rng, list(range(s, s + f)))
            rows.append(sample_questions(pools, stage.asks, rng, stage.extra))
        x = torch.as_tensor(np.stack([feats[k, s : s + f] for k, s in zip(take, start, strict=True)])).float()
        cover = (
            torch.as_tensor(np.stack([covers[k, s : s + f] for k, s in zip(take, start, strict=True)]))
            .float()
            .flatten(1, 2)
        )
        x = x + 0.05 * x.std() * torch.randn(x.shape, generator=self.generator)
        visual = to_cells(self.model.mm_projector(x.flatten(0, 1))).reshape(clips, f * N, -1)
        places = torch.arange(f * N).expand(clips, -1)
        end = torch.full((clips,), f * N)
        if share < 1:
            places = chosen = choose(cover, round(share * f * N), self.generator)
            visual = visual.gather(1, places[..., None].expand(-1, -1, visual.shape[-1]))
            if rng.random() < 0.4:
                places = torch.arange(places.shape[1]).expand_as(places)
                end = torch.full_like(end, places.shape[1])
        objects = cover.amax(-1) > 0.05
        if share < 1:
            objects = objects.gather(1, chosen)
        return rows, *prefix_of(self.model, self.text, visual, places, end, True), objects

    def easy_batch(self, images: int = 16, asks: int = 6) -> tuple[Tensor, ...]:
        images //= self.world
        take = self.rng.integers(len(self.easy), size=images)
        rows = [easy_questions(self.easy_rows[k], asks, self.rng) for k in take]
        visual = self.model.mm_projector(torch.as_tensor(self.easy[take]).float())
        n = visual.shape[1]
        return rows, *prefix_of(
            self.model, self.text, visual, torch.arange(n).expand(images, -1), torch.full((images,), n), False
        )

    def loss(self, batch: tuple, blind: int, score: dict[str, list[float]], saliency: float = 0.0) -> Tensor:
        """Weighted cross-entropy; hits and misses go to ``score``. ``saliency`` adds the early-attention term."""
        rows, prefix, positions, starts, *objects = batch
        ids, marks = self.asker.batch(rows)
        before = len(self.text.before)
        watch = None
        if saliency and not blind and objects:
            asked = torch.tensor([[len(self.text.ask(q.text)) - 1 for q in row] for row in rows])
            mark = (ids == self.text.mark).int().argmax(-1)
            watch = Watch(WATCHED, torch.stack([asked, mark], 1))
        hidden = self.model.packed(prefix, positions, ids, starts, (before, prefix.shape[1]), blind, watch=watch)
        logits = self.model.lm_head(hidden[marks[:, 0], marks[:, 1], marks[:, 2]])
        weight = marks[:, 4] / 100
        right = logits.argmax(-1) == marks[:, 3]
        wrong = {
            (b, k)
            for (b, k, _, _, w), r in zip(marks.tolist(), right.tolist(), strict=True)
            if w in (100, 20) and not r
        }
        for b, row in enumerate(rows):
            for k, question in enumerate(row):
                score[question.kind].append(float((b, k) not in wrong))
        loss = (F.cross_entropy(logits, marks[:, 3], reduction="none") * weight).sum() / weight.sum()
        for attention in watch.maps if watch else ():
            visual = attention[..., before : before + objects[0].shape[1]]
            share = (visual * objects[0][:, None]).sum(-1) / visual.sum(-1)
            loss = loss - saliency * share.clamp_min(1e-6).log().mean()
        return loss

    def average_gradients(self, params: list[Tensor]) -> None:
        """Mean over the ranks. One message per step: unlike threads this does not suffer when the cores are shared."""
        if self.world == 1:
            return
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])
        dist.all_reduce(flat)
        for p, part in zip(params, (flat / self.world).split([p.numel() for p in params]), strict=True):
            p.grad = part.view_as(p)

    @torch.no_grad()
    def validate(self, clips: int = 60) -> dict[str, float]:
        """Exact-match accuracy (teacher forced) on whole held-out clips, dense and with a random tenth; on easy-VQA."""
        score: dict[str, list[float]] = defaultdict(list)
        for k in range(clips):
            pools = candidate_questions(plan_clip("sparse_val", k), clip_rng("sparse_val", k, 2))
            row = [q for kind in [*QUESTION_TYPES, *EXTRA_TYPES] for q in pools[kind][:3]]
            visual = to_cells(self.model.mm_projector(torch.as_tensor(self.val[0][k]).float())).reshape(
                1, FRAMES * N, -1
            )
            end = torch.tensor([FRAMES * N])
            few = torch.randperm(FRAMES * N, generator=torch.Generator().manual_seed(k))[:78].sort().values[None]
            for name, places in (("", torch.arange(FRAMES * N)[None]), ("~10%", few)):
                part: dict[str, list[float]] = defaultdict(list)
                self.loss(([row], *prefix_of(self.model, self.text, visual[:, places[0]], places, end, True)), 0, part)
                for kind, values in part.items():
                    score[kind + name] += values
        for k in range(len(self.easy_test[0])):
            row = [Question("easy", *qa) for qa in self.easy_test[1][k]["qa"]]
            visual = self.model.mm_projector(torch.as_tensor(self.easy_test[0][k : k + 1]).float())
            n = visual.shape[1]
            self.loss(
                ([row], *prefix_of(self.model, self.text, visual, torch.arange(n)[None], torch.tensor([n]), False)),
                0,
                score,
            )
        result = {k: float(np.mean(v)) for k, v in score.items()}
        result["mean"] = float(np.mean([result[k] for k in QUESTION_TYPES]))
        result["mean~10%"] = float(np.mean([result[k + "~10%"] for k in QUESTION_TYPES]))
        return result

    def run(self, seed: int, resume: bool) -> None:
        torch.manual_seed(seed)
        enc = self.text.encode
        places = {
            enc("top")[0]: (0, 1),
            enc("bottom")[0]: (0, -1),
            enc("top left")[1]: (1, 1),
            enc("top right")[1]: (1, -1),
        }
        axes = initialise(self.model, self.text, [*COLOR_NAMES, *SHAPE_NAMES], places)
        matrices = [p for n, p in self.model.named_parameters() if n.startswith("layers") and p.ndim == 2]
        others = [p for n, p in self.model.named_parameters() if not (n.startswith("layers") and p.ndim == 2)]
        optimiser = Pair(matrices, others, (4e-3, 1.2e-3))
        done, path = 0, self.work / "decoder.pt"
        if resume and path.exists():
            saved = torch.load(path)
            self.model.load_state_dict(saved["model"])
            optimiser.load_state_dict(saved["optimiser"])
            done = saved["step"]
            self.rng = np.random.default_rng([seed, self.rank, done])
        else:
            align(self.model, axes, *self.sets["train"], self.text, 800, np.random.default_rng(seed))
        plan = [(stage, k / stage.steps) for stage in CURRICULUM for k in range(stage.steps)]
        score: dict[str, list[float]] = defaultdict(list)
        began = time.time()
        for step in range(done, len(plan)):
            dice = np.random.default_rng([seed, 77, step])  # choices that all ranks share
            stage, progress = plan[step]
            share = float(dice.choice(stage.keep))
            batch = self.easy_batch() if step % 5 == 4 else self.video_batch(stage, share)
            blind = BLIND_LAYERS if dice.random() < stage.blind else 0
            loss = self.loss(batch, blind, score, stage.saliency)
            loss.backward()
            self.average_gradients(optimiser.params)
            rate = stage.rate[0] + progress * (stage.rate[1] - stage.rate[0])
            optimiser.step(rate * min(1.0, (step + 1) / 30))
            if self.rank > 0:
                continue
            if (step + 1) % 50 == 0:
                shown = {k: round(float(np.mean(v)), 3) for k, v in score.items()}
                print(
                    step + 1,
                    f"{stage.frames}f {time.time() - began:.0f}s loss {loss.item():.3f}",
                    shown,
                    flush=True,
                )
                score.clear()
            if (step + 1) % 200 == 0 or step + 1 == len(plan):
                result = self.validate()
                print("val", step + 1, {k: round(v, 3) for k, v in result.items()}, flush=True)
                state = {
                    "model": self.model.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "step": step + 1,
                    "val": result,
                }
                torch.save(state, path.with_suffix(".tmp"))
                path.with_suffix(".tmp").replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=3000)
    parser.add_argument("--sparse", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    torch.set_num_threads(2)
    if "WORLD_SIZE" in os.environ:  # started by torchrun: one thread per process
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    Trainer(args.work, args.clips, args.sparse, args.seed).run(args.seed, args.resume)


if __name__ == "__main__":
    main()
