"""The decoder loop: prefill and decode stages inside any Llama-like transformers decoder.

One loop for every decoder (:mod:`.layers` knows how each is built). Compared with the model's own forward it

* lets a prefill method cut the hidden states before chosen layers, so that layers have different lengths,
* lets a decode method hide cached keys from the layers above a chosen one,
* computes attention probabilities only for the rows and the layer that a method asks for; the model's attention
  backend (SDPA, flash-attention) is never changed.

A model larger than a GPU has its layers on several devices (accelerate's ``device_map``). Whatever goes along with the
hidden states (masks, positions, rotary tables, which rows are left) moves with them to the device of the layer that is
about to run, and what is remembered of a layer stays where its cache is. A prefill method still finds everything on the
device of the layer before, whose scores it reads; a decode method on that of the layer that gets the view.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from accelerate_methods.engine.cache import check_cache, keep_on, request_state
from accelerate_methods.engine.cache_state import CacheState
from accelerate_methods.engine.cached_keys import KeyView, cached_length, grown, whole_keys
from accelerate_methods.engine.devices import moved
from accelerate_methods.engine.eviction import Evictions
from accelerate_methods.engine.layers import DecoderLayers, LayerInput
from accelerate_methods.engine.masks import cached_mask, key_mask, prefill_mask, visible_keys
from accelerate_methods.engine.output_rows import DecoderOutput
from accelerate_methods.engine.points import Attended, Numbered, acting_in, held_by
from accelerate_methods.engine.prompt import PromptLayout
from accelerate_methods.engine.rows import Rows
from accelerate_methods.engine.undisturbed import undisturbed
from accelerate_methods.stages.contract import check_selection, check_visible
from accelerate_methods.stages.decode import DecodeStep
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.prefill import PrefillStep, Selection, VisualSpan

if TYPE_CHECKING:
    from accelerate_methods.engine.recording import RequestRecord
    from accelerate_methods.registry.pipeline import Pipeline


def needs_loop(pipeline: Pipeline | None) -> bool:
    """Whether the model's own forward cannot express what is attached (a compress stage leaves position gaps)."""
    if pipeline is None:
        return False
    return pipeline.shortens_inside or bool({"compress", "prefill", "decode"} & set(pipeline.stages))


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
) -> DecoderOutput:
    """Run ``decoder`` on [B, q, D] embeddings under ``pipeline``.

    Args:
        decoder: a transformers decoder (``LlamaModel``, ``Qwen2Model``, ...).
        attention_mask: [B, cached + q] 2-D padding mask or None.
        position_ids: [B or 1, q], or [R, B, q] for a model with several per token (M-RoPE; a leading row of text
            positions is left out); None for consecutive ones (after a prefill of this loop: from its last position).
        past_key_values: a ``DynamicCache``; static ones cannot hold layers of different length.
        layout: where visual tokens stand; None (text only) bypasses all methods but those that act on text.
        request: record to fill.

    Prefill methods act once, on the first prompt of a cache; later turns run uncut on what they left. They expect
    padding on the left and leave it there.
    """
    check_cache(past_key_values, pipeline.name)
    if attention_mask is not None and attention_mask.dim() != 2:
        raise MethodError(f"the decoder loop takes a 2-D padding mask, got {attention_mask.dim()}-D.")
    use_cache = decoder.config.use_cache if use_cache is None else use_cache
    if getattr(decoder, "gradient_checkpointing", False) and decoder.training:
        use_cache, past_key_values = False, None  # as in transformers: layers that will run twice cache nothing
    if use_cache and past_key_values is None:
        past_key_values = DynamicCache(config=decoder.config)
    loop = _Loop(decoder, pipeline, past_key_values, use_cache, request)
    loop.take(inputs_embeds, attention_mask, position_ids, layout)
    return loop.run()


