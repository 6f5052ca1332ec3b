"""How the loop reads a decoder: its layers, their projections, rotary tables and the final norm.

The one place that knows under which names transformers keeps these. Covered: Llama, Mistral, Qwen2, Qwen3 and what is
built like them; Phi (``final_layernorm``, query and key norms of its own name, attention and MLP in parallel); Phi-3
(queries, keys and values from one ``qkv_proj``); heads of which only the first dimensions are rotated. A decoder that
is built otherwise gets its lines here, and nothing else in the engine changes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from accelerate_methods.engine.cached_keys import gather_rows
from accelerate_methods.engine.devices import hooked_device, moved
from accelerate_methods.stages.errors import MethodError


@dataclasses.dataclass
class LayerInput:
    """What one layer got, kept for a method that will ask for its attention.

    Attributes:
        hidden: [B, L, D] the rows that entered it; rope: their rotary tables (cos, sin), [B, L, d] each.
        keys: [B, G, S, d] what its cache holds now (rotated, the rows' own keys at the end), or None: then the keys of
            the rows are computed again.
    """

    hidden: Tensor
    rope: tuple[Tensor, Tensor]
    keys: Tensor | None = None


class DecoderLayers:
    """The layers of one decoder of transformers (``LlamaModel``, ``Qwen2Model``, ``PhiModel`` ...)."""

    def __init__(self, decoder: Any):
        self.config = decoder.config
        self.num_heads: int = self.config.num_attention_heads
        self._decoder = decoder
        self._layers = decoder.layers[: self.config.num_hidden_layers]

    def __len__(self) -> int:
        return len(self._layers)

    # -- running -----------------------------------------------------------------------------------------------------

    def run(self, index: int, hidden: Tensor, rope: tuple[Tensor, Tensor], mask: Any, **cache: Any) -> Tensor:
        """[B, L, D] through layer ``index``; ``cache``: ``past_key_values`` and ``use_cache``.

        Position ids are not handed on: with gaps in them, flash-attention would take one sequence for several packed
        ones. The rotary tables hold all that they say.
        """
        out = self._layers[index](
            hidden, attention_mask=mask, position_embeddings=rope, position_ids=None, **cache
        )
        return out[0] if isinstance(out, tuple) else out

    def attend(self, index: int, hidden: Tensor, rope: tuple[Tensor, Tensor], mask: Any, **cache: Any) -> Tensor:
        """[B, L, D] through the first half of layer ``index``: the residual stream with its attention added."""
        layer = self._layers[index]
        out = layer.self_attn(
            layer.input_layernorm(hidden), attention_mask=mask, position_embeddings=rope, position_ids=None, **cache
        )
        return hidden + (out[0] if isinstance(out, tuple) else out)

    def feed(self, index: int, hidden: Tensor) -> Tensor:
        """[B, L, D] through the other half of layer ``index``, its MLP."""
        layer = self._layers[index]
        out = layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden + (out[0] if isinstance(out, tuple) else out)

    def check_halves(self) -> None:
        """MethodError if a layer is not attention followed by an MLP, each with a norm in front and added."""
        layer = self._layers[0]
        halves = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
        more = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
        if not all(hasattr(layer, name) for name in halves) or any(hasattr(layer, name) for name in more):
            raise MethodError(
                f"{type(layer).__name__} has no point between attention and MLP at which a method could act."
            )

    def norm(self, hidden: Tensor) -> Tensor:
        """The norm behind the last layer."""
        return self.final_norm(hidden)

    @property
    def final_norm(self) -> Any:
        """The module that does it; AttributeError if the decoder has none under a known name."""
        return self._decoder.final_layernorm if hasattr(self._decoder, "final_layernorm") else self._decoder.norm

    def rotary(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary tables for positions [B, L] or [R, B, L], beside ``hidden`` (the module may compute elsewhere)."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        if positions.ndim == 2 and "mrope_section" in rope:  # text of a model with several ids per token
            positions = positions.expand(3, *positions.shape)
        return moved(self._decoder.rotary_emb(hidden, positions), hidden.device)

    def device(self, index: int) -> torch.device | None:
        """The device to which a device map binds layer ``index``; None without one."""
        return hooked_device(self._layers[index])

    def kind(self, index: int) -> str:
        """Which keys layer ``index`` sees: "full_attention" or "sliding_attention"."""
        types = getattr(self.config, "layer_types", None)
        if types is not None:
            return types[index]
        return "sliding_attention" if getattr(self.config, "sliding_window", None) else "full_attention"

    # -- attention for chosen rows -----------------------------------------------------------------------------------

    def check_attention(self) -> None:
        """AttributeError if :meth:`attention` would not find what it reads."""
        layer = self._layers[0]
        layer.input_layernorm  # noqa: B018
        for name in ("head_dim", "scaling"):
            getattr(layer.self_attn, name)
        if not hasattr(layer.self_attn, "qkv_proj"):
            for name in ("q_proj", "k_proj"):
                getattr(layer.self_attn, name)

    def attention(
        self, index: int, given: LayerInput, rows: Tensor, valid: Tensor | None, *, rotary: bool, causal: bool
    ) -> Tensor:
        """Attention probabilities [B, H, R, S] of layer ``index`` for the query rows, in the dtype of the model.

        Args:
            given: the layer's input.
            rows: [R], or [B, R] of each sample.
            valid: [B, S] False at keys that nobody sees, or None.
            rotary: False for scores free of positions; causal: False lets every row see every key.
        """
        hidden, (cos, sin) = given.hidden, given.rope
        keys = given.keys if rotary else None  # rotated keys, complete also in decode steps
        asked_on = rows.device  # scores are computed where the layer is and handed out where they were asked for
        rows, valid = moved((rows, valid), hidden.device)
        layer = self._layers[index]
        if keys is None:  # all rows are needed only where the keys have to be computed again
            states = layer.input_layernorm(hidden)
            asking = _rows_of(states, rows)
            keys = self._projected(layer.self_attn, states, "k")
            keys = rotated(keys, cos, sin) if rotary else keys
        else:
            asking = layer.input_layernorm(_rows_of(hidden, rows))
        query = self._projected(layer.self_attn, asking, "q")
        if rotary:
            query = rotated(query, _rows_of(cos, rows), _rows_of(sin, rows))
        grouped = query.unflatten(1, (keys.shape[1], -1))  # query heads that share a key head
        scores = torch.einsum("bgrqd,bgkd->bgrqk", grouped, keys).flatten(1, 2) * layer.self_attn.scaling
        lowest, length = torch.finfo(scores.dtype).min, keys.shape[2]
        if causal:
            offset = length - hidden.shape[1]
            future = torch.arange(length, device=rows.device) > (rows + offset)[..., None]  # [R, S] or [B, R, S]
            scores = scores.masked_fill(future if rows.ndim == 1 else future[:, None], lowest)
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None, None, :], lowest)
        return moved(scores.softmax(dim=-1, dtype=torch.float32).to(hidden.dtype), asked_on)

    def keys(self, index: int, given: LayerInput, *, rotary: bool) -> Tensor:
        """[B, G, S, d] key states of layer ``index``: those that it has cached, or computed again."""
        if rotary and given.keys is not None:
            return given.keys
        layer = self._layers[index]
        keys = self._projected(layer.self_attn, layer.input_layernorm(given.hidden), "k")
        return rotated(keys, *given.rope) if rotary else keys

    def _projected(self, attention: Any, states: Tensor, which: str) -> Tensor:
        """[B, L, D] normed states -> queries ("q") or keys ("k") [B, heads, L, d], normed where the model does it."""
        dim = attention.head_dim
        if hasattr(attention, "qkv_proj"):
            queries = self.num_heads * dim
            part = slice(queries) if which == "q" else slice(queries, queries + attention.num_key_value_heads * dim)
            out = attention.qkv_proj(states)[..., part]
        else:
            out = getattr(attention, f"{which}_proj")(states)
        out = out.unflatten(-1, (-1, dim))
        norm = getattr(attention, f"{which}_norm", None)  # Qwen3
        out = (out if norm is None else norm(out)).transpose(1, 2)
        norm = getattr(attention, f"{which}_layernorm", None)  # Phi
        return out if norm is None else norm(out)


def _rows_of(states: Tensor, rows: Tensor) -> Tensor:
    """Rows [R], or [B, R] of each sample, of states [B or 1, L, D]."""
    if rows.ndim == 1:
        return states[:, rows]
    return gather_rows(states.expand(len(rows), -1, -1), rows)


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split convention that Llama-like models share.

    Args:
        states: [B, H, L, d]; cos, sin: [B, L, r] with r <= d: only the first r dimensions of a head are rotated.
    """
    width = cos.shape[-1]
    head, rest = states[..., :width], states[..., width:]
    first, second = head.chunk(2, dim=-1)
    head = head * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    return head if not rest.shape[-1] else torch.cat([head, rest], dim=-1)
