"""Muon for weight matrices, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def orthogonalise(update: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Newton-Schulz iteration: replaces the singular values of ``update`` by values near one."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update / (update.norm() + 1e-7)
    flip = x.shape[0] > x.shape[1]
    if flip:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if flip else x


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, scaled to the size of an AdamW step (0.2 * sqrt of the longer side)."""

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.02
    ) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad = p.grad.flatten(1)
                state = self.state[p]
                buf = state.setdefault("momentum", torch.zeros_like(grad))
                buf.lerp_(grad, 1 - group["momentum"])
                update = orthogonalise(grad.lerp(buf, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view_as(p), alpha=-group["lr"] * 0.2 * max(update.shape) ** 0.5)


class Pair:
    """Two optimisers with one learning-rate multiplier, gradient clipping included."""

    def __init__(self, matrices: list[torch.Tensor], others: list[torch.Tensor], lr: tuple[float, float]) -> None:
        self.parts = [Muon(matrices, lr[0]), torch.optim.AdamW(others, lr[1], betas=(0.9, 0.98), weight_decay=0.0)]
        self.base = lr
        self.params = matrices + others

    def step(self, scale: float, clip: float = 1.0) -> float:
        norm = float(torch.nn.utils.clip_grad_norm_(self.params, clip))
        for part, lr in zip(self.parts, self.base, strict=True):
            part.param_groups[0]["lr"] = lr * scale
            part.step()
            part.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, state: list[dict]) -> None:
        for part, saved in zip(self.parts, state, strict=True):
            part.load_state_dict(saved)


def schedule(step: int, total: int, warmup: int = 30, flat: float = 0.4) -> float:
    """Linear warm-up, a plateau until ``flat`` of the run, then linear to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return min(1.0, max(0.0, (total - step) / (total * (1 - flat))))
