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

A model larger than a GPU has its layers on several devices (accelerate's ``device_map``). Whatever goes along with the
hidden states (masks, positions, rotary tables, which rows are left) moves with them to the device of the layer that is
about to run, and what is remembered of a layer stays where its cache is. A prefill method still finds everything on the
device of the layer before, whose scores it reads; a decode method on that of the layer that gets the view.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from accelerate_methods.engine.devices import hooked_device, moved
from accelerate_methods.engine.prompt import PromptLayout
from accelerate_methods.stages.decode import DecodeStep
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.prefill import PrefillStep, Selection, VisualSpan

if TYPE_CHECKING:
    from accelerate_methods.engine.recording import RequestRecord
    from accelerate_methods.registry.pipeline import Pipeline


@dataclasses.dataclass
class _CacheState:
    """Per-request facts about each layer's cache, over the entries that prefill (and later turns) left there.

    Attributes:
        valid: per layer [B, S] False at padding, or None.
        visual: per layer [B, S] True at keys of items that the decode method acts on.
        rows: per layer [B, S] which row of the prompt each entry was, None where all are there.
        length: rows of the prompt.
        shift: per layer [B, 1], how far its positions lie behind those of the prompt ("compact" selections), or None.
        next_position: [B, 1] position of the next token.
        has_visual: whether there is anything for a decode method to act on.
    """

    has_visual: bool
    valid: list[Tensor | None] = dataclasses.field(default_factory=list)
    visual: list[Tensor] = dataclasses.field(default_factory=list)
    rows: list[Tensor | None] = dataclasses.field(default_factory=list)
    length: int = 0
    shift: list[Tensor | None] = dataclasses.field(default_factory=list)
    next_position: Tensor | None = None
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)

    def follow(self, cache: DynamicCache) -> None:
        """Have the memory of a decode method re-ordered whenever beam search re-orders the cache."""
        reorder = cache.reorder_cache

        def both(beams: Tensor) -> None:
            reorder(beams)
            for name, value in self.memory.items():
                if isinstance(value, Tensor) and value.ndim and value.shape[0] == beams.shape[0]:
                    self.memory[name] = value.index_select(0, beams.to(value.device))

        cache.reorder_cache = both


@dataclasses.dataclass
class DecoderOutput(BaseModelOutputWithPast):
    """transformers' output plus which rows of the input the last layer still had (None: all of them).

    Attributes:
        kept: [B, K] rows of the input; kept_valid: [B, K] False at padding, or None.
    """

    kept: Tensor | None = None
    kept_valid: Tensor | None = None

    def labels(self, labels: Tensor) -> Tensor:
        """[B, L] labels of the input -> labels of the rows that are left."""
        if self.kept is None:
            return labels
        labels = labels.gather(1, self.kept.to(labels.device))
        return labels if self.kept_valid is None else labels.masked_fill(~self.kept_valid.to(labels.device), -100)


class _KeyView:
    """Cache stand-in for one layer of one decode step: stores everything, shows the chosen keys."""

    def __init__(self, cache: DynamicCache, indices: Tensor):
        self._cache, self._indices = cache, indices

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._cache.update(keys, values, layer_idx, *args, **kwargs)
        _check_whole(keys, self._cache.get_seq_length(layer_idx))
        return _gather_keys(keys, self._indices), _gather_keys(values, self._indices)

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
    added: Sequence[Tensor] = (),
    next_position: Tensor | None = None,
) -> DecoderOutput:
    """Run ``decoder`` on [B, q, D] embeddings under ``pipeline``.

    Args:
        decoder: a transformers decoder (``LlamaModel``, ``Qwen2Model``, ...).
        attention_mask: [B, cached + q] 2-D padding mask or None.
        position_ids: [B or 1, q], or [R, B, q] for a model with several per token (M-RoPE; a leading row of text
            positions is left out); None for consecutive ones (after a prefill of this loop: from its last position).
        past_key_values: a ``DynamicCache``; static ones cannot hold layers of different length.
        layout: where visual tokens stand; None (text only) bypasses the prefill and decode stages.
        added: [B, q, D] each, what is added to the output of layers 0, 1, ... in prefill (deepstack features).
        next_position: [B, 1] where generated tokens go on; default: after the last of ``position_ids``.

    Prefill methods act once, on the first prompt of a cache; later turns run uncut on what they left. They expect
    padding on the left and leave it there.
    """
    loop = _Loop(
        decoder, pipeline, inputs_embeds, attention_mask, position_ids, past_key_values, use_cache, layout, request
    )
    loop.added = list(added)
    return loop.run(next_position)


