"""Guidance of TG-LLaVA: one vector for each patch of the image, made of the question by a Q-Former."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig

from llava.model.architectures.qformer import QFormer

#: of BERT-large, whose configuration the official code takes from the hub; the depth is its own
_BERT = {"num_attention_heads": 16, "layer_norm_eps": 1e-12, "num_hidden_layers": 2}
#: width of the feed-forward, in widths of the model
_INNER = 4


class _Bert(nn.Module):
    """The place of the Q-Former inside a language model, whose head no checkpoint of it uses."""

    def __init__(self, config: BertConfig, width: int):
        super().__init__()
        self.bert = QFormer(config, width, words=None)


class TextGuide(nn.Module):
    """Learnt queries, one for each patch, which read the question's pooled vector; under the official names.

    Args:
        width: C of the patches; text: of the question's vector; queries: P; overrides: of the ``BertConfig``.
    """

    def __init__(self, width: int, text: int, queries: int, overrides: dict[str, Any] | None = None):
        super().__init__()
        keys = {"hidden_size": width, "intermediate_size": _INNER * width, **_BERT, **(overrides or {})}
        self.resize_linear = nn.Linear(text, width)
        self.zero_layer = nn.Linear(width, width)
        self.query_tokens = nn.Parameter(torch.zeros(1, queries, width))
        self.Qformer = _Bert(BertConfig(**keys), width)

    def forward(self, pooled: Tensor) -> Tensor:
        """[B, T] pooled vectors -> [B, P, C]."""
        question = self.resize_linear(pooled)[:, None]
        return self.zero_layer(self.Qformer.bert(self.query_tokens[0], question))
