"""A pipeline on one model object of transformers: its wrappers, and what happens in a forward under them."""

from __future__ import annotations

import dataclasses
import inspect
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from accelerate_methods.engine import recording
from accelerate_methods.engine.devices import moved
from accelerate_methods.engine.loop import DecoderOutput, needs_loop, run_decoder
from accelerate_methods.engine.prompt import PromptLayout
from accelerate_methods.engine.sequences import VisualSequence, compressed_sequence
from accelerate_methods.hosts.native.family import Call, Family
from accelerate_methods.hosts.native.prompt import CutPrompt, PromptItem, cut_prompt
from accelerate_methods.hosts.native.watching import Forward, VisionWatch
from accelerate_methods.hosts.native.wrapping import Wrappers
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.stages.compress import ViewCompressMethod, VisualItem
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.signals import resolve_signal

_STATE = "accelerate_prompt"  # attribute of a cache: what its prompt was
_REQUEST = "accelerate_request"  # attribute of a cache: the record of its request


class NativeAcceleration:
    """A pipeline on one model object.

    Attributes:
        adaptations: signal that a method asks for -> what this model gives instead.
    """

    def __init__(self, model: nn.Module, family: Family, pipeline: Pipeline):
        self.model, self.family, self.pipeline = model, family, pipeline
        given = {name: resolve_signal(m, name, family.signals) for m in pipeline.methods for name in m.signals}
        self.adaptations = {name: real for name, real in given.items() if name != real}
        self._wanted = frozenset(given.values())
        family.prepare(self._wanted)
        method = pipeline.compress
        acts = isinstance(method, ViewCompressMethod)
        self._on_views = family.views & method.modalities if acts else frozenset()
        self._now: ContextVar[Forward | None] = ContextVar("accelerate_forward", default=None)
        self._vision = VisionWatch(model, family, self._now)
        self._wrappers = Wrappers()
        self._signature = inspect.signature(model.forward)

    # -- on and off --------------------------------------------------------------------------------------------------

    def install(self) -> None:
        wrap = self._wrappers.wrap
        self._outer = wrap(self.model, "forward", self._forward)
        self._inner = wrap(self.family.language, "forward", self._decode)
        self._prepare_inputs = wrap(self.model, "prepare_inputs_for_generation", self._later_turn)
        self._vision.install(self._wrappers)

    def remove(self) -> None:
        self._wrappers.remove()

    # -- generate ----------------------------------------------------------------------------------------------------

    def _later_turn(self, *args: Any, **kwargs: Any) -> Any:
        """In the place of ``model.prepare_inputs_for_generation``.

        Given a whole chat and the cache of its former turns, ``generate`` leaves out as many tokens as the cache holds;
        of a cut prompt it holds fewer than there were.
        """
        cut: CutPrompt | None = getattr(kwargs.get("past_key_values"), _STATE, None)
        new = kwargs.get("next_sequence_length")
        if cut is not None and new is not None and kwargs.get("is_first_iteration"):
            kwargs["next_sequence_length"] = new - (cut.full - cut.valid.shape[1])
        return self._prepare_inputs(*args, **kwargs)

    # -- one forward -------------------------------------------------------------------------------------------------

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """In the place of ``model.forward``."""
        arguments = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        arguments |= arguments.pop("kwargs", {})
        cache = arguments.get("past_key_values")
        now, ahead = Forward(arguments), self._vision.take_request()
        if now.seen:
            now.request = ahead
        elif cache is None or not cache.get_seq_length():
            now.request = recording.new_request()
        visuals = bool(now.seen) or any(v is not None for k, v in arguments.items() if k.startswith("pixel_values"))
        if visuals:
            self._check(arguments)
        if now.unseen and needs_loop(self.pipeline):
            raise MethodError(
                f"{self.pipeline.name}: the features of the {' and '.join(now.unseen)}s were computed before it was "
                "attached, or cut into pieces (prefill_chunk_size); give the pixels and the prompt as a whole."
            )
        labels = kwargs.pop("labels", None) if visuals and needs_loop(self.pipeline) else None
        token = self._now.set(now)
        try:
            output = self._outer(*args, **kwargs)
        finally:
            self._now.reset(token)
        if labels is not None:
            output.loss = self.model.loss_function(
                logits=output.logits,
                labels=now.output.labels(self._labels(labels, now.cut)),
                vocab_size=output.logits.shape[-1],
            )
        return output

    def _check(self, arguments: dict[str, Any]) -> None:
        if arguments.get("input_ids") is None:
            raise MethodError("images and videos need input_ids: their placeholders say where the tokens stand.")
        cache, mask = arguments.get("past_key_values"), arguments.get("attention_mask")
        if cache is not None and cache.get_seq_length() and needs_loop(self.pipeline):
            raise MethodError(
                f"{self.pipeline.name}: images of a later turn need a new cache; give the whole chat again."
            )
        if isinstance(mask, Tensor) and mask.ndim != 2:
            raise MethodError("a 2-D attention_mask is needed; do not set cache_implementation.")

    @staticmethod
    def _labels(labels: Tensor, cut: CutPrompt) -> Tensor:
        """[B, L] labels of the uncompressed prompt -> of the rows that are left; none at visual tokens and padding.

        Neither at the first row of a sample: what stands before it is padding, which predicts nothing.
        """
        left = labels.to(cut.source.device).gather(1, cut.source)
        first = cut.valid & (cut.valid.cumsum(1) == 1)
        return left.masked_fill(~cut.valid | first | cut.layout.visual, -100)

    def _decode(self, *args: Any, **kwargs: Any) -> Any:
        """In the place of the language model's ``forward``."""
        now = self._now.get()
        if args or now is None or kwargs.get("inputs_embeds") is None:
            return self._inner(*args, **kwargs)  # not called by the model that we are attached to
        cache = kwargs.get("past_key_values")
        if cache is None or not cache.get_seq_length():
            return self._prefill(now, kwargs)
        cut: CutPrompt | None = getattr(cache, _STATE, None)
        request = getattr(cache, _REQUEST, None)
        if request is not None:
            request.decode_steps += 1
        with recording.stage(request, "decode", kwargs["inputs_embeds"].device):
            if cut is None:
                return self._inner(**kwargs)
            # Several ids per token are coordinates, kept whatever was dropped: transformers says where tokens go on
            # (generate: behind the last one; forward: behind the largest, which may be that of a long video).
            # Without a mask to count by it counts the cache, which is shorter than the prompt; the loop knows better.
            positions = kwargs.get("position_ids")
            counted = kwargs.get("attention_mask") is not None or now.arguments.get("position_ids") is not None
            more = {"position_ids": positions} if counted and positions is not None and positions.ndim == 3 else {}
            mask = _mask_behind(cut, kwargs)
            return self._plain(self._run(kwargs, kwargs["inputs_embeds"], attention_mask=mask, **more))

    def _prefill(self, now: Forward, kwargs: dict[str, Any]) -> Any:
        embeds = kwargs["inputs_embeds"]
        with recording.stage(now.request, "compress", embeds.device):
            # a model over several devices gets these as the caller has them
            as_given = now.arguments.get("input_ids"), kwargs.get("attention_mask"), kwargs.get("position_ids")
            ids, mask, positions = moved(as_given, embeds.device)
            call = Call(ids, embeds, now.seen, now.arguments, self._wanted, self._on_views)
            items = self.family.items(call) if now.seen else []
            sequences = [self._sequence(found.item) for found in items]
            cut = now.cut = cut_prompt(
                embeds, mask, positions, items, sequences, self.pipeline.positions == "original"
            )
            now.seen.clear()
        request = now.request
        if request is not None:
            _describe(request, items, sequences, cut)
            request.started(len(self.family.language.layers))
        with recording.stage(request, "prefill", embeds.device):
            if needs_loop(self.pipeline):
                now.output = self._run(
                    kwargs,
                    cut.embeds,
                    attention_mask=cut.valid if cut.padded else None,
                    position_ids=cut.positions,
                    layout=self._layout(cut, kwargs),
                    request=request,
                )
                output = self._plain(now.output)
            else:
                output = self._inner(**kwargs)
        if request is not None and not request.layer_tokens:
            request.layer_tokens = [cut.layout.lengths] * len(self.family.language.layers)
        cache = output.past_key_values
        if cache is not None:
            # the embeddings are not needed any more, and the cache lives on
            setattr(cache, _STATE, cut.without_embeds() if needs_loop(self.pipeline) else None)
            setattr(cache, _REQUEST, request)
        return output

    def _layout(self, cut: CutPrompt, kwargs: dict[str, Any]) -> PromptLayout:
        added = [cut.taken(part) for part in self.family.added(kwargs)]
        return dataclasses.replace(cut.layout, added=added, next_position=cut.next_position)

    def _run(self, kwargs: dict[str, Any], embeds: Tensor, **more: Any) -> DecoderOutput:
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.get(name):
                raise MethodError(f"{name} is not available while {self.pipeline.name} is attached; detach it first.")
        return run_decoder(
            self.family.language,
            self.pipeline,
            inputs_embeds=embeds,
            past_key_values=kwargs.get("past_key_values"),
            use_cache=kwargs.get("use_cache"),
            **more,
        )

    @staticmethod
    def _plain(output: DecoderOutput) -> BaseModelOutputWithPast:
        """What the language model itself would return: some models hand on whatever they find."""
        return BaseModelOutputWithPast(output.last_hidden_state, output.past_key_values)

    def _sequence(self, item: VisualItem) -> VisualSequence:
        item.signals = moved(item.signals, item.features.device)
        return compressed_sequence(item, self.pipeline.compress, self.family.project)


def _mask_behind(cut: CutPrompt, kwargs: dict[str, Any]) -> Tensor | None:
    """Padding mask of a later call over what is left of the prompt and everything after it."""
    mask = kwargs.get("attention_mask")
    if mask is None or not cut.padded:
        return None
    after = mask[:, cut.full :].bool().to(cut.valid.device)
    valid = cut.valid.repeat_interleave(after.shape[0] // cut.valid.shape[0], dim=0)
    return torch.cat([valid, after], dim=1)


def _describe(
    request: recording.RequestRecord, items: list[PromptItem], sequences: list[VisualSequence], cut: CutPrompt
) -> None:
    request.samples = [
        recording.SampleRecord(dense_length=dense, length=length)
        for dense, length in zip(cut.dense, cut.layout.lengths, strict=True)
    ]
    for found, sequence, rows in zip(items, sequences, cut.rows, strict=True):
        record = recording.item_record(found.item, sequence, tokens_after=sequence.num_content, rows=rows)
        request.samples[found.sample].items.append(record)