class _Loop:
    def __init__(self, decoder, pipeline, hidden, mask, position_ids, cache, use_cache, layout, request):
        self.decoder, self.pipeline, self.request = decoder, pipeline, request
        self.config = decoder.config
        self.layers = decoder.layers[: self.config.num_hidden_layers]
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if cache is not None and not isinstance(cache, DynamicCache):
            raise MethodError(
                f"{pipeline.name} needs a DynamicCache (layers may differ in length), got {type(cache).__name__}; "
                "do not set cache_implementation."
            )
        self.cache = DynamicCache(config=self.config) if use_cache and cache is None else cache
        self.use_cache = use_cache
        self.hidden = hidden
        batch, self.new = hidden.shape[:2]
        self.past = self.cache.get_seq_length() if self.cache is not None else 0
        self.state: _CacheState | None = getattr(self.cache, "accelerate_state", None) if self.past else None
        if position_ids is None:
            start = self.past if self.state is None else moved(self.state.next_position, hidden.device)
            position_ids = start + torch.arange(self.new, device=hidden.device)[None]
        if position_ids.ndim == 3:
            self.position_ids = position_ids[-3:].expand(-1, batch, -1)
        else:
            self.position_ids = position_ids.expand(batch, -1)
        self.added: list[Tensor] = []
        if mask is not None and mask.dim() != 2:
            raise MethodError(f"the decoder loop takes a 2-D padding mask, got {mask.dim()}-D.")
        self.mask = None if mask is None else mask.bool()
        self.valid = None if self.mask is None else self.mask[:, -self.new :]
        self.layout = None
        if layout is not None and not self.past:
            self.layout = layout.expanded(batch)
            self.layout = dataclasses.replace(self.layout, visual=moved(self.layout.visual, hidden.device))
        self.spans: list[list[VisualSpan]] = []
        self.decodes = False  # whether there is anything for a decode method to act on
        #: row masks that are cut along with the hidden states: what prefill and decode methods see as visual
        self.masks = self._masks()
        self.rope = self._rotary(self.position_ids)
        self.shift: Tensor | None = None
        self.kept: Tensor | None = None
        self.inputs: dict[int, Tensor] = {}
        self.input_ropes: dict[int, tuple[Tensor, Tensor]] = {}

    def _masks(self) -> dict[str, Tensor]:
        """``visual`` and ``block`` for the prefill method, ``decode`` for the decode method, each [B, L]."""
        none = torch.zeros(self.hidden.shape[:2], dtype=torch.bool, device=self.hidden.device)
        masks = {"visual": none, "block": none, "decode": none}
        if self.layout is None:
            return masks
        if self.pipeline.prefill is not None:
            own = self.layout.only(self.pipeline.prefill.modalities)
            self.spans = own.spans
            masks |= {"visual": own.visual, "block": own.blocks()}
        if self.pipeline.decode is not None:
            own = self.layout.only(self.pipeline.decode.modalities)
            self.decodes = any(own.spans)
            masks["decode"] = own.visual
        return masks

    # -- running -----------------------------------------------------------------------------------------------------

    def run(self, next_position: Tensor | None = None) -> DecoderOutput:
        if next_position is None:
            last = self.position_ids.amax(-1, keepdim=True) + 1
            next_position = last.amax(0) if last.ndim == 3 else last
        if self.past:
            self._continue()
        else:
            self._prefill()
        if self.state is not None:
            self.state.next_position = next_position
        return DecoderOutput(
            last_hidden_state=self.decoder.norm(self.hidden),
            past_key_values=self.cache if self.use_cache else None,
            kept=self.kept,
            kept_valid=self.valid if self.kept is not None else None,
        )

    def _prefill(self) -> None:
        method = self.pipeline.prefill
        acts = method is not None and self.new > 1 and any(self.spans)
        at = set(method.prefill_layers(len(self.layers))) if acts else set()
        if self.layout is not None:
            lengths: list[int] | Tensor = self.layout.lengths
        else:
            lengths = [self.new] * len(self.hidden) if self.valid is None else self.valid.sum(1)
        state = self.state = _CacheState(has_visual=self.decodes, length=self.new)
        masks: dict[str, Any] = {}
        for index, layer in enumerate(self.layers):
            if index in at and self._select(method, index, state):
                masks.clear()
                lengths = [self.new] * len(self.hidden) if self.valid is None else self.valid.sum(1)
            if self._enter(index):
                masks.clear()
            if index + 1 in at:
                self.inputs, self.input_ropes = {index: self.hidden}, {index: self.rope}
            kind = self._layer_type(index)
            if kind not in masks:
                masks[kind] = self._prefill_mask(kind)
            self.hidden = self._call(layer, masks[kind], self.cache)
            if index < len(self.added):
                self.hidden = self.hidden + self.added[index]
            state.valid.append(self.valid)
            state.visual.append(self.masks["decode"])
            state.rows.append(self.kept)
            state.shift.append(self.shift)
            if self.request is not None:
                self.request.layer_tokens.append(lengths)
        if len(self.layers) in at:
            self._select(method, len(self.layers), state)
        if self.cache is not None:
            self.cache.accelerate_state = state
            if state.has_visual:
                state.follow(self.cache)

    def _select(self, method: Any, index: int, state: _CacheState) -> bool:
        """Let the prefill method act before layer ``index``; whether it dropped anything."""
        selection = method.prefill(PrefillStep(self, index))
        if selection is not None:
            self._apply(selection, index, state)
            if self.request is not None:
                self.request.dropped(index, self.kept, self.valid, self.layout.visual.shape[1])
        return selection is not None

    def _apply(self, selection: Selection, index: int, state: _CacheState) -> None:
        picked = selection.indices
        source = self.hidden if selection.hidden_states is None else selection.hidden_states
        self.hidden = _gather(source, picked)
        self.masks = {name: mask.gather(1, picked) for name, mask in self.masks.items()}
        self.kept = picked if self.kept is None else self.kept.gather(1, picked)
        if self.valid is not None or selection.valid is not None:
            valid = torch.ones_like(picked, dtype=torch.bool) if self.valid is None else self.valid.gather(1, picked)
            self.valid = valid if selection.valid is None else valid & selection.valid
            # padding slots hold whatever was dropped
            self.masks = {name: mask & self.valid for name, mask in self.masks.items()}
        self.new = picked.shape[1]
        self.added = [_gather(part, picked) for part in self.added]
        if selection.positions == "compact" and self.position_ids.ndim == 2:  # several per token are coordinates
            start = 0 if self.valid is None else (self.new - self.valid.sum(1, keepdim=True))
            compact = (torch.arange(self.new, device=picked.device)[None] - start).clamp(min=0)
            behind = self.position_ids.amax(1, keepdim=True) - compact.amax(1, keepdim=True)
            self.shift = behind if self.shift is None else self.shift + behind
            self.position_ids = compact.expand(picked.shape[0], -1)
            self.rope = self._rotary(self.position_ids)
        else:
            every = (*self.position_ids.shape[:-2], *picked.shape)
            self.position_ids = self.position_ids.gather(-1, picked.expand(every))
            self.rope = tuple(_gather(part.expand(picked.shape[0], -1, -1), picked) for part in self.rope)
        if selection.trim_cache and self.cache is not None:
            for done in range(index):
                entry = self.cache.layers[done]
                here = entry.keys.device
                self._trim(entry, state.visual[done].shape[1], moved(picked, here))
                state.valid[done], state.visual[done] = moved((self.valid, self.masks["decode"]), here)
                state.rows[done] = moved(self.kept, here)

    @staticmethod
    def _trim(entry: Any, length: int, picked: Tensor) -> None:
        """Cut one layer's cache to ``picked``."""
        _check_whole(entry.keys, length)
        entry.keys, entry.values = _gather_keys(entry.keys, picked), _gather_keys(entry.values, picked)
        if hasattr(entry, "cumulative_length"):  # a sliding-window layer counts what it has seen
            entry.cumulative_length = picked.shape[1]

    def _continue(self) -> None:
        """Decode step(s), or a later turn of a chat, on top of a cache."""
        state, method, start = self.state, self.pipeline.decode, len(self.layers)
        if method is not None and state is not None and state.has_visual and self.new == 1:
            start = method.decode_layer(len(self.layers))
        keep: Tensor | None = None
        shown: Selection | None = None
        shift: Tensor | None = None
        for index, layer in enumerate(self.layers):
            if self._enter(index):
                keep, shown = moved((keep, shown), self.hidden.device)
            valid = self._keys_valid(index)
            if state is not None and state.shift[index] is not shift:  # changes at layers with a "compact" selection
                shift = state.shift[index]
                self.rope = self._rotary(self.position_ids - shift)
            if index == start and index > 0:
                visual = self._grown(state.visual[index], index, False)
                keep = method.decode(DecodeStep(self, index, visual, valid, state.memory))
                shown = _visible(keep, valid)
            elif keep is not None and state.rows[index] is not state.rows[index - 1]:  # a shorter cache from here on
                keep = self._carried(keep, index - 1, index)
                shown = _visible(keep, valid)
            if index + 1 == start:
                self.inputs, self.input_ropes = {index: self.hidden}, {index: self.rope}
            if shown is None:
                self.hidden = self._call(layer, self._decode_mask(valid, index), self.cache)
            else:
                view = _KeyView(self.cache, shown.indices)
                self.hidden = self._call(layer, self._key_mask(shown.valid), view)
        if state is not None and self.new > 1:  # a later turn: its tokens become part of what decode steps must see
            for index in range(len(self.layers)):
                state.valid[index] = self._keys_valid(index, after=True)
                state.visual[index] = self._grown(state.visual[index], index, False, after=True)

    def _carried(self, keep: Tensor, below: int, index: int) -> Tensor:
        """The mask over the keys of layer ``below``, over those keys that layer ``index`` has."""
        state = self.state
        everything = torch.arange(state.length, device=keep.device).expand(keep.shape[0], -1)
        rows, fewer = (
            everything if state.rows[i] is None else moved(state.rows[i], keep.device) for i in (below, index)
        )
        prompt = torch.zeros_like(everything, dtype=torch.bool).scatter_(1, rows, keep[:, : rows.shape[1]])
        return torch.cat([prompt.gather(1, fewer), keep[:, rows.shape[1] :]], dim=1)

    def _enter(self, index: int) -> bool:
        """Take everything along to the device of layer ``index``; whether it had to be moved."""
        device = hooked_device(self.layers[index])
        if device is None or device == self.hidden.device:
            return False
        for name in ("hidden", "rope", "position_ids", "mask", "valid", "masks", "kept", "shift", "added"):
            setattr(self, name, moved(getattr(self, name), device))
        return True

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary tables beside the hidden states (the module that makes them may compute elsewhere)."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        if positions.ndim == 2 and "mrope_section" in rope:  # text of a model with several ids per token
            positions = positions.expand(3, *positions.shape)
        return moved(self.decoder.rotary_emb(self.hidden, positions), self.hidden.device)

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

    def _keys_valid(self, index: int, after: bool = False) -> Tensor | None:
        """[B, S] which keys of layer ``index`` are real, those of this call included; None if all are."""
        if self.state is None:
            return self.mask
        valid = self.state.valid[index]
        if valid is None:
            if self.new == 1 or self.valid is None:
                return None
            valid = torch.ones_like(self.state.visual[index])
        valid = self._grown(valid, index, True, after)
        if self.new > 1 and self.valid is not None:  # a later turn may be padded itself
            valid = torch.cat([valid[:, : -self.new], self.valid], dim=1)
        return valid

    def _grown(self, mask: Tensor, index: int, fill: bool, after: bool = False) -> Tensor:
        """A mask over layer ``index``'s cache, extended by everything cached since and the tokens of this call."""
        total = self.cache.get_seq_length(index) + (0 if after else self.new)
        mask = mask[:, : total - self.new]  # generate may have cropped the cache
        return torch.cat([mask, mask.new_full((mask.shape[0], total - mask.shape[1]), fill)], dim=1)

    def _decode_mask(self, valid: Tensor | None, index: int) -> Any:
        """Mask for ``new`` queries at the end of the cache; ``valid`` [B, S] over all keys ever cached (None: all)."""
        if valid is None and self.new == 1:
            return None
        if self._is_flash:
            return valid
        length, offset = self.cache.get_mask_sizes(self.new, index)
        keys = torch.arange(offset, offset + length, device=self.hidden.device)
        query = torch.arange(self.new, device=keys.device)[:, None] + (offset + length - self.new)
        allowed = keys <= query
        if self._layer_type(index) == "sliding_attention":
            allowed &= keys > query - self.config.sliding_window
        return self._key_mask(None if valid is None else valid[:, offset:], allowed)

    def _key_mask(self, valid: Tensor | None, allowed: Tensor | None = None) -> Any:
        """What the attention backend takes for [B, K] valid keys and [q, K] allowed pairs."""
        if valid is not None and self._is_flash:
            return valid
        if valid is not None:
            allowed = valid[:, None, None] if allowed is None else valid[:, None, None] & allowed
            # A query that is itself padding would see nothing and turn into NaN; let it see everything.
            allowed = allowed | ~allowed.any(-1, keepdim=True)
        elif allowed is not None:
            allowed = allowed[None, None].expand(self.hidden.shape[0], -1, -1, -1)
        if allowed is not None and self.config._attn_implementation == "eager":
            lowest = torch.finfo(self.hidden.dtype).min
            return torch.zeros_like(allowed, dtype=self.hidden.dtype).masked_fill(~allowed, lowest)
        return allowed

    @property
    def _is_flash(self) -> bool:
        return "flash" in (self.config._attn_implementation or "")

    # -- attention for chosen rows ------------------------------------------------------------------------------------

    def attention_rows(
        self, index: int, rows: Tensor, valid: Tensor | None, *, rotary: bool, causal: bool
    ) -> Tensor:
        layer = self.layers[index]
        attention = layer.self_attn
        hidden, (cos, sin) = self.inputs[index], self.input_ropes[index]
        asked_on = rows.device  # scores are computed where the layer is and handed out where they were asked for
        rows, valid = moved((rows, valid), hidden.device)
        cached = self.cache.layers[index].keys if rotary and self.cache is not None else None
        if cached is not None:
            _check_whole(cached, self.cache.get_seq_length(index))
        # all rows are needed only where the keys have to be computed again
        normed = layer.input_layernorm(hidden if cached is None else hidden[:, rows])
        heads = self.config.num_attention_heads
        dim = attention.head_dim
        query = attention.q_proj(normed[:, rows] if cached is None else normed).unflatten(-1, (heads, dim))
        query = getattr(attention, "q_norm", torch.nn.Identity())(query).transpose(1, 2)
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
        return moved(scores.softmax(dim=-1, dtype=torch.float32).to(hidden.dtype), asked_on)


