"""The decoder loop: embed, layers, norm of any Llama-like transformers decoder, with prefill and decode stages.

Works for every decoder of the form ``embed_tokens, layers, norm, rotary_emb`` (Llama, Mistral, Qwen2, Qwen3). Compared
with the model's own forward it

* lets a prefill method cut the hidden states before chosen layers, so that layers have different lengths,
* lets a decode method hide cached keys from the layers above a chosen one,
* computes attention probabilities only for the rows and the layer that a method asks for; the model's attention
  backend (SDPA, flash-attention) is never changed,
* never hands position ids to the attention backend: with gaps in them, flash-attention would take one sequence for
  several packed ones.

What has to survive from prefill to decode (padding and visual masks of every layer's cache) is kept on the cache
object of the request.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from .errors import MethodError

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .recording import RequestRecord


@dataclasses.dataclass
class PromptLayout:
    """What the splice knows about a batch of prompts and the loop needs.

    Attributes:
        visual: [B, L] True at visual tokens.
        lengths: real tokens per sample, known on the host (no device read needed).
    """

    visual: Tensor
    lengths: list[int]

    def expanded(self, batch: int) -> PromptLayout:
        """Repeated for beams or several return sequences."""
        times = batch // self.visual.shape[0]
        if times == 1:
            return self
        return PromptLayout(
            visual=self.visual.repeat_interleave(times, dim=0),
            lengths=[n for n in self.lengths for _ in range(times)],
        )


@dataclasses.dataclass
class Selection:
    """Tokens that go on after a prefill stage.

    Attributes:
        indices: [B, K] ascending positions in the sequence that the layer got.
        valid: [B, K] False where a sample has fewer than K (padding stands on the left); None if all are real.
        hidden_states: [B, L, D] replacement states to gather from (for methods that merge), or None.
        trim_cache: also cut the KV cache of the layers already run.
        positions: "original" keeps position ids (gaps), "compact" re-numbers from 0.
    """

    indices: Tensor
    valid: Tensor | None = None
    hidden_states: Tensor | None = None
    trim_cache: bool = False
    positions: str = "original"

    @classmethod
    def from_mask(cls, keep: Tensor, **kwargs: Any) -> Selection:
        """From a boolean [B, L]; reads the counts from the device once."""
        counts = keep.sum(1)
        width = int(counts.max())
        # A stable sort of the mask moves the kept positions, in order, to the right end.
        order = torch.sort(keep.to(torch.int8), dim=1, stable=True).indices[:, keep.shape[1] - width :]
        valid = torch.arange(width, device=keep.device) >= (width - counts)[:, None]
        return cls(indices=order, valid=None if keep.shape[0] == 1 else valid, **kwargs)


class PrefillStep:
    """What a prefill method sees before decoder layer ``layer``.

    Attributes:
        layer: 0-based index of the layer about to run; num_layers: how many there are.
        hidden_states: [B, L, D] its input.
        visual: [B, L] True at visual tokens.
        valid: [B, L] False at padding, or None.
        position_ids: [B, L].
    """

    def __init__(self, loop: _Loop, layer: int):
        self._loop = loop
        self.layer = layer
        self.num_layers = len(loop.layers)
        self.hidden_states = loop.hidden
        self.visual = loop.visual
        self.valid = loop.valid
        self.position_ids = loop.position_ids

    def attention(self, rows: Tensor, *, rotary: bool = True, causal: bool = True) -> Tensor:
        """Attention probabilities [B, H, R, L] of layer ``layer - 1`` for the query positions ``rows`` [R] only.

        Softmax in float32, returned in the model dtype. ``rotary=False`` gives position-free scores, ``causal=False``
        lets every row see every key; padding is never seen.
        """
        if self.layer == 0:
            raise MethodError("there is no attention before layer 0; ask for a layer >= 1.")
        return self._loop.attention_rows(self.layer - 1, rows, self.valid, rotary=rotary, causal=causal)


class DecodeStep:
    """What a decode method sees in one step, before decoder layer ``layer``.

    Attributes:
        visual: [B, S] True at visual keys of that layer's cache (the token being decoded included, as False).
        valid: [B, S] False at padding, or None.
        memory: dict that lives as long as the request, for state between steps.
    """

    def __init__(self, loop: _Loop, layer: int, visual: Tensor, valid: Tensor | None, memory: dict[str, Any]):
        self._loop, self.layer = loop, layer
        self.visual, self.valid, self.memory = visual, valid, memory

    def attention(self) -> Tensor:
        """[B, H, S] probabilities of the current token over the cached keys of layer ``layer - 1``."""
        rows = torch.zeros(1, dtype=torch.long, device=self._loop.hidden.device)
        return self._loop.attention_rows(self.layer - 1, rows, self.valid, rotary=True, causal=False)[:, :, 0]


@dataclasses.dataclass
class _CacheState:
    """Per-request facts about each layer's cache: masks over the entries that prefill left there."""

    valid: list[Tensor | None]
    visual: list[Tensor]
    has_visual: bool
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)


