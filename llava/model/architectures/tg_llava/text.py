"""The question in CLIP's text model: its rows, and the pooled one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from accelerate_methods.engine.devices import computes_on
from accelerate_methods.stages.errors import MethodError
from llava.model.architectures.text_towers import TextTokens, build_text_model, fill_text_model

#: no text token is read where it stands, in the official code; here it pads, too
UNREAD = 0


class TextTower(nn.Module):
    """CLIP's text model under its official name.

    Args:
        config: of the whole model (reads ``mm_text_tower``); delay_load: build nothing yet, :meth:`load_model` will;
            checkpoint: folder whose ``vision_tower`` is preferred.
    """

    def __init__(self, config: Any, delay_load: bool, checkpoint: str | None, who: str):
        super().__init__()
        self.name = getattr(config, "mm_text_tower", None) or config.mm_vision_tower
        self.checkpoint, self.who = checkpoint, who
        self.is_loaded = False
        self.tokens: TextTokens | None = None
        if not delay_load:
            self.build()

    def build(self) -> None:
        self.text_tower = build_text_model("clip", self.name, self.checkpoint)
        limit = self.text_tower.config.max_position_embeddings
        self.tokens = TextTokens(self.name, self.checkpoint, limit, (self.who, "text_guide_ids=<ids of the question>"))
        self.is_loaded = True

    def load_model(self) -> None:
        """From the tower's own files, where the checkpoint does not hold it."""
        if self.is_loaded:
            return
        with torch.device("cpu"):
            self.build()
        fill_text_model(self.text_tower, self.name, self.checkpoint)
        self.text_tower.eval()

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L] ids -> pooled [B, T] and rows [B, L, T]. What has the id 0 is not read."""
        ids = ids.to(computes_on(self.text_tower))
        out = self.text_tower(input_ids=ids, attention_mask=ids.ne(UNREAD))
        return out.pooler_output, out.last_hidden_state

    def ids_of(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """[B, L] ids of questions, cut where CLIP's positions end, and [B, L] False at padding, None without any."""
        rows = self.tokens.one_by_one(texts)
        lengths = torch.tensor([len(row) for row in rows])
        real = torch.arange(int(lengths.max())) < lengths[:, None]
        return pad_sequence(rows, batch_first=True, padding_value=UNREAD), None if real.all() else real


def given_ids(ids: Any, limit: int) -> Tensor:
    """[B, L] what a caller gave as ``text_guide_ids``, [L] or [B, L].

    Raises:
        MethodError: another form, or more than CLIP has positions.
    """
    ids = torch.as_tensor(ids)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.is_floating_point() or not 0 < ids.shape[1] <= limit:
        raise MethodError(f"text_guide_ids must be ids [L] or [B, L] of at most {limit} tokens, got {list(ids.shape)}.")
    return ids
