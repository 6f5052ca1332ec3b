"""A pruning policy: the share of zeros of every matrix, by its name in the checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from accelerate_methods.hosts.checkpoint_files import CheckpointError, read_json
from accelerate_methods.stages.errors import MethodError, UnknownNameError


@dataclasses.dataclass(frozen=True)
class Policy:
    """
    Attributes:
        ratios: name of a matrix ("model.layers.0.mlp.up_proj") -> share of its weights that become zero, in [0, 1).

    Raises:
        MethodError: a share outside of [0, 1).
    """

    ratios: Mapping[str, float]

    def __post_init__(self) -> None:
        for name, ratio in self.ratios.items():
            if not 0 <= ratio < 1:
                raise MethodError(f"pruning policy: the share of {name} must be in [0, 1), got {ratio!r}.")

    @classmethod
    def uniform(cls, sizes: Mapping[str, int], ratio: float) -> Policy:
        """The same share for all of ``sizes`` (:func:`sizes_of`)."""
        return cls(dict.fromkeys(sizes, ratio))

    @classmethod
    def read(cls, path: str | Path, sizes: Mapping[str, int]) -> Policy:
        """From a JSON file {name: share}, or one that :meth:`write` made; matrices that it leaves out are not pruned.

        Raises:
            CheckpointError: no such file; UnknownNameError: a matrix that the model does not have.
        """
        content = read_json(Path(path))
        content = content.get("ratios", content) if isinstance(content, dict) else content
        if not isinstance(content, dict):
            raise CheckpointError(f"{str(path)!r} holds no policy: names of matrices with a share each are expected.")
        for name in content:
            if name not in sizes:
                raise UnknownNameError("matrix of a pruning policy", name, sizes)
        return cls({name: float(content.get(name, 0.0)) for name in sizes})

    def write(self, path: str | Path, **said: Any) -> None:
        """As JSON, with what else is ``said`` of it."""
        content = {**said, "ratios": {name: round(ratio, 6) for name, ratio in self.ratios.items()}}
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def share(self, sizes: Mapping[str, int]) -> float:
        """Of all weights of these matrices that become zero."""
        total = sum(sizes[name] for name in self.ratios)
        return sum(ratio * sizes[name] for name, ratio in self.ratios.items()) / total


def matrices_of(model: Any) -> dict[str, nn.Linear]:
    """The matrices that are pruned, by their names in the checkpoint: those inside the decoder's layers.

    Embeddings, norms, biases, head, vision tower and projector stay what they are.

    Raises:
        MethodError: layers without plain matrices (quantised weights, experts that are kept in one tensor).
    """
    found = {
        f"model.layers.{name}": part
        for name, part in model.get_model().layers.named_modules()
        if type(part) is nn.Linear and part.weight.is_floating_point()
    }
    if not found or any(part.weight.is_meta for part in found.values()):
        raise MethodError(
            f"{type(model).__name__}: the decoder's layers hold no matrices that can be pruned (quantised or offloaded "
            "weights); load it in float16, bfloat16 or float32 on one device."
        )
    experts = [name for name, part in model.get_model().layers.named_parameters() if part.ndim == 3]
    if experts:
        raise MethodError(f"{type(model).__name__}: weights of experts ({experts[0]}) are not pruned.")
    return found


def sizes_of(model: Any) -> dict[str, int]:
    """Weights of each matrix of :func:`matrices_of`."""
    return {name: part.weight.numel() for name, part in matrices_of(model).items()}


def zeros_of(model: Any) -> dict[str, float]:
    """Share of zeros that each matrix has."""
    return {name: float((part.weight == 0).float().mean()) for name, part in matrices_of(model).items()}
