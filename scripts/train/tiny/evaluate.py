"""Measure an exported checkpoint on the benchmark: dense, blind, reduced before the decoder, reduced inside it.

An answer counts when greedy decoding would produce exactly it. Tables are printed as Markdown and written as JSON.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from build_tasks import SPLIT
from data import easy_vqa, enlarge
from decoder import Shape, TinyLlava
from export import TOWER_PREFIX
from features import clip_cover
from generator import CELLS, FRAMES, QUESTION_TYPES, Question, plan_clip
from render import decode_mp4
from safetensors.torch import load_file
from text import Text
from torch import Tensor
from tower import auc, build_tower, normalise, pool, raw_features, to_cells
from train_decoder import Asker, prefix_of
from transformers import SiglipVisionModel

N = CELLS * CELLS


class Checkpoint:
    """Tower, hub head and decoder of an exported checkpoint, in float32."""

    def __init__(self, folder: Path) -> None:
        weights = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
        hub = {
            k.removeprefix("vision_model."): v.float()
            for k, v in load_file(folder / "vision_tower" / "model.safetensors").items()
        }
        self.text = Text(folder)
        self.asker = Asker(self.text)
        self.tower: SiglipVisionModel = build_tower().eval()
        own = {k.removeprefix(TOWER_PREFIX): v for k, v in weights.items() if k.startswith(TOWER_PREFIX)}
        own |= {k: v for k, v in hub.items() if k.startswith("head.")}
        self.tower.load_state_dict(own)
        config = json.loads((folder / "config.json").read_text())
        self.model = TinyLlava(
            Shape(
                vocab=config["vocab_size"],
                vision=config["mm_hidden_size"],
                width=config["hidden_size"],
                layers=config["num_hidden_layers"],
                heads=config["num_attention_heads"],
                groups=config["num_key_value_heads"],
                mlp=config["intermediate_size"],
                theta=config["rope_theta"],
            )
        ).eval()
        names = {k.removeprefix("model."): v for k, v in weights.items() if not k.startswith(TOWER_PREFIX)}
        self.model.load_state_dict(names)

    @torch.no_grad()
    def video(self, frames: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Visual tokens [T * 49, D], pooled attention [T, 49], global features [T, width] of uint8 frames."""
        raw = raw_features(self.tower, normalise(frames))
        glob, attention = pool(self.tower, raw)
        tokens = to_cells(self.model.mm_projector(raw))
        return tokens.flatten(0, 1), to_cells(attention[..., None])[..., 0], glob

    @torch.no_grad()
    def image(self, pixels: np.ndarray) -> tuple[Tensor, Tensor]:
        raw = raw_features(self.tower, normalise(pixels[None]))
        return self.model.mm_projector(raw)[0], pool(self.tower, raw)[1][0]

    @torch.no_grad()
    def answers(
        self,
        visual: Tensor,
        places: Tensor,
        end: int,
        newline: bool,
        questions: list[Question],
        keep: dict[int, Tensor] | None = None,
    ) -> list[bool]:
        """Whether each question is answered exactly, given the visual tokens at ``places`` of ``end`` places."""
        prefix, positions, starts = prefix_of(
            self.model, self.text, visual[None], places[None], torch.tensor([end]), newline
        )
        ids, marks = self.asker.batch([questions])
        hidden = self.model.packed(prefix, positions, ids, starts, (0, 0), 0, keep)
        marks = marks[(marks[:, 4] == 100) | (marks[:, 4] == 20)]
        right = self.model.lm_head(hidden[0, marks[:, 1], marks[:, 2]]).argmax(-1) == marks[:, 3]
        good = [True] * len(questions)
        for k, ok in zip(marks[:, 1].tolist(), right.tolist(), strict=True):
            good[k] &= ok
        return good

    @torch.no_grad()
    def fastv(self, visual: Tensor, newline: bool, question: Question, layer: int, keep: int) -> bool:
        """FastV: after ``layer`` layers keep the visual tokens that the last prompt token attends to most."""
        end = len(visual)
        prefix, _, _ = prefix_of(
            self.model, self.text, visual[None], torch.arange(end)[None], torch.tensor([end]), newline
        )
        ask, reply = self.text.ask(question.text), self.text.reply(question.answer)
        x = torch.cat([prefix, self.model.embed_tokens(torch.tensor([ask + reply[:-1]]))], 1)
        positions, last = torch.arange(x.shape[1])[None], prefix.shape[1] + len(ask) - 1
        start = len(self.text.before)
        for number, block in enumerate(self.model.layers):
            q, k, v = block.self_attn.project(block.input_layernorm(x), self.model.rope(positions))
            x = block.finish(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))
            if number == layer - 1:
                score = (
                    (q[:, :, last, None] * k[:, :, : last + 1]).sum(-1).mul(q.shape[-1] ** -0.5).softmax(-1).mean(1)[0]
                )
                best = score[start : start + end].topk(keep).indices.sort().values + start
                index = torch.cat([torch.arange(start), best, torch.arange(start + end, x.shape[1])])
                x, positions = x[:, index], positions[:, index]
        logits = self.model.lm_head(self.model.norm(x))[0, -len(reply) :]
        return logits.argmax(-1).tolist() == reply


