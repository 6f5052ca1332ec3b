"""A model whose decoder is pruned by policies, one after the other, and its projector fitted in between."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from accelerate_methods.stages.errors import MethodError, UnknownNameError
from llava.model.pruning.masks import METHODS, check_pattern, pruned
from llava.model.pruning.policy import Policy, matrices_of
from llava.model.pruning.samples import Sample, mean_loss
from llava.model.pruning.statistics import inputs_of


@dataclasses.dataclass
class Pruner:
    """
    Attributes:
        model: a LLaVA; samples: of the calibration.
        method: "magnitude", "wanda" or "sparsegpt"; pattern: see :mod:`.masks`.
        gap_weight: of the norm in the fitness, which stands for how much worse unseen samples may be.
        projector_rate: learning rate of AdamW on the projector.

    Raises:
        UnknownNameError, MethodError: no such method or pattern.
    """

    model: Any
    samples: Sequence[Sample]
    method: str = "sparsegpt"
    pattern: str = "unstructured"
    gap_weight: float = 0.01
    projector_rate: float = 1e-4

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UnknownNameError("pruning method", self.method, METHODS)
        check_pattern(self.pattern, 0)
        self.matrices = matrices_of(self.model)
        #: the weights as they were, off the device
        self._dense = {name: part.weight.detach().to("cpu", copy=True) for name, part in self.matrices.items()}
        self._dense_norms = {name: float(weight.float().norm()) for name, weight in self._dense.items()}
        self._searched: dict[str, Tensor | None] | None = None
        self.model.eval()

    # -- pruning -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def restore(self) -> None:
        """The dense decoder again."""
        for name, part in self.matrices.items():
            part.weight.copy_(self._dense[name])

    @torch.no_grad()
    def try_policy(self, policy: Policy) -> None:
        """Prune every matrix by what it is multiplied with in the dense model: quick, for a search.

        "sparsegpt" is tried as "wanda": its reconstruction takes as long as the rest of a search.
        """
        method = "wanda" if self.method == "sparsegpt" else self.method
        if self._searched is None:
            self.restore()
            self._searched = inputs_of(self.model, self.matrices, self.samples, method)
        for name, part in self.matrices.items():
            weight = self._dense[name].to(part.weight.device)
            part.weight.copy_(pruned(weight, policy.ratios[name], method, self.pattern, self._searched[name]))

    @torch.no_grad()
    def prune(self, policy: Policy) -> None:
        """Prune for good, one decoder layer after the other: a layer's inputs are those behind pruned ones."""
        self.restore()
        layers = list(self.model.get_model().layers)
        for number in range(len(layers)):
            prefix = f"model.layers.{number}."
            own = {name: part for name, part in self.matrices.items() if name.startswith(prefix)}
            own = {name: part for name, part in own.items() if policy.ratios.get(name, 0) > 0}
            if not own:
                continue
            inputs = inputs_of(self.model, own, self.samples, self.method)
            for name, part in own.items():
                weight = pruned(part.weight, policy.ratios[name], self.method, self.pattern, inputs[name])
                part.weight.copy_(weight)

    # -- fitness -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def loss(self) -> float:
        """Mean loss of the samples' answers."""
        return float(mean_loss(self.model, self.samples))

    @torch.no_grad()
    def norm(self) -> float:
        """Mean over the matrices of what is left of their Frobenius norm."""
        shares = [
            float(part.weight.float().norm()) / max(self._dense_norms[name], 1e-12)
            for name, part in self.matrices.items()
        ]
        return sum(shares) / len(shares)

    def fitness(self, policy: Policy) -> float:
        """Loss under the policy plus ``gap_weight`` times :meth:`norm`; lower is better."""
        self.try_policy(policy)
        return self.loss() + self.gap_weight * self.norm()

    # -- projector ---------------------------------------------------------------------------------------------------

    def fit_projector(self, policy: Policy, steps: int) -> bool:
        """Fit the projector to the samples under a policy; everything else is frozen. Whether that helped: if not, it
        stays what it was.

        Raises:
            MethodError: the model has no projector with weights.
        """
        self.try_policy(policy)
        projector = self.model.get_model().mm_projector
        weights = list(projector.parameters())
        if not weights:
            raise MethodError(f"{type(self.model).__name__} has no projector that could be fitted.")
        saved, before = [weight.detach().clone() for weight in weights], self.loss()
        frozen = [part for part in self.model.parameters() if part.requires_grad]
        for part in frozen:
            part.requires_grad_(False)
        masters = [weight.detach().float().requires_grad_(True) for weight in weights]
        optimizer = torch.optim.AdamW(masters, lr=self.projector_rate, weight_decay=0.0)
        try:
            for weight in weights:
                weight.requires_grad_(True)
            for step in range(steps):
                for weight in weights:
                    weight.grad = None
                mean_loss(self.model, [self.samples[step % len(self.samples)]]).backward()
                for master, weight in zip(masters, weights, strict=True):
                    master.grad = None if weight.grad is None else weight.grad.float()
                optimizer.step()
                self._set(weights, masters)
        finally:
            for weight in weights:
                weight.grad = None
                weight.requires_grad_(False)
            for part in frozen:
                part.requires_grad_(True)
        if self.loss() < before:
            self._searched = None  # other visual tokens
            return True
        self._set(weights, saved)
        return False

    @staticmethod
    @torch.no_grad()
    def _set(weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value)
