"""A Q-Former: BERT whose learnt queries read an image, with a text beside them or alone (BLIP-2, arXiv 2301.12597).

Queries and text attend to each other; in every second layer the queries then read the image. Each of the two has a
feed-forward of its own. Follows the Q-Former of `salesforce/LAVIS@main`, `lavis/models/blip2_models/Qformer.py`, as the
models that carry a copy of it use it, with the parameter names of their checkpoints. Attention runs in SDPA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Embeddings(nn.Module):
    """Words with absolute positions, and one norm for queries and words.

    Args:
        config: a ``BertConfig``; words: rows of the word table, None for a Q-Former that is given no text.
    """

    def __init__(self, config: Any, words: int | None):
        super().__init__()
        if words is not None:
            self.word_embeddings = nn.Embedding(words, config.hidden_size, padding_idx=config.pad_token_id)
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def text(self, ids: Tensor) -> Tensor:
        """[B, T] ids -> [B, T, H], before the norm."""
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.word_embeddings(ids) + self.position_embeddings(places)


class Residual(nn.Module):
    """LayerNorm(dense(x) + residual): how every part of a BERT layer ends."""

    def __init__(self, width: int, config: Any):
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(states) + residual)


class Heads(nn.Module):
    """Multi-head attention without its output projection; keys and values of width ``source``."""

    def __init__(self, source: int, config: Any):
        super().__init__()
        self.heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(source, config.hidden_size)
        self.value = nn.Linear(source, config.hidden_size)

    def forward(self, states: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(states), self.key(source), self.value(source))
        )
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return out.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """[B, R, H] rows that read a source [B, S, width]."""

    def __init__(self, source: int, config: Any):
        super().__init__()
        self.self = Heads(source, config)
        self.output = Residual(config.hidden_size, config)

    def forward(self, states: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.output(self.self(states, source, mask), states)


class Intermediate(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, states: Tensor) -> Tensor:
        return functional.gelu(self.dense(states))


class Layer(nn.Module):
    """One layer; ``reads``: whether its queries attend to the image; ``text``: whether there is a text beside them."""

    def __init__(self, config: Any, image_width: int, reads: bool, text: bool):
        super().__init__()
        self.attention = Attention(config.hidden_size, config)
        self.crossattention = Attention(image_width, config) if reads else None
        if text:
            self.intermediate = Intermediate(config)
            self.output = Residual(config.intermediate_size, config)
        self.intermediate_query = Intermediate(config)
        self.output_query = Residual(config.intermediate_size, config)

    def forward(self, states: Tensor, queries: int, image: Tensor, mask: Tensor | None, last: bool) -> Tensor:
        """[B, queries + T, H] -> the same; after the ``last`` layer nobody reads the text, and it is left out."""
        asking = states[:, :queries] if last else states
        states = self.attention(asking, states, mask)
        own, text = states[:, :queries], states[:, queries:]
        if self.crossattention is not None:
            own = self.crossattention(own, image)
        own = self.output_query(self.intermediate_query(own), own)
        if not text.shape[1]:
            return own
        return torch.cat([own, self.output(self.intermediate(text), text)], dim=1)


class Encoder(nn.Module):
    def __init__(self, config: Any, image_width: int, text: bool, every: int):
        super().__init__()
        self.layer = nn.ModuleList(
            Layer(config, image_width, index % every == 0, text) for index in range(config.num_hidden_layers)
        )


class QFormer(nn.Module):
    """The whole.

    Args:
        config: a ``BertConfig``: width, layers, heads, feed-forward and the epsilon of the norms.
        image_width: C of the image's features.
        words: rows of the word table; None for a Q-Former of queries alone.
        every: each so many layers the queries read the image, beginning with the first.
    """

    def __init__(self, config: Any, image_width: int, words: int | None, every: int = 2):
        super().__init__()
        self.embeddings = Embeddings(config, words)
        self.encoder = Encoder(config, image_width, words is not None, every)

    def macs(self, queries: int, text: int, patches: int) -> int:
        """Multiply-accumulates for one image of ``patches`` rows, read with ``text`` rows beside the queries."""
        total = 0
        for number, layer in enumerate(self.encoder.layer, 1):
            last = number == len(self.encoder.layer)
            rows, asking = queries + text, queries if last else queries + text
            width, inner = layer.attention.output.dense.in_features, layer.intermediate_query.dense.out_features
            total += 2 * width * (asking * width + rows * width + asking * rows) + 2 * asking * width * inner
            if layer.crossattention is not None:
                source = layer.crossattention.self.key.in_features
                total += 2 * width * (queries * width + patches * source + queries * patches)
        return total

    def forward(self, queries: Tensor, image: Tensor, ids: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        """Queries after they have read image and text.

        Args:
            queries: [Q, H]; image: [B, S, C], all of which is read.
            ids: [B or 1, T] of the text, with BERT's special tokens; real: [B or 1, T] False at its padding.

        Returns:
            [B, Q, H].
        """
        batch, count = image.shape[0], queries.shape[0]
        states, mask = queries.expand(batch, -1, -1), None
        if ids is not None:
            states = torch.cat([states, self.embeddings.text(ids).expand(batch, -1, -1)], dim=1)
        if real is not None:
            mask = functional.pad(real.bool(), (count, 0), value=True)[:, None, None]
        states = self.embeddings.LayerNorm(states)
        for number, layer in enumerate(self.encoder.layer, 1):
            states = layer(states, count, image, mask, number == len(self.encoder.layer))
        return states