def spread(tokens: Tensor, keep: int) -> Tensor:
    """Max-min diversity by cosine distance (DivPrune): greedily add the token farthest from all chosen ones."""
    unit = F.normalize(tokens, dim=-1)
    distance = 1 - unit @ unit.T
    chosen = [int((distance + 2 * torch.eye(len(unit))).amin(0).argmax())]
    nearest = distance[chosen[0]].clone()
    while len(chosen) < keep:
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distance[chosen[-1]])
    return torch.tensor(chosen).sort().values


def selectors(seed: int) -> dict[str, Callable[[Tensor, Tensor, int], Tensor]]:
    """Token choices before the decoder: (tokens [n, D], attention [T, 49], keep) -> indices."""
    generator = torch.Generator().manual_seed(seed)

    def frame_top(tokens: Tensor, attention: Tensor, keep: int) -> Tensor:
        frames, cells = attention.shape
        quota = [len(part) for part in np.array_split(np.arange(keep), frames)]
        parts = [row.topk(q).indices + f * cells for f, (row, q) in enumerate(zip(attention, quota, strict=True))]
        return torch.cat(parts).sort().values

    def change(tokens: Tensor, attention: Tensor, keep: int) -> Tensor:
        grid = F.normalize(tokens, dim=-1).unflatten(0, attention.shape)
        score = torch.full(attention.shape, 9.0)
        score[1:] = 1 - (grid[1:] * grid[:-1]).sum(-1)
        score[0] = score[0] + attention[0]
        return score.flatten().topk(keep).indices.sort().values

    return {
        "random": lambda t, a, k: torch.randperm(len(t), generator=generator)[:k].sort().values,
        "uniform stride": lambda t, a, k: torch.linspace(0, len(t) - 1, k).round().long(),
        "attention, per frame": frame_top,
        "attention, per video": lambda t, a, k: a.flatten().topk(k).indices.sort().values,
        "frame difference": change,
        "max-min diversity": lambda t, a, k: spread(t, k),
    }


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Scores:
    """Accuracy per method and question type."""

    def __init__(self) -> None:
        self.hits: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))

    def add(self, method: str, questions: list[Question], good: list[bool]) -> None:
        for q, ok in zip(questions, good, strict=True):
            self.hits[method][q.kind].append(ok)

    def table(self, kinds: list[str]) -> dict[str, dict[str, float]]:
        out = {}
        print("| method | " + " | ".join(kinds) + " | mean |\n|---|" + "---|" * (len(kinds) + 1))
        for method, by in self.hits.items():
            row = {k: 100 * float(np.mean(by[k])) for k in kinds if by[k]}
            row["mean"] = float(np.mean(list(row.values())))
            out[method] = {**row, "n": sum(map(len, by.values()))}
            print(f"| {method} | " + " | ".join(f"{row[k]:.1f}" for k in [*kinds, "mean"]) + " |", flush=True)
        return out


def clips_of(folder: Path, rows: list[dict]) -> Iterator[tuple[np.ndarray, list[Question]]]:
    by: dict[str, list[Question]] = defaultdict(list)
    for row in rows:
        by[row["video"]].append(Question(row["type"], row["question"], row["answer"]))
    for name, questions in by.items():
        yield decode_mp4((folder / "clips" / name).read_bytes()), questions