def _visible(keep: Tensor | None, valid: Tensor | None) -> Selection | None:
    """Indices of the keys to show, None for all."""
    if keep is None:
        return None
    shown = Selection.from_mask(keep if valid is None else keep & valid)
    everything = shown.valid is None and shown.indices.shape[1] == keep.shape[1]
    return None if everything else shown


def _gather(states: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices`` [B, K] of states [B, L, D]. Copies whole rows, which ``torch.gather`` does not."""
    batch, length, width = states.shape
    rows = indices + torch.arange(batch, device=indices.device)[:, None] * length
    return states.reshape(-1, width).index_select(0, rows.flatten()).view(batch, -1, width)


def _gather_keys(states: Tensor, indices: Tensor) -> Tensor:
    """Keys (or values) ``indices`` [B, K] of states [B, H, S, d]."""
    batch, heads = states.shape[:2]
    per_head = indices[:, None].expand(-1, heads, -1).reshape(batch * heads, -1)
    return _gather(states.flatten(0, 1), per_head).unflatten(0, (batch, heads))


def _check_whole(keys: Tensor, length: int) -> None:
    if keys.shape[2] < length:
        raise MethodError(
            f"the sliding window of this model has already dropped {length - keys.shape[2]} keys of the prompt; "
            "methods that look back into the KV cache need a prompt within the window."
        )


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split convention that Llama-like models share. states [B, H, L, d]."""
    first, second = states.chunk(2, dim=-1)
    return states * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
