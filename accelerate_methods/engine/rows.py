"""The rows of a prompt that the layers have in common: cut together, moved together."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from accelerate_methods.engine.cache_state import LayerCache
from accelerate_methods.engine.cached_keys import gather_rows
from accelerate_methods.engine.devices import moved
from accelerate_methods.engine.layers import DecoderLayers
from accelerate_methods.stages.prefill import Selection


@dataclasses.dataclass
class Rows:
    """What goes from layer to layer.

    Attributes:
        hidden: [B, q, D]; position_ids: [B, q] or [R, B, q]; rope: their rotary tables (cos, sin).
        mask: [B, cached + q] padding of the call, or None; valid: [B, q] its part for these rows.
        masks: which rows are visual to each prefill method, ("visual", its number), or ("block", its number) with
            newlines; and to the decode method, "decode". [B, q] each.
        added: [B, q, D] each, what is added to the outputs of the first layers.
        kept: [B, q] row of the prompt that each row was, None as long as nothing has been dropped.
        shift: [B, 1] how far positions lie behind those of the prompt, or None.
        cuts: how often they were cut.
    """

    hidden: Tensor
    position_ids: Tensor
    rope: tuple[Tensor, Tensor]
    mask: Tensor | None
    valid: Tensor | None
    masks: dict[Any, Tensor]
    added: list[Tensor]
    kept: Tensor | None = None
    shift: Tensor | None = None
    cuts: int = 0

    @property
    def count(self) -> int:
        """Rows of a sample, padding included."""
        return self.hidden.shape[1]

    def lengths(self) -> list[int] | Tensor:
        """Real rows of each sample."""
        return [self.count] * len(self.hidden) if self.valid is None else self.valid.sum(1)

    def cached(self) -> LayerCache:
        """What a layer that has just run keeps of the rows."""
        return LayerCache(self.masks["decode"], self.valid, self.kept, self.shift)

    def move(self, device: torch.device) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, moved(getattr(self, field.name), device))

    def cut(self, selection: Selection, layers: DecoderLayers) -> None:
        """Go on with the selected rows only."""
        self.cuts += 1
        picked = selection.indices
        source = self.hidden if selection.hidden_states is None else selection.hidden_states
        self.hidden = gather_rows(source, picked)
        self.masks = {name: mask.gather(1, picked) for name, mask in self.masks.items()}
        self.kept = picked if self.kept is None else self.kept.gather(1, picked)
        if self.valid is not None or selection.valid is not None:
            valid = torch.ones_like(picked, dtype=torch.bool) if self.valid is None else self.valid.gather(1, picked)
            self.valid = valid if selection.valid is None else valid & selection.valid
            # padding slots hold whatever was dropped
            self.masks = {name: mask & self.valid for name, mask in self.masks.items()}
        self.added = [gather_rows(part, picked) for part in self.added]
        if selection.positions == "compact" and self.position_ids.ndim == 2:  # several per token are coordinates
            self._renumber(layers)
        else:
            every = (*self.position_ids.shape[:-2], *picked.shape)
            self.position_ids = self.position_ids.gather(-1, picked.expand(every))
            self.rope = tuple(gather_rows(part.expand(picked.shape[0], -1, -1), picked) for part in self.rope)

    def _renumber(self, layers: DecoderLayers) -> None:
        """Positions 0, 1, ... for the rows that are left."""
        batch, count = self.hidden.shape[:2]
        start = 0 if self.valid is None else (count - self.valid.sum(1, keepdim=True))
        compact = (torch.arange(count, device=self.hidden.device)[None] - start).clamp(min=0)
        behind = self.position_ids.amax(1, keepdim=True) - compact.amax(1, keepdim=True)
        self.shift = behind if self.shift is None else self.shift + behind
        self.position_ids = compact.expand(batch, -1)
        self.rope = layers.rotary(self.hidden, self.position_ids)
