"""Searching a pruning policy: an evolution of the ratios of all matrices at one share of zeros.

The paper (EfficientLLaVA, arXiv 2503.15369) describes such a search without its numbers; which operators, how many
candidates and which bounds there are is ours (docs/pruning.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from accelerate_methods.stages.errors import MethodError
from llava.model.pruning.policy import Policy


@dataclasses.dataclass(frozen=True)
class Evolution:
    """
    Attributes:
        share: of all weights that become zero; every candidate has it.
        spread: how far the ratio of a matrix may be from ``share``.
        generations: rounds; candidates: in each; parents: of these that go on.
        mutation: standard deviation of what is added to a ratio; mutated: share of the ratios that change.
        seed: of everything that is drawn.
    """

    share: float = 0.5
    spread: float = 0.3
    generations: int = 10
    candidates: int = 16
    parents: int = 4
    mutation: float = 0.1
    mutated: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (("share", 0, 0.95), ("spread", 0, 0.95), ("mutation", 0, 1), ("mutated", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise MethodError(f"search: {name} must be in [{low}, {high}], got {getattr(self, name)!r}.")
        if not (1 <= self.parents <= self.candidates and self.generations >= 0):
            raise MethodError(
                f"search: 1 <= parents <= candidates and generations >= 0, got {self.parents} parents, "
                f"{self.candidates} candidates, {self.generations} generations."
            )

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and largest ratio of a matrix."""
        return max(0.0, self.share - self.spread), min(0.95, self.share + self.spread)


@dataclasses.dataclass
class Found:
    """
    Attributes:
        policy: the best; fitness: its (lower is better).
        history: best fitness of each generation, the uniform policy's first.
    """

    policy: Policy
    fitness: float
    history: list[float]


def search(
    sizes: Mapping[str, int], evolution: Evolution, fitness: Callable[[Policy], float],
    between: Callable[[Policy], bool] | None = None, told: Callable[[str], None] = lambda line: None,
) -> Found:  # fmt: skip
    """The fittest policy.

    Args:
        sizes: weights of each matrix; fitness: of a policy, lower is better.
        between: called with the best policy after every generation; whether fitnesses have changed by that.
        told: gets a line per generation.
    """
    names, weights = list(sizes), torch.tensor([float(n) for n in sizes.values()])
    weights = weights / weights.sum()
    draw = torch.Generator().manual_seed(evolution.seed)

    def rated(ratios: Tensor) -> tuple[float, Tensor]:
        return fitness(_policy(names, ratios)), ratios

    uniform = torch.full((len(names),), evolution.share)
    pool = [rated(uniform)]
    history = [pool[0][0]]
    for generation in range(evolution.generations):
        if generation == 0:
            children = [_mutated(uniform, weights, evolution, draw) for _ in range(evolution.candidates - 1)]
        else:
            children = [_child([r for _, r in pool], weights, evolution, draw) for _ in range(evolution.candidates)]
        pool = sorted(pool + [rated(child) for child in children], key=lambda one: one[0])[: evolution.parents]
        if between is not None and between(_policy(names, pool[0][1])):
            pool = sorted((rated(ratios) for _, ratios in pool), key=lambda one: one[0])
        history.append(pool[0][0])
        done = f"generation {generation + 1}/{evolution.generations}"
        told(f"{done}: fitness {pool[0][0]:.5f} (uniform {history[0]:.5f})")
    return Found(_policy(names, pool[0][1]), pool[0][0], history)


def _policy(names: list[str], ratios: Tensor) -> Policy:
    return Policy(dict(zip(names, ratios.tolist(), strict=True)))


def _child(parents: list[Tensor], weights: Tensor, evolution: Evolution, draw: torch.Generator) -> Tensor:
    """Every ratio from one of two parents, then mutated."""
    first, second = (parents[int(torch.randint(len(parents), (1,), generator=draw))] for _ in range(2))
    from_first = torch.rand(len(first), generator=draw) < 0.5
    return _mutated(torch.where(from_first, first, second), weights, evolution, draw)


def _mutated(ratios: Tensor, weights: Tensor, evolution: Evolution, draw: torch.Generator) -> Tensor:
    noise = evolution.mutation * torch.randn(len(ratios), generator=draw)
    changes = torch.rand(len(ratios), generator=draw) < evolution.mutated
    return at_share(torch.where(changes, ratios + noise, ratios), weights, evolution.share, evolution.bounds)


def at_share(ratios: Tensor, weights: Tensor, share: float, bounds: tuple[float, float]) -> Tensor:
    """The ratios shifted together, and cut at ``bounds``, so that their mean by ``weights`` is ``share``.

    By bisection: the mean rises with the shift.
    """
    ratios = ratios.double()
    low, high = bounds[0] - float(ratios.max()) - 1, bounds[1] - float(ratios.min()) + 1
    for _ in range(60):
        middle = (low + high) / 2
        mean = float(((ratios + middle).clamp(*bounds) * weights).sum())
        low, high = (middle, high) if mean < share else (low, middle)
    return (ratios + (low + high) / 2).clamp(*bounds).float()
