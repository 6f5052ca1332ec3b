"""Qwen2 that reads a long video window by window and keeps of each window the keys and values of its summary tokens.

Summary tokens stand among the visual tokens as members of the causal sequence, with query, key and value projections of
their own. Behind a window only they stay in the cache, at consecutive positions. Since entries are only ever added
behind others, the position of an entry is final when it is cached: keys are rotated once, and what comes later is an
ordinary decoder on an ordinary, shorter cache. (`VectorSpaceLab/Video-XL@6e3dc89` caches keys before rotation and
rotates all of them in every step, to the same effect.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from accelerate_methods.engine.cache import RowsAlong
from accelerate_methods.engine.cached_keys import cached_length
from accelerate_methods.engine.devices import moved
from accelerate_methods.engine.output_rows import DecoderOutput
from accelerate_methods.engine.prompt import PromptLayout
from accelerate_methods.ops.select import on_device
from llava.model.architectures.video_xl.windows import Piece, Settings
from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenModel


class VideoXLConfig(LlavaQwenConfig):
    model_type = "video_xl"


@dataclasses.dataclass
class PiecedLayout(PromptLayout):
    """A layout that also says in which pieces each prompt of the batch is read; rows count from its first real one."""

    pieces: list[list[Piece]] = dataclasses.field(default_factory=list)


class SummaryAttention(Qwen2Attention):
    """Attention of Qwen2 in which the summary tokens of a window have projections of their own."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        self.own = Settings.of(config).projections
        for name in self.own:
            like = getattr(self, f"{name}_proj")
            self.add_module(f"beacon_{name}_proj", nn.Linear(like.in_features, like.out_features, bias=True))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        summaries: slice | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As in transformers; with ``summaries`` the rows are those of a window, of which these are cached.

        Args:
            hidden_states: [B, n, D]; position_embeddings: of n positions from the length of the cache on.
        """
        if summaries is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        query, key, value = (self._projected(name, hidden_states, summaries) for name in "qkv")
        cos, sin = position_embeddings
        own = key[:, :, summaries]
        kept, _ = apply_rotary_pos_emb(own, own, cos[:, : own.shape[2]], sin[:, : own.shape[2]])
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        before = past_key_values.get_seq_length(self.layer_idx)
        seen = past_key_values.update(kept, value[:, :, summaries], self.layer_idx)
        if before:
            key, value = (
                torch.cat([cached[:, :, :before], new], dim=2) for cached, new in zip(seen, (key, value), strict=True)
            )
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        out, weights = attend(
            self, query, key, value, attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling, sliding_window=self.sliding_window, **kwargs,
        )  # fmt: skip
        return self.o_proj(out.flatten(2)), weights

    def _projected(self, name: str, hidden: Tensor, summaries: slice) -> Tensor:
        """[B, n, D] -> [B, heads, n, d] queries, keys or values."""
        out = getattr(self, f"{name}_proj")(hidden)
        if name in self.own:
            out[:, summaries] = getattr(self, f"beacon_{name}_proj")(hidden[:, summaries])
        return out.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class SummaryCache(RowsAlong):
    """The cache of a batch: what the prompts have left, each padded on the left to the longest.

    Attributes:
        padding: [B] padded entries in front of each prompt, None where there are none.
        prompt: entries that the prompts have left.
    """

    padding: Tensor | None = None
    prompt: int = 0

    def mask(self, given: Tensor | None, new: int) -> Tensor | None:
        """[B, entries + new] 0 at padding, for ``new`` further rows; None if there is none.

        ``given``: the caller's mask, over the prompts as they were written or as they stand here, and what came since;
        None: no padding came since.
        """
        entries = self.get_seq_length()
        if given is None and self.padding is None:
            return None
        if given is not None and (given.ndim != 2 or (self.padding is None and given.shape[1] == entries + new)):
            return given
        prompt = min(self.prompt, entries)
        since = entries + new - prompt
        like = self.layers[0].keys if given is None else given
        rows = torch.arange(prompt, device=like.device).expand(like.shape[0], -1)
        front = torch.ones_like(rows)
        if self.padding is not None:
            front = (rows >= moved(self.padding, rows.device)[:, None]).long()
        return torch.cat([front, front.new_ones(len(front), since) if given is None else given[:, -since:]], dim=1)

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.padding = None if self.padding is None else change(self.padding)

    def reset(self) -> None:
        super().reset()
        self.padding, self.prompt = None, 0


@dataclasses.dataclass
class Read:
    """Prompts that the decoder has read.

    Attributes:
        cache: what they have left.
        states: of each prompt [R, D], the states of its text rows and of the last row of each image or video.
        rows: of each prompt which rows of it these are.
    """

    cache: SummaryCache
    states: list[Tensor]
    rows: list[list[int]]


class VideoXLModel(LlavaQwenModel):
    config_class = VideoXLConfig

    def __init__(self, config: VideoXLConfig):
        super().__init__(config)
        self.beacon_embed_tokens = nn.Embedding(1, config.hidden_size)
        for index, layer in enumerate(self.layers):
            layer.self_attn = SummaryAttention(config, index)

    def forward(self, *args: Any, layout: PiecedLayout | None = None, pipeline: Any = None, request: Any = None,
                **kwargs: Any):
        """The decoder. A prompt with images or videos is read in pieces, and rows of text come out (``kept``).

        ``pipeline`` acts on tokens before they come here.
        """
        cache = kwargs.get("past_key_values")
        if layout is not None and any(layout.spans) and not cached_length(cache):
            out = self._whole_prompts(layout, **kwargs)
            self._tell(request, out.past_key_values)
            return out
        if isinstance(cache, SummaryCache):
            tokens = next(v for v in (kwargs.get("inputs_embeds"), *args[:1], kwargs.get("input_ids")) if v is not None)
            mask = cache.mask(kwargs.get("attention_mask"), tokens.shape[1])
            kwargs["attention_mask"] = mask
            if kwargs.get("position_ids") is None and mask is not None:
                kwargs["position_ids"] = places_in(mask)[:, -tokens.shape[1] :]
        out = super().forward(*args, **kwargs)
        self._tell(request, cache)
        return out

    def _tell(self, request: Any, cache: Any) -> None:
        """What every layer has cached after a call."""
        if request is not None and isinstance(cache, SummaryCache):
            request.cached.append([cache.get_seq_length()] * self.config.num_hidden_layers)

    def _whole_prompts(
        self, layout: PiecedLayout, *, inputs_embeds: Tensor, past_key_values: Any = None,
        use_cache: bool | None = None, **others: Any,
    ) -> DecoderOutput:  # fmt: skip
        if past_key_values is not None:
            raise ValueError("Video-XL makes the cache of a prompt with images or videos itself; leave it out.")
        asked = [name for name in ("output_attentions", "output_hidden_states") if others.get(name)]
        if asked:
            raise ValueError(f"{asked[0]} is not possible where Video-XL reads a prompt in pieces.")
        read = self.read(inputs_embeds, layout)
        most, device = max(map(len, read.rows)), inputs_embeds.device
        fills = [most - len(rows) for rows in read.rows]
        padded = [inputs_embeds.shape[1] - length for length in layout.lengths]
        kept = [
            [0] * fill + [row + pad for row in rows] for rows, fill, pad in zip(read.rows, fills, padded, strict=True)
        ]
        states = [nn.functional.pad(own, (0, 0, fill, 0)) for own, fill in zip(read.states, fills, strict=True)]
        valid = None
        if any(fills):
            valid = torch.arange(most, device=device)[None] >= on_device(fills, device)[:, None]
        return DecoderOutput(
            last_hidden_state=torch.stack(states),
            past_key_values=read.cache if use_cache or (use_cache is None and self.config.use_cache) else None,
            kept=on_device(kept, device),
            kept_valid=valid,
        )

    def read(self, embeds: Tensor, layout: PiecedLayout, without_last: bool = False) -> Read:
        """Run the prompts of a batch, one after the other: a window of one prompt is work enough for a GPU, and their
        windows differ.

        Args:
            embeds: [B, L, D], padded on the left; without_last: leave out the last row of each prompt.
        """
        if self.training and self.gradient_checkpointing:
            raise ValueError("Video-XL reads a prompt on top of its cache: gradient checkpointing is not possible.")
        caches, states, rows = [], [], []
        for sample, length, pieces in zip(embeds, layout.lengths, layout.pieces, strict=True):
            own = sample[embeds.shape[1] - length :]
            if without_last:
                pieces = _without_last(pieces)
            cache, text = self._read(own[None], pieces)
            caches.append(cache)
            states.append(text)
            rows.append(_rows_out(pieces))
        return Read(_together(caches, self.config), states, rows)

    def _read(self, embeds: Tensor, pieces: Sequence[Piece]) -> tuple[DynamicCache, Tensor]:
        """One prompt [1, n, D]: its cache, and the states [R, D] of the rows of :func:`_rows_out`."""
        cache, out = DynamicCache(config=self.config), []
        summary = self.beacon_embed_tokens(torch.zeros(1, dtype=torch.long, device=embeds.device))
        for piece in pieces:
            rows = embeds[:, piece.start : piece.start + piece.rows]
            if piece.ratio is None:
                out.append(super().forward(inputs_embeds=rows, past_key_values=cache, use_cache=True)[0][0])
                continue
            mixed = _interleaved(rows, summary, piece)
            read = super().forward(inputs_embeds=mixed, past_key_values=cache, use_cache=True, summaries=piece.slots)
            if piece.closes:
                out.append(read[0][0, -1:])
        return cache, torch.cat(out) if out else embeds[0, :0]


def places_in(mask: Tensor) -> Tensor:
    """[B, n] places of rows among the real ones (``mask`` [B, n]): their positions; any at padding."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def _interleaved(rows: Tensor, summary: Tensor, piece: Piece) -> Tensor:
    """[1, w, D] visual tokens with the summary token's embedding [1, D] in the slots of the window: [1, w + b, D]."""
    if not piece.summaries:
        return rows
    at = torch.arange(piece.rows, device=rows.device)
    at = at + (at + piece.offset) // piece.ratio
    mixed = rows.new_empty(1, piece.rows + piece.summaries, rows.shape[2])
    mixed[:, piece.slots] = summary.to(rows)
    return mixed.index_copy(1, at, rows)