def evaluate_videos(
    ckpt: Checkpoint, folder: Path, rows: list[dict], ratios: list[float], layers: list[int], fastv: int
) -> dict[str, dict[str, float]]:
    scores, choose = Scores(), selectors(0)
    total, before = FRAMES * N, len(ckpt.text.before)
    generator = torch.Generator().manual_seed(1)
    for number, (frames, questions) in enumerate(clips_of(folder, rows)):
        tokens, attention, _ = ckpt.video(frames)
        everything = torch.arange(total)
        scores.add("dense", questions, ckpt.answers(tokens, everything, total, True, questions))
        zero = torch.zeros_like(tokens)
        scores.add("blind (zero tokens)", questions, ckpt.answers(zero, everything, total, True, questions))
        for ratio in ratios:
            keep = int(total * ratio)
            for name, select in choose.items():
                index = select(tokens, attention, keep)
                good = ckpt.answers(tokens[index], index, total, True, questions)
                scores.add(f"{name} {100 * ratio:g}%", questions, good)
                if name == "random":
                    good = ckpt.answers(tokens[index], torch.arange(keep), keep, True, questions)
                    scores.add(f"{name}, positions closed up {100 * ratio:g}%", questions, good)
        keep = int(total * ratios[0])
        for layer in layers:
            kept = torch.randperm(total, generator=generator)[:keep].sort().values + before
            index = torch.cat([torch.arange(before), kept, torch.tensor([before + total])])[None]
            good = ckpt.answers(tokens, everything, total, True, questions, {layer: index})
            scores.add(f"random after layer {layer}, {100 * ratios[0]:g}%", questions, good)
            if number < fastv:
                good = [ckpt.fastv(tokens, True, q, layer, keep) for q in questions]
                scores.add(f"FastV after layer {layer}, {100 * ratios[0]:g}%", questions, good)
    return scores.table(QUESTION_TYPES)


def evaluate_signals(ckpt: Checkpoint, folder: Path, rows: list[dict]) -> dict[str, float]:
    """What methods read from the tower: does attention find objects, do global features tell scenes apart?"""
    areas, within, cuts = [], [], []
    for name in dict.fromkeys(row["video"] for row in rows):
        index = int(name.split(".")[0])
        _, attention, glob = ckpt.video(decode_mp4((folder / "clips" / name).read_bytes()))
        object_cells = clip_cover(SPLIT, index).max(-1) > 0.05
        areas += [auc(a.numpy(), o) for a, o in zip(attention, object_cells, strict=True) if o.any() and not o.all()]
        cosine = F.cosine_similarity(glob[1:], glob[:-1], dim=-1).tolist()
        ends = {scene.last for scene in plan_clip(SPLIT, index).scenes}
        for k, value in enumerate(cosine):
            (cuts if k in ends else within).append(value)
    out = {
        "AUC of pooled attention for cells with an object": float(np.mean(areas)),
        "frame-to-frame cosine within scenes": float(np.mean(within)),
        "share above 0.9": float(np.mean(np.array(within) > 0.9)),
        "cosine at cuts": float(np.mean(cuts)),
        "share below 0.9": float(np.mean(np.array(cuts) < 0.9)),
        "cuts": len(cuts),
    }
    print({k: round(v, 3) for k, v in out.items()}, flush=True)
    return out


def evaluate_easy(ckpt: Checkpoint, rows: list[dict], ratios: list[float]) -> dict[str, dict[str, float]]:
    pictures = {row["id"]: row["image"] for row in easy_vqa("test")}
    by: dict[int, list[Question]] = defaultdict(list)
    for row in rows:
        by[row["image"]].append(Question(row["type"], row["question"], row["answer"]))
    scores = Scores()
    generator = torch.Generator().manual_seed(0)
    for image, questions in by.items():
        tokens, attention = ckpt.image(enlarge(pictures[image]))
        total = len(tokens)
        scores.add("dense", questions, ckpt.answers(tokens, torch.arange(total), total, False, questions))
        scores.add(
            "blind (zero tokens)", questions, ckpt.answers(tokens * 0, torch.arange(total), total, False, questions)
        )
        for ratio in ratios:
            keep = int(total * ratio)
            index = torch.randperm(total, generator=generator)[:keep].sort().values
            scores.add(
                f"random {100 * ratio:g}%", questions, ckpt.answers(tokens[index], index, total, False, questions)
            )
            index = attention.topk(keep).indices.sort().values
            scores.add(
                f"attention {100 * ratio:g}%", questions, ckpt.answers(tokens[index], index, total, False, questions)
            )
    return scores.table(["color", "shape", "yes_no"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--data", choices=["quick", "full"], default="quick")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.25])
    parser.add_argument("--layers", type=int, nargs="*", default=[1, 2, 3, 4])
    parser.add_argument("--fastv", type=int, default=25, help="clips on which FastV's ranking is run (slow)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ckpt = Checkpoint(args.checkpoint)
    video, easy = args.tasks / "shapes_video", args.tasks / "easy_vqa"
    rows = read_rows(video / "data" / f"{args.data}.jsonl")
    out = {"signals": evaluate_signals(ckpt, video, rows[: 7 * 100])}
    out |= {"shapes_video": evaluate_videos(ckpt, video, rows, args.ratios, args.layers, args.fastv)}
    out["easy_vqa"] = evaluate_easy(ckpt, read_rows(easy / "data" / f"{args.data}.jsonl"), args.ratios)
    if args.json:
        args.json.write_text(json.dumps(out, indent=2) + "\n")


if __name__ == "__main__":
    main()