class _Loop:
    """One call of a decoder: its rows, layer after layer."""

    def __init__(
        self,
        decoder: Any,
        pipeline: Pipeline,
        cache: DynamicCache | None,
        use_cache: bool,
        request: RequestRecord | None,
    ):
        self.layers, self.config, self.pipeline = DecoderLayers(decoder), decoder.config, pipeline
        self.cache, self.use_cache, self.request = cache, use_cache, request
        self.past = cached_length(cache)
        self.state: CacheState | None = request_state(cache)
        self.begins = not self.past
        self.evictions: Evictions | None = None
        #: what the layer got for which a method will ask attention
        self.attended: Attended | None = None
        #: what each prefill method leaves from layer to layer
        self.memories: list[dict[str, Any]] = [{} for _ in pipeline.prefills]
        #: [B, L] row that holds each row of the prompt now, -1 if none does; kept while somebody records
        self.held: Tensor | None = None
        self._places: tuple[Tensor, Tensor, Tensor] | None = None

    def take(
        self, hidden: Tensor, mask: Tensor | None, position_ids: Tensor | None, layout: PromptLayout | None
    ) -> None:
        """The rows of this call, as :func:`run_decoder` got them."""
        batch, self.new = hidden.shape[:2]
        mask = None if mask is None else mask.bool()
        valid = None if mask is None else mask[:, -self.new :]
        evictions = Evictions.around(self.pipeline.decode, self.layers, self.cache, valid, hidden, layout)
        self.evictions = evictions
        if evictions is not None:
            evictions.before()
            self.past = cached_length(self.cache)
        self.told = position_ids is not None  # or else counted
        if evictions is not None and evictions.placed:
            position_ids, self.told = evictions.positions(hidden.device), valid is not None and self.new > 1
            layout = None if layout is None else dataclasses.replace(layout, next_position=None)
        elif position_ids is None:
            start = self.past if self.state is None else moved(self.state.position(self.past), hidden.device)
            position_ids = start + torch.arange(self.new, device=hidden.device)[None]
        if position_ids.ndim == 3:
            position_ids = position_ids[-3:].expand(-1, batch, -1)
        else:
            position_ids = position_ids.expand(batch, -1)
        self.layout = None if layout is None or not self.begins else layout.expanded(batch).moved(hidden.device)
        self.rows = Rows(
            hidden=hidden,
            position_ids=position_ids,
            rope=self.layers.rotary(hidden, position_ids),
            mask=mask,
            valid=valid,
            masks=self._visual_rows(hidden),
            added=[] if self.layout is None else list(self.layout.added),
        )

    def _visual_rows(self, hidden: Tensor) -> dict[Any, Tensor]:
        """What the methods take for visual, see :class:`.rows.Rows`: only items of their modalities."""
        none = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        masks: dict[Any, Tensor] = {"decode": none}
        self.spans: list[list[list[VisualSpan]]] = []  # of each prefill method
        self.decodes = False  # whether there is anything for a decode method to act on
        if self.layout is None:
            return masks
        for number, method in enumerate(self.pipeline.prefills):
            own = self.layout.only(method.modalities)
            self.spans.append(own.spans)
            masks |= {("visual", number): own.visual, ("block", number): own.blocks()}
        if self.pipeline.decode is not None:
            own = self.layout.only(self.pipeline.decode.modalities)
            self.decodes = any(own.spans)
            masks["decode"] = own.visual
        return masks

    def run(self) -> DecoderOutput:
        if self.begins:
            following, full = self._following(), self.new if self.layout is None else self.layout.full or self.new
            self._prefill()
            if self.cache is not None:
                self.state.begin(self.cache, following, full)
                keep_on(self.cache, self.state)
        elif self.state is None:
            self._continue()
        else:
            with self.state.used():
                self._continue()
        if self.evictions is not None:
            self.evictions.after()
        if self.request is not None and self.cache is not None:
            self.request.cached.append([self.cache.get_seq_length(index) for index in range(len(self.layers))])
        return DecoderOutput(
            last_hidden_state=self.layers.norm(self.rows.hidden),
            past_key_values=self.cache if self.use_cache else None,
            kept=self.rows.kept,
            kept_valid=self.rows.valid if self.rows.kept is not None else None,
        )

    def _following(self) -> Tensor:
        """[B, q] position of the token behind each row."""
        at = self.rows.position_ids
        at = at.amax(0) if at.ndim == 3 else at
        last = None if self.layout is None else self.layout.next_position
        if last is None and at.shape[1] == 1:
            return at + 1
        last = at.amax(1, keepdim=True) + 1 if last is None else moved(last, at.device)
        return torch.cat([at[:, :-1] + 1, last], dim=1)

    # -- the first prompt of a cache ---------------------------------------------------------------------------------

    def _prefill(self) -> None:
        here = [[self.new > 1 and bool(s) for s in spans] for spans in self.spans] or [[]] * len(self.pipeline.prefills)
        acting = acting_in(self.pipeline.prefills, self.layers, here)
        lengths = self.rows.lengths() if self.layout is None else self.layout.lengths
        state = self.state = CacheState(has_visual=self.decodes, length=self.new, name=self.pipeline.name)
        masks: dict[str, Any] = {}
        update = None if self.layout is None else self.layout.update
        for index in range(len(self.layers)):
            if index in acting.before and self._select(acting.before[index], index):
                masks.clear()
                lengths = self.rows.lengths()
            if self._enter(index):
                masks.clear()
            if update is not None and update.layer == index:
                self.rows.hidden = update(self.rows.hidden, self.rows.kept)
            if acting.asks_about(index):
                self.attended = Attended(index, LayerInput(self.rows.hidden, self.rows.rope), self.rows.valid)
            kind = acting.unmasked.get(index) or self.layers.kind(index)
            if kind not in masks:
                masks[kind] = prefill_mask(self.config, kind, self.rows.hidden, self.rows.valid)
            if self.request is not None:
                self.request.layer_tokens.append(lengths)
            if index in acting.inside:
                if self._run_halves(acting.inside[index], index, masks[kind]):
                    masks.clear()
                    lengths = self.rows.lengths()
            else:
                self._run_layer(index, masks[kind], self.cache)
                state.layers.append(self.rows.cached())
            if index < len(self.rows.added):
                self.rows.hidden = self.rows.hidden + self.rows.added[index]
        if len(self.layers) in acting.before:
            self._select(acting.before[len(self.layers)], len(self.layers))

    def _run_halves(self, acting: Numbered, index: int, mask: Any) -> bool:
        """Layer ``index`` with a method between its halves; whether that dropped anything."""
        cache = {"past_key_values": self.cache, "use_cache": self.use_cache}
        with undisturbed(self, index):
            self.rows.hidden = self.layers.attend(index, self.rows.hidden, self.rows.rope, mask, **cache)
        self.state.layers.append(self.rows.cached())
        dropped = self._select(acting, index, inside=True)
        self.rows.hidden = self.layers.feed(index, self.rows.hidden)
        return dropped

    def _select(self, acting: Numbered, index: int, inside: bool = False) -> bool:
        """Let a prefill method act before layer ``index``, or inside it; whether it dropped anything."""
        number, method = acting
        self.memories[number] = moved(self.memories[number], self.rows.hidden.device)
        selection = method.prefill(PrefillStep(self, index, number=number, inside=inside))
        if selection is None:
            return False
        check_selection(method.name, selection, len(self.rows.hidden), self.new)
        if self.request is not None:
            self._follow(selection)
        self.rows.cut(selection, self.layers)
        self.new = self.rows.count
        if inside:
            self.attended.cut(selection.indices)
        reached = index + inside  # layers whose cache is filled
        if selection.trim_cache and self.cache is not None:
            self.state.trim(self.cache, reached, selection.indices, self.rows.cached())
        if self.request is not None:
            self.request.went_on(reached, self.held, self.rows.kept)
        return True

    def _follow(self, selection: Selection) -> None:
        """Keep in mind which row holds each row of the prompt; for whoever records."""
        held = held_by(selection.indices, selection.valid, selection.owner, self.new)
        if self.held is not None:
            before = moved(self.held, held.device)
            held = torch.where(before >= 0, held.gather(1, before.clamp(min=0)), before)
        self.held = held

    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Item, frame and place of the rows that are left, see :class:`.prefill.RowPlaces`."""
        if self._places is None:
            self._places = self.layout.places()
        device, kept = self.rows.hidden.device, self.rows.kept
        places = moved(self._places, device)
        return places if kept is None else tuple(part.gather(1, kept) for part in places)

    # -- on top of a cache -------------------------------------------------------------------------------------------

    def _continue(self) -> None:
        """Decode step(s), or a later turn of a chat."""
        state, method, start = self.state, self.pipeline.decode, len(self.layers)
        if method is not None and state is not None and state.has_visual and self.new == 1:
            start = method.decode_layer(len(self.layers))
        memory = state.recalled() if start < len(self.layers) else {}
        keep: Tensor | None = None
        shown: Selection | None = None
        shift: Tensor | None = None
        for index in range(len(self.layers)):
            if self._enter(index):
                keep, shown = moved((keep, shown), self.rows.hidden.device)
            valid = self._keys_valid(index)
            known = None if state is None else state.layers[index]
            if known is not None and known.shift is not shift:  # changes at layers with a "compact" selection
                shift = known.shift
                self.rows.rope = self.layers.rotary(self.rows.hidden, self.rows.position_ids - shift)
            if index == start and index > 0:
                visual = self._keys_visual(index)
                keep = method.decode(DecodeStep(self, index, visual, valid, memory))
                check_visible(method.name, keep, visual.shape)
                shown = visible_keys(keep, valid)
            elif keep is not None and known.rows is not state.layers[index - 1].rows:  # a shorter cache from here on
                keep = state.carried(keep, index - 1, index)
                shown = visible_keys(keep, valid)
            if index + 1 == start:
                self.attended = Attended(index, LayerInput(self.rows.hidden, self.rows.rope))
            if shown is None:
                self._run_layer(index, self._mask(index, valid), self.cache)
            else:
                mask = key_mask(self.config, self.rows.hidden, shown.valid)
                self._run_layer(index, mask, KeyView(self.cache, shown.indices))
        if state is not None and self.new > 1:  # a later turn: its tokens become part of what decode steps must see
            for index, known in enumerate(state.layers):
                known.valid, known.visual = self._keys_valid(index, done=True), self._keys_visual(index, done=True)
        if state is not None:
            state.ran(self.past, self.new, self._following() if self.told else None)
            if start < len(self.layers):
                state.stepped()

    def _mask(self, index: int, valid: Tensor | None) -> Any:
        """Mask of layer ``index`` over all of its cache."""
        if valid is None and self.new == 1:
            return None
        sizes = self.cache.get_mask_sizes(self.new, index)
        return cached_mask(self.config, self.layers.kind(index), self.rows.hidden, valid, sizes)

    def _keys_total(self, index: int, done: bool) -> int:
        """Keys of layer ``index``, those of this call included. ``done``: the layer has run."""
        return self.cache.get_seq_length(index) + (0 if done else self.new)

    def _keys_visual(self, index: int, done: bool = False) -> Tensor:
        """[B, S] which keys of layer ``index`` the decode method acts on."""
        return grown(self.state.layers[index].visual, self._keys_total(index, done), self.new, False)

    def _keys_valid(self, index: int, done: bool = False) -> Tensor | None:
        """[B, S] which keys of layer ``index`` are real; None if all are."""
        if self.state is None:
            return self.rows.mask
        known = self.state.layers[index]
        valid = known.valid
        if valid is None:
            if self.new == 1 or self.rows.valid is None:
                return None
            valid = torch.ones_like(known.visual)
        valid = grown(valid, self._keys_total(index, done), self.new, True)
        if self.new > 1 and self.rows.valid is not None:  # a later turn may be padded itself
            valid = torch.cat([valid[:, : -self.new], self.rows.valid], dim=1)
        return valid

    # -- one layer ---------------------------------------------------------------------------------------------------

    def _enter(self, index: int) -> bool:
        """Take everything along to the device of layer ``index``; whether it had to be moved."""
        device = self.layers.device(index)
        if device is None or device == self.rows.hidden.device:
            return False
        self.rows.move(device)
        return True

    def _run_layer(self, index: int, mask: Any, cache: Any) -> None:
        with undisturbed(self, index):
            self.rows.hidden = self.layers.run(
                index, self.rows.hidden, self.rows.rope, mask, past_key_values=cache, use_cache=self.use_cache
            )

    def attention_rows(
        self, index: int, rows: Tensor, valid: Tensor | None, *, rotary: bool, causal: bool, upcoming: bool = False
    ) -> Tensor:
        """What methods are told of layer ``index``; see :meth:`.layers.DecoderLayers.attention`."""
        layer = self._about(index, rotary, upcoming)
        return layer.attention(self.layers, rows, valid, rotary=rotary, causal=causal)

    def key_rows(self, index: int, *, rotary: bool, upcoming: bool) -> Tensor:
        """The key states of the rows in layer ``index``, on the device of the rows."""
        keys = self._about(index, rotary, upcoming).keys(self.layers, rotary=rotary)
        return moved(keys, self.rows.hidden.device)

    def _about(self, index: int, rotary: bool, upcoming: bool) -> Attended:
        """Layer ``index`` with what it got: what has just run, or what is about to."""
        if upcoming:
            device = self.layers.device(index) or self.rows.hidden.device
            return Attended(index, LayerInput(*moved((self.rows.hidden, self.rows.rope), device)))
        attended = self.attended
        cached = rotary and self.cache is not None and attended.left is None  # or else it may have been cut
        keys = whole_keys(self.cache, index) if cached else None
        return dataclasses.replace(attended, given=dataclasses.replace(attended.given, keys=keys))