def _without_last(pieces: Sequence[Piece]) -> list[Piece]:
    """Without the last row of the prompt, which is text."""
    *others, last = pieces
    return [*others, dataclasses.replace(last, rows=last.rows - 1)] if last.rows > 1 else others


def _rows_out(pieces: Sequence[Piece]) -> list[int]:
    """Rows of a prompt whose states are wanted: text, and the last row of each image or video, behind which text goes
    on."""
    rows: list[int] = []
    for piece in pieces:
        end = piece.start + piece.rows
        rows += range(piece.start, end) if piece.ratio is None else [end - 1] * piece.closes
    return rows


def _together(caches: Sequence[DynamicCache], config: Any) -> SummaryCache:
    """The caches of prompts as the cache of a batch."""
    together = SummaryCache(config=config)
    lengths = [cache.get_seq_length() for cache in caches]
    fills = [max(lengths) - length for length in lengths]
    for index in range(config.num_hidden_layers if max(lengths) else 0):
        entries = []
        for name in ("keys", "values"):
            parts = [getattr(cache.layers[index], name) for cache in caches]
            if len(parts) > 1:
                parts = [nn.functional.pad(part, (0, 0, fill, 0)) for part, fill in zip(parts, fills, strict=True)]
            entries.append(torch.cat(parts) if len(parts) > 1 else parts[0])
        together.update(*entries, index)
        for cache in caches:  # its memory
            cache.layers[index].reset()
    together.prompt = max(lengths)
    if any(fills):
        together.padding = on_device(fills, together.layers[0].keys.device)
    return together
