"""The SigLIP tower: construction, raw features, attention-pooling head, and stage-1 training on single frames."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from data import GRID, PAIRS, easy_pool, easy_vqa, frame_pool, load_clips
from generator import CELLS, COLOR_NAMES, SHAPE_NAMES, SIDE
from optim import Pair, schedule
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

LAYERS = 4
CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": SIDE // GRID,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
}


def build_tower() -> SiglipVisionModel:
    """A fresh tower with ``LAYERS`` layers, post_layernorm and attention-pooling head."""
    tower = SiglipVisionModel._from_config(SiglipVisionConfig(**CONFIG), attn_implementation="sdpa")
    nn.init.normal_(tower.embeddings.position_embedding.weight, std=0.02)
    return tower


def normalise(pixels: np.ndarray | Tensor) -> Tensor:
    """uint8 [N, S, S, 3] -> float [N, 3, S, S] in [-1, 1]."""
    return torch.as_tensor(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def raw_features(tower: SiglipVisionModel, pixels: Tensor) -> Tensor:
    """Output of the last used layer without post_layernorm, [N, 169, width]."""
    hidden = tower.embeddings(pixels)
    for layer in tower.encoder.layers:
        hidden = layer(hidden, None)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return hidden


def pool(tower: SiglipVisionModel, raw: Tensor) -> tuple[Tensor, Tensor]:
    """Global feature [N, width] and attention map [N, 169] (mean over heads) of the attention-pooling head."""
    normed = tower.post_layernorm(raw)
    probe = tower.head.probe.expand(raw.shape[0], -1, -1)
    mixed, weights = tower.head.attention(probe, normed, normed, average_attn_weights=True)
    mixed = mixed + tower.head.mlp(tower.head.layernorm(mixed))
    return mixed[:, 0], weights[:, 0]


class Probes(nn.Module):
    """Linear read-outs used only in training: one on every patch's raw feature, one on the global feature."""

    sizes: ClassVar[dict[str, int]] = {
        "color": len(COLOR_NAMES) + 1,
        "shape": len(SHAPE_NAMES) + 2,
        "offset": 2,
        "place": 2,
        "base": 3,
        "count": 9,
    }

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Linear(width, sum(self.sizes.values()))
        self.cell = nn.Linear(width, 2 + self.sizes["color"] + self.sizes["shape"])
        self.frame = nn.Linear(width, PAIRS + 3 + 9)

    def forward(self, raw: Tensor, frame: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return dict(zip(self.sizes, self.patch(raw).split(list(self.sizes.values()), -1), strict=True)), self.frame(
            frame
        )


def to_cells(tokens: Tensor) -> Tensor:
    """2x2 bilinear pooling of LLaVA-OneVision: [N, 169, D] -> [N, 49, D]."""
    grid = tokens.transpose(1, 2).unflatten(2, (GRID, GRID))
    return F.interpolate(grid, size=(CELLS, CELLS), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


def balanced_ce(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy over object patches plus half of that over background patches."""
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100, reduction="none")
    target = target.flatten()
    return loss[target > 0].mean() + 0.5 * loss[target == 0].mean()


def similarity_loss(frame: Tensor, scene: Tensor) -> Tensor:
    """Frames of one scene should have cosine above 0.97, frames of different scenes below 0.6."""
    unit = F.normalize(frame, dim=-1)
    cosine = unit @ unit.T
    same = scene[:, None] == scene[None]
    off = ~torch.eye(len(scene), dtype=torch.bool)
    pull = F.relu(0.97 - cosine[same & off])
    push = F.relu(cosine[~same] - 0.6)
    return 20 * pull.square().mean() + 4 * push.square().mean()


def losses(tower: SiglipVisionModel, probes: Probes, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    raw = raw_features(tower, normalise(batch["pixels"]))
    frame, attention = pool(tower, raw)
    patch, logits = probes(raw, frame)
    cell_offset, cell_color, cell_shape = probes.cell(to_cells(raw)).split(
        [2, patch["color"].shape[-1], patch["shape"].shape[-1]], -1
    )
    on, cell_on = batch["color"] > 0, batch["cell_color"] > 0
    steps = torch.linspace(-1, 1, GRID)
    place = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).reshape(1, -1, 2).expand(len(raw), -1, -1)
    base = batch["base"][:, None].expand(-1, raw.shape[1], -1)
    count, weight = batch["count"], torch.tensor(4.0)
    return {
        "color": balanced_ce(patch["color"], batch["color"]),
        "shape": 2 * balanced_ce(patch["shape"], batch["shape"]),
        "cell_color": balanced_ce(cell_color, batch["cell_color"]),
        "cell_shape": 2 * balanced_ce(cell_shape, batch["cell_shape"]),
        "cell_offset": 2 * F.smooth_l1_loss(cell_offset[cell_on], batch["cell_offset"][cell_on].clamp(-2, 2)),
        "offset": 1.5 * F.smooth_l1_loss(patch["offset"][on], batch["offset"][on].clamp(-3, 3)),
        "place": 3 * F.mse_loss(patch["place"], place),
        "base": 3 * F.mse_loss(patch["base"], base),
        "count": 0.2 * F.cross_entropy(patch["count"].flatten(0, 1), count.repeat_interleave(raw.shape[1])),
        "pairs": 2 * F.binary_cross_entropy_with_logits(logits[:, :PAIRS], batch["pairs"], pos_weight=weight),
        "frame_base": 2 * F.mse_loss(logits[:, PAIRS : PAIRS + 3], batch["base"]),
        "frame_count": 0.2 * F.cross_entropy(logits[:, PAIRS + 3 :], count),
        "similarity": similarity_loss(frame, batch["scene"]),
        "_raw": raw, "_frame": frame, "_attention": attention,
        "_color": patch["color"], "_shape": patch["shape"], "_cell_color": cell_color, "_cell_shape": cell_shape,
    }  # fmt: skip


def auc(score: np.ndarray, label: np.ndarray) -> float:
    """Probability that a random positive scores above a random negative."""
    order = np.empty(len(score))
    order[np.argsort(score)] = np.arange(1, len(score) + 1)
    pos = label.sum()
    return float((order[label].sum() - pos * (pos + 1) / 2) / (pos * (len(label) - pos)))


@torch.no_grad()
def report(tower: SiglipVisionModel, probes: Probes, pool_: dict[str, np.ndarray], name: str) -> dict[str, float]:
    """Patch accuracies, saliency AUC and scene similarities on held-out frames (stored in pairs of one scene)."""
    parts: dict[str, list[np.ndarray]] = {k: [] for k in ("color", "shape", "cell_color", "cell_shape", "auc", "frame")}
    for start in range(0, len(pool_["pixels"]), 40):
        batch = {k: torch.as_tensor(v[start : start + 40]) for k, v in pool_.items()}
        out = losses(tower, probes, batch)
        for key in ("color", "shape", "cell_color", "cell_shape"):
            on = batch[key] > 0
            parts[key].append((out[f"_{key}"].argmax(-1) == batch[key])[on].float().numpy())
        on = (batch["color"] > 0).numpy()
        rows = [auc(a, o) for a, o in zip(out["_attention"].numpy(), on, strict=True) if o.any()]
        parts["auc"].append(np.array(rows))
        parts["frame"].append(out["_frame"].numpy())
    frame = np.concatenate(parts["frame"])
    frame = frame / np.linalg.norm(frame, axis=1, keepdims=True)
    same = (frame[0::2] * frame[1::2]).sum(1)
    diff = (frame[1:-1:2] * frame[2::2]).sum(1)
    other = pool_["scene"][1:-1:2] != pool_["scene"][2::2]
    result = {
        **{key: np.concatenate(parts[key]).mean() for key in ("color", "shape", "cell_color", "cell_shape")},
        "auc": np.concatenate(parts["auc"]).mean(), "cos_same": same.mean(), "same>.9": (same > 0.9).mean(),
        "cos_cut": diff[other].mean(), "cut<.9": (diff[other] < 0.9).mean(),
    }  # fmt: skip
    print(name, {k: round(float(v), 4) for k, v in result.items()}, flush=True)
    return {k: float(v) for k, v in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--clips", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=24, help="video frames per step (easy-VQA images come on top)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    began = time.time()
    train = frame_pool(load_clips(args.work, "train", args.clips), "train", args.seed)
    held = frame_pool(load_clips(args.work, "val", 60), "val", args.seed)
    easy = easy_pool(easy_vqa("train")[:2000])
    print(f"data {time.time() - began:.0f} s, frames {len(train['pixels'])}", flush=True)
    tower, probes = build_tower(), Probes(CONFIG["hidden_size"])
    matrices = [p for n, p in tower.named_parameters() if p.ndim >= 2 and ("encoder" in n or "patch_embedding" in n)]
    chosen = {id(p) for p in matrices}
    others = [p for p in [*tower.parameters(), *probes.parameters()] if id(p) not in chosen]
    optimiser = Pair(matrices, others, (4e-3, 1.5e-3))
    pairs = len(train["pixels"]) // 2
    few = max(2, args.batch // 6)
    began, running = time.time(), {}
    for step in range(args.steps):
        take = rng.integers(pairs, size=args.batch // 2)
        rows = np.stack([2 * take, 2 * take + 1], 1).reshape(-1)
        more = rng.integers(len(easy["pixels"]), size=few)
        batch = {
            k: torch.as_tensor(np.concatenate([train[k][rows], easy[k][more].astype(train[k].dtype)])) for k in train
        }
        terms = {k: v for k, v in losses(tower, probes, batch).items() if k[0] != "_"}
        sum(terms.values()).backward()
        optimiser.step(schedule(step, args.steps))
        for key, value in terms.items():
            running[key] = 0.95 * running.get(key, float(value.detach())) + 0.05 * float(value.detach())
        if (step + 1) % 25 == 0:
            print(step + 1, f"{time.time() - began:.0f}s", {k: round(v, 3) for k, v in running.items()}, flush=True)
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            tower.eval()
            result = report(tower, probes, held, "held-out")
            tower.train()
            torch.save(
                {"tower": tower.state_dict(), "probes": probes.state_dict(), "step": step + 1, "report": result},
                args.work / "tower.pt",
            )


if __name__ == "__main__":
    main()