class _KeyView:
    """Cache stand-in for one layer of one decode step: stores everything, shows the chosen keys."""

    def __init__(self, cache: DynamicCache, indices: Tensor):
        self._cache, self._indices = cache, indices

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._cache.update(keys, values, layer_idx, *args, **kwargs)
        index = self._indices[:, None, :, None]
        pick = [t.gather(2, index.expand(-1, t.shape[1], -1, t.shape[3])) for t in (keys, values)]
        return pick[0], pick[1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def needs_loop(pipeline: Pipeline | None) -> bool:
    """Whether the model's own forward cannot express what is attached (a compress stage leaves position gaps)."""
    return pipeline is not None and bool({"compress", "prefill", "decode"} & set(pipeline.stages))


def run_decoder(
    decoder: Any,
    pipeline: Pipeline,
    *,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: DynamicCache | None = None,
    use_cache: bool | None = None,
    layout: PromptLayout | None = None,
    request: RequestRecord | None = None,
) -> BaseModelOutputWithPast:
    """Run ``decoder`` on [B, q, D] embeddings under ``pipeline``.

    Args:
        decoder: a transformers decoder (``LlamaModel``, ``Qwen2Model``, ...).
        attention_mask: [B, cached + q] 2-D padding mask or None.
        position_ids: [B or 1, q] or None for consecutive ones.
        layout: where visual tokens stand; None (text only) bypasses the prefill and decode stages.
    """
    return _Loop(
        decoder, pipeline, inputs_embeds, attention_mask, position_ids, past_key_values, use_cache, layout, request
    ).run()


class _Loop:
    def __init__(self, decoder, pipeline, hidden, mask, position_ids, cache, use_cache, layout, request):
        self.decoder, self.pipeline, self.request = decoder, pipeline, request
        self.config = decoder.config
        self.layers = decoder.layers[: self.config.num_hidden_layers]
        use_cache = self.config.use_cache if use_cache is None else use_cache
        self.cache = DynamicCache(config=self.config) if use_cache and cache is None else cache
        self.use_cache = use_cache
        self.hidden = hidden
        batch, self.new = hidden.shape[:2]
        self.past = self.cache.get_seq_length() if self.cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(self.past, self.past + self.new, device=hidden.device)[None]
        self.position_ids = position_ids.expand(batch, -1)
        if mask is not None and mask.dim() != 2:
            raise MethodError(f"the decoder loop takes a 2-D padding mask, got {mask.dim()}-D.")
        self.mask = None if mask is None else mask.bool()
        self.valid = None if self.mask is None else self.mask[:, -self.new :]
        self.layout = layout.expanded(batch) if layout is not None else None
        self.visual = (
            self.layout.visual
            if self.layout is not None and self.past == 0
            else torch.zeros(batch, self.new, dtype=torch.bool, device=hidden.device)
        )
        self.rope = decoder.rotary_emb(hidden, self.position_ids)
        self.inputs: dict[int, Tensor] = {}
        self.input_ropes: dict[int, tuple[Tensor, Tensor]] = {}

    # -- running -----------------------------------------------------------------------------------------------------

    def run(self) -> BaseModelOutputWithPast:
        state: _CacheState | None = getattr(self.cache, "accelerate_state", None)
        prefilling = self.past == 0
        if prefilling:
            self._prefill()
        else:
            self._continue(state)
        return BaseModelOutputWithPast(
            last_hidden_state=self.decoder.norm(self.hidden), past_key_values=self.cache if self.use_cache else None
        )

    def _prefill(self) -> None:
        method = self.pipeline.prefill
        acts = self.layout is not None and method is not None and self.new > 1
        at = set(method.prefill_layers(len(self.layers))) if acts else set()
        lengths: list[int] | Tensor = self.layout.lengths if self.layout is not None else [self.new] * len(self.hidden)
        state = _CacheState(valid=[], visual=[], has_visual=self.layout is not None)
        masks: dict[str, Any] = {}
        for index, layer in enumerate(self.layers):
            if index in at:
                selection = method.prefill(PrefillStep(self, index))
                if selection is not None:
                    self._apply(selection, index, state)
                    masks.clear()
                    lengths = (
                        [self.new] * len(self.hidden)
                        if selection.valid is None and self.valid is None
                        else self.valid.sum(1)
                    )
            if index + 1 in at:
                self.inputs, self.input_ropes = {index: self.hidden}, {index: self.rope}
            kind = self._layer_type(index)
            if kind not in masks:
                masks[kind] = self._prefill_mask(kind)
            self.hidden = self._call(layer, masks[kind], self.cache)
            state.valid.append(self.valid)
            state.visual.append(self.visual)
            if self.request is not None:
                self.request.layer_tokens.append(lengths)
        if self.cache is not None:
            self.cache.accelerate_state = state

    def _apply(self, selection: Selection, index: int, state: _CacheState) -> None:
        picked = selection.indices
        source = self.hidden if selection.hidden_states is None else selection.hidden_states
        self.hidden = _gather(source, picked)
        self.visual = self.visual.gather(1, picked)
        if self.valid is not None or selection.valid is not None:
            valid = torch.ones_like(picked, dtype=torch.bool) if self.valid is None else self.valid.gather(1, picked)
            self.valid = valid if selection.valid is None else valid & selection.valid
        self.new = picked.shape[1]
        if selection.positions == "compact":
            start = 0 if self.valid is None else (self.new - self.valid.sum(1, keepdim=True))
            self.position_ids = (torch.arange(self.new, device=picked.device)[None] - start).clamp(min=0)
            self.position_ids = self.position_ids.expand(picked.shape[0], -1)
            self.rope = self.decoder.rotary_emb(self.hidden, self.position_ids)
        else:
            self.position_ids = self.position_ids.gather(1, picked)
            self.rope = tuple(_gather(part.expand(picked.shape[0], -1, -1), picked) for part in self.rope)
        if selection.trim_cache and self.cache is not None:
            for done in range(index):
                entry = self.cache.layers[done]
                entry.keys = _gather_keys(entry.keys, picked)
                entry.values = _gather_keys(entry.values, picked)
                state.valid[done], state.visual[done] = self.valid, self.visual

    def _continue(self, state: _CacheState | None) -> None:
        """Decode step(s), or a later turn of a chat, on top of a cache."""
        method = self.pipeline.decode
        start = len(self.layers)
        if method is not None and state is not None and self.new == 1:
            start = method.decode_layer(len(self.layers))
        shown: Tensor | None = None
        for index, layer in enumerate(self.layers):
            valid = self._grown(state.valid[index], index, True) if state is not None else self.mask
            if index == start and index > 0 and state.has_visual:
                visual = self._grown(state.visual[index], index, False)
                keep = method.decode(DecodeStep(self, index, visual, valid, state.memory))
                shown = None if keep is None else Selection.from_mask(keep)
            if index + 1 == start:
                self.inputs, self.input_ropes = {index: self.hidden}, {index: self.rope}
            cache, mask = self.cache, valid
            if shown is not None:
                cache, mask = _KeyView(self.cache, shown.indices), shown.valid
            self.hidden = self._call(layer, self._decode_mask(mask, index), cache)
        if state is not None and self.new > 1:  # a later turn: its tokens become part of what decode steps must see
            for index in range(len(self.layers)):
                state.valid[index] = self._grown(state.valid[index], index, True, after=True)
                state.visual[index] = self._grown(state.visual[index], index, False, after=True)

    def _call(self, layer: Any, mask: Any, cache: Any) -> Tensor:
        out = layer(
            self.hidden,
            attention_mask=mask,
            position_embeddings=self.rope,
            position_ids=None,
            past_key_values=cache,
            use_cache=self.use_cache,
        )
        return out[0] if isinstance(out, tuple) else out

    # -- masks -------------------------------------------------------------------------------------------------------

    def _layer_type(self, index: int) -> str:
        types = getattr(self.config, "layer_types", None)
        if types is not None:
            return types[index]
        return "sliding_attention" if getattr(self.config, "sliding_window", None) else "full_attention"

    def _prefill_mask(self, kind: str) -> Any:
        make = create_sliding_window_causal_mask if kind == "sliding_attention" else create_causal_mask
        return make(
            config=self.config,
            inputs_embeds=self.hidden,
            attention_mask=self.valid,
            past_key_values=None,
            position_ids=None,
        )

    def _grown(self, mask: Tensor | None, index: int, fill: bool, after: bool = False) -> Tensor | None:
        """A prefill mask of layer ``index`` extended by everything cached since and the tokens of this call."""
        if mask is None:
            return None
        total = self.cache.get_seq_length(index) + (0 if after else self.new)
        extra = mask.new_full((mask.shape[0], total - mask.shape[1]), fill)
        return torch.cat([mask, extra], dim=1)

    def _decode_mask(self, valid: Tensor | None, index: int) -> Any:
        """Mask for ``new`` queries at the end of ``valid`` [B, S] keys (None: no padding)."""
        if valid is None and self.new == 1:
            return None
        if "flash" in (self.config._attn_implementation or ""):
            return valid
        if valid is None:
            size = self.cache.get_seq_length(index) + self.new
            valid = torch.ones(self.hidden.shape[0], size, dtype=torch.bool, device=self.hidden.device)
        size = valid.shape[1]
        query = torch.arange(size - self.new, size, device=valid.device)
        allowed = valid[:, None, None, :] & (torch.arange(size, device=valid.device) <= query[:, None])
        # A query that is itself padding would see nothing and turn into NaN; let it see the first key.
        allowed = allowed | (~allowed.any(-1, keepdim=True) & (torch.arange(size, device=valid.device) == 0))
        if self.config._attn_implementation == "eager":
            lowest = torch.finfo(self.hidden.dtype).min
            return torch.zeros_like(allowed, dtype=self.hidden.dtype).masked_fill(~allowed, lowest)
        return allowed

    # -- attention for chosen rows ------------------------------------------------------------------------------------

    def attention_rows(
        self, index: int, rows: Tensor, valid: Tensor | None, *, rotary: bool, causal: bool
    ) -> Tensor:
        layer = self.layers[index]
        attention = layer.self_attn
        hidden, (cos, sin) = self.inputs[index], self.input_ropes[index]
        normed = layer.input_layernorm(hidden)
        heads = self.config.num_attention_heads
        dim = attention.head_dim
        query = attention.q_proj(normed[:, rows]).unflatten(-1, (heads, dim))
        query = getattr(attention, "q_norm", torch.nn.Identity())(query).transpose(1, 2)
        cached = self.cache.layers[index].keys if rotary and self.cache is not None else None
        if rotary:
            query = _rotate(query, cos[:, rows], sin[:, rows])
        if cached is not None:
            key = cached  # already rotated, and complete also in decode steps
        else:
            key = attention.k_proj(normed).unflatten(-1, (-1, dim))
            key = getattr(attention, "k_norm", torch.nn.Identity())(key).transpose(1, 2)
            if rotary:
                key = _rotate(key, cos, sin)
        groups = heads // key.shape[1]
        scores = torch.einsum(
            "bgrqd,bgkd->bgrqk", query.unflatten(1, (key.shape[1], groups)), key
        ).flatten(1, 2) * attention.scaling
        length = key.shape[2]
        if causal:
            offset = length - hidden.shape[1]
            future = torch.arange(length, device=rows.device) > (rows + offset)[:, None]
            scores = scores.masked_fill(future, torch.finfo(scores.dtype).min)
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None, None, :], torch.finfo(scores.dtype).min)
        return scores.softmax(dim=-1, dtype=torch.float32).to(hidden.dtype)


def _gather(states: Tensor, indices: Tensor) -> Tensor:
    return states.gather(1, indices[..., None].expand(-1, -1, states.shape[-1]))


def _gather_keys(states: Tensor, indices: Tensor) -> Tensor:
    return states.gather(2, indices[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split convention that Llama-like models share. states [B, H, L, d]."""
    first, second = states.chunk(2, dim=-1)
    return states * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
