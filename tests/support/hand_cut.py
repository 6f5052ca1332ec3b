"""What a compressed prompt of a transformers model must give, worked out from the uncompressed model alone.

Nothing of the hosts or of the decoder loop is used: the inputs of the language model are caught while the model runs
as it is, cut by hand, and given to that language model again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from accelerate_methods.stages.compress import VisualItem
from accelerate_methods.stages.method import Method


@dataclasses.dataclass
class Dense:
    """What the language model gets: embeds [B, L, D], positions [R, B, L], mask [B, L], added [B, L, D] each."""

    embeds: Tensor
    positions: Tensor
    mask: Tensor
    added: list[Tensor]


@dataclasses.dataclass
class Cut:
    """One sample after compression: embeds [K, D], positions [R, K], source [K] rows of the prompt.

    ``following`` is the position of the first generated token: as transformers' ``generate`` has it, one more than that
    of the last prompt token.
    """

    embeds: Tensor
    positions: Tensor
    source: Tensor
    added: list[Tensor]
    following: int

    def at(self, row: int) -> int:
        return self.source.tolist().index(row)


@torch.no_grad()
def dense_inputs(model: Any, inputs: dict[str, Any]) -> Dense:
    """Run the model as it is and catch what its language model is called with."""
    caught: dict[str, Any] = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: caught.update(kwargs), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    embeds, mask, positions = caught["inputs_embeds"], caught["attention_mask"], caught["position_ids"]
    mask = torch.ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    if positions is None:
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    if positions.ndim == 2:
        positions = positions[None]
    added = []
    for features in caught.get("deepstack_visual_embeds") or []:
        rows = torch.zeros_like(embeds)
        rows[caught["visual_pos_masks"]] = features
        added.append(rows)
    return Dense(embeds, positions[-3:].expand(-1, *embeds.shape[:2]), mask, added)


def cut(dense: Dense, sample: int, items: list[tuple[Tensor, VisualItem]], method: Method | None) -> Cut:
    """Put what ``method`` makes of ``items``, which stand at those rows of the prompt, in their place."""
    visual = {row for rows, _ in items for row in rows.tolist()}
    text = [r for r in dense.mask[sample].nonzero().flatten().tolist() if r not in visual]
    pieces = [(row, row, dense.embeds[sample, row]) for row in text]
    said = torch.zeros_like(dense.embeds[sample])
    said[text] = dense.embeds[sample, text]
    for rows, item in items:
        if method is not None and "prompt_rows" in method.signals:
            item.signals["prompt_rows"] = said
        if method is None or item.modality not in method.modalities:
            pieces += [(row, row, dense.embeds[sample, row]) for row in rows.tolist()]
            continue
        compressed = method.compress(item)
        if not compressed.frame_marks:
            marks = _around(rows.tolist())
            pieces = [piece for piece in pieces if piece[1] not in marks]
        stands = rows[compressed.positions].tolist()
        keys = stands if compressed.order == "layout" else sorted(stands)
        pieces += list(zip(keys, stands, compressed.tokens, strict=True))
    pieces.sort(key=lambda piece: piece[0])
    source = torch.tensor([row for _, row, _ in pieces])
    several = dense.positions.shape[0] > 1
    original = several or method is None or method.positions == "original"
    return Cut(
        embeds=torch.stack([token for _, _, token in pieces]),
        positions=dense.positions[:, sample, source] if original else torch.arange(len(source))[None],
        source=source,
        added=[part[sample, source] for part in dense.added],
        following=int(dense.positions[:, sample, -1].max()) + 1 if original else len(source),
    )


def _around(rows: list[int]) -> set[int]:
    """Rows in front of and behind every run of ``rows``, if there are several: each frame of Qwen3-VL has its marks."""
    starts = [row for row in rows if row - 1 not in rows]
    ends = [row for row in rows if row + 1 not in rows]
    return {row - 1 for row in starts} | {row + 1 for row in ends} if len(starts) > 1 else set()


@torch.no_grad()
def language_model(model: Any, cut: Cut, new: int, forced: list[int] | None = None) -> tuple[Tensor, list[int]]:
    """The uncompressed language model on the cut prompt: [new, V] logits of each step, and its ``new`` greedy ids.

    Args:
        forced: ids that are fed instead of the greedy ones.
    """
    language, cache = model.model.language_model, DynamicCache(config=model.model.language_model.config)
    more: dict[str, Any] = {}
    if cut.added:
        more = {
            "visual_pos_masks": torch.ones(1, len(cut.source), dtype=torch.bool),
            "deepstack_visual_embeds": cut.added,
        }
    embeds, positions = cut.embeds[None], cut.positions[:, None]
    logits, ids = [], []
    for step in range(new):
        where = positions[0] if positions.shape[0] == 1 else positions
        states = language(inputs_embeds=embeds, position_ids=where, past_key_values=cache, use_cache=True, **more)
        logits.append(model.lm_head(states.last_hidden_state[0, -1]))
        ids.append(_greedy(model, logits[-1]) if forced is None else forced[step])
        embeds, more = language.embed_tokens(torch.tensor([[ids[-1]]])), {}
        positions = torch.full((cut.positions.shape[0], 1, 1), cut.following + step)
    return torch.stack(logits), ids


@torch.no_grad()
def layer_by_layer(
    model: Any,
    cut: Cut,
    new: int,
    drops: dict[int, list[int]] | None = None,
    hidden: bool = False,
    forced: list[int] | None = None,
) -> tuple[Tensor, list[int], list[Tensor]]:
    """The same without a cache, layer after layer, ``drops`` (layer -> rows of the cut prompt) leaving before a layer.

    Args:
        hidden: generated tokens do not see the dropped rows in the layers before, either.
        forced: ids that are fed instead of the greedy ones.

    Returns:
        [new, V] logits, the greedy ids, and of the first step the attention [H, K, K] of every layer's full rows.
    """
    language, drops = model.model.language_model, drops or {}
    gone = {row for rows in drops.values() for row in rows}
    logits, ids, maps = [], [], []
    for step in range(new):
        embeds, positions, added = cut.embeds, cut.positions, cut.added
        if ids:
            after = language.embed_tokens(torch.tensor(ids))
            later = torch.arange(step)[None].expand(positions.shape[0], -1) + cut.following
            embeds, positions = torch.cat([embeds, after]), torch.cat([positions, later], dim=1)
            added = [torch.cat([part, torch.zeros_like(after)]) for part in added]
        states, left = embeds[None], torch.arange(len(embeds))
        for index, layer in enumerate(language.layers):
            left = left[[row not in drops.get(index, ()) for row in left.tolist()]]
            allowed = torch.ones(len(left), len(left)).tril().bool()
            if hidden:
                seen = torch.tensor([row not in gone for row in left.tolist()])
                allowed &= seen | (left < len(cut.embeds))[:, None]
                allowed |= torch.eye(len(left), dtype=torch.bool)
            where = positions[:, None, left]
            rope = language.rotary_emb(states, where[0] if len(where) == 1 else where)
            if not ids:
                maps.append(_attention(layer, states[:, left], rope, allowed))
            part = layer(states[:, left], attention_mask=allowed[None, None], position_embeddings=rope)
            part = part[0] if isinstance(part, tuple) else part
            if index < len(added):
                part = part + added[index][left]
            states = states.index_copy(1, left, part)
        logits.append(model.lm_head(language.norm(states[0, -1])))
        ids.append(_greedy(model, logits[-1]) if forced is None else forced[step])
    return torch.stack(logits), ids, maps


def _greedy(model: Any, logits: Tensor) -> int:
    """The most likely id that does not end the answer (``min_new_tokens``)."""
    return int(logits.index_fill(0, torch.tensor([model.generation_config.eos_token_id]), -torch.inf).argmax())


def _attention(layer: Any, states: Tensor, rope: tuple[Tensor, Tensor], allowed: Tensor) -> Tensor:
    """[H, K, K] probabilities, with the key heads repeated."""
    attention = layer.self_attn
    normed = layer.input_layernorm(states)[0]

    def heads(projection: Any, norm: str) -> Tensor:
        split = projection(normed).unflatten(-1, (-1, attention.head_dim))
        split = getattr(attention, norm)(split) if hasattr(attention, norm) else split
        first, second = split.chunk(2, dim=-1)
        cos, sin = (table[0][:, None] for table in rope)
        return (split * cos + torch.cat([-second, first], -1) * sin).transpose(0, 1)

    query, key = heads(attention.q_proj, "q_norm"), heads(attention.k_proj, "k_norm")
    key = key.repeat_interleave(len(query) // len(key), dim=0)
    scores = query @ key.transpose(1, 2) * attention.head_dim**-0.5
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1)
