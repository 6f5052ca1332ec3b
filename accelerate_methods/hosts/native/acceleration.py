"""A pipeline on one model object of transformers: its wrappers, and what happens in a forward under them."""

from __future__ import annotations

import functools
import inspect
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

from accelerate_methods.engine import recording
from accelerate_methods.engine.devices import moved
from accelerate_methods.engine.loop import DecoderOutput, needs_loop, run_decoder
from accelerate_methods.engine.sequences import VisualSequence, compressed_sequence
from accelerate_methods.hosts.native.family import Call, Family, Seen
from accelerate_methods.hosts.native.prompt import CutPrompt, PromptItem, cut_prompt
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.signals import resolve_signal
from accelerate_methods.stages.views import ViewCompressMethod

_STATE = "accelerate_prompt"  # attribute of a cache: what its prompt was
_REQUEST = "accelerate_request"  # attribute of a cache: the record of its request
_SEEN = "accelerate_seen"  # key in the vision side's output, which may be copied: how it came about
_KINDS = ("image", "video")


class _Forward:
    """What is remembered of one ``forward`` between the wrappers."""

    def __init__(self, arguments: dict[str, Any]):
        self.arguments = arguments
        self.request: recording.RequestRecord | None = None
        #: what the vision side did for this prompt, or ahead of it (``generate`` of newer transformers)
        self.seen: dict[str, Seen] = {}
        #: kinds of item whose features come from somewhere else
        self.unseen: list[str] = []
        for kind, output in (arguments.get("mm_encoder_outputs") or {}).items():
            if getattr(output, _SEEN, None) is not None:
                self.seen[kind] = getattr(output, _SEEN)
            elif output is not None:
                self.unseen.append(kind)
        self.cut: CutPrompt | None = None
        self.output: DecoderOutput | None = None


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
        self._now: ContextVar[_Forward | None] = ContextVar("accelerate_forward", default=None)
        self._seeing: ContextVar[Seen | None] = ContextVar("accelerate_seeing", default=None)
        #: record of a request whose images were encoded ahead of its forward
        self._ahead: ContextVar[recording.RequestRecord | None] = ContextVar("accelerate_ahead", default=None)
        self._signature = inspect.signature(model.forward)
        self._undo: list[Any] = []

    # -- on and off --------------------------------------------------------------------------------------------------

    def install(self) -> None:
        self._outer = self._wrap(self.model, "forward", self._forward)
        self._inner = self._wrap(self.family.language, "forward", self._decode)
        self._prepare_inputs = self._wrap(self.model, "prepare_inputs_for_generation", self._later_turn)
        for kind in _KINDS:
            if hasattr(self.model.model, f"get_{kind}_features"):
                self._watch(kind)
        self._undo += [handle.remove for handle in self.family.watch(self._encoded)]

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _wrap(self, module: nn.Module, name: str, wrapper: Any) -> Any:
        """Put ``wrapper`` in the place of a method, on this object only; returns what was there."""
        before, own = getattr(module, name), module.__dict__.get(name)

        @functools.wraps(before)  # generate reads signatures
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return wrapper(*args, **kwargs)

        setattr(module, name, wrapped)

        def undo() -> None:
            if own is None:
                delattr(module, name)
            else:  # e.g. accelerate's, of a model that is spread over devices
                setattr(module, name, own)

        self._undo.append(undo)
        return before

    # -- vision side -------------------------------------------------------------------------------------------------

    def _watch(self, kind: str) -> None:
        """Remember how the features of images (or videos) came about, with them and for the forward around."""
        name = f"get_{kind}_features"
        signature = inspect.signature(getattr(self.model.model, name))

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._seeing.get() is not None:  # videos of a family whose videos are encoded as images
                return before(*args, **kwargs)
            arguments = dict(signature.bind_partial(*args, **kwargs).arguments)
            seen = Seen({**arguments, **arguments.pop("kwargs", {})})
            now = self._now.get()
            request = self._request_ahead() if now is None else now.request
            token = self._seeing.set(seen)
            try:
                with recording.stage(request, "vision", self.model.device):
                    output = before(*args, **kwargs)
            finally:
                self._seeing.reset(token)
            if now is not None:
                now.seen[kind] = seen
            elif isinstance(output, ModelOutput):
                output[_SEEN] = seen
            return output

        before = self._wrap(self.model.model, name, watched)

    def _request_ahead(self) -> recording.RequestRecord | None:
        """The record of the request whose images and videos are being encoded before its forward."""
        request = self._ahead.get()
        if not recording.listens_to(request):  # none yet, or left behind by a request that came to nothing
            request = recording.new_request()
            self._ahead.set(request)
        return request

    def _encoded(self, encoded: Any) -> None:
        seen = self._seeing.get()
        if seen is not None:
            seen.encoded.append(encoded)

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
        now = _Forward(arguments)
        if now.seen:
            now.request = self._ahead.get()
        elif cache is None or not cache.get_seq_length():
            now.request = recording.new_request()
        self._ahead.set(None)
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

    def _prefill(self, now: _Forward, kwargs: dict[str, Any]) -> Any:
        embeds = kwargs["inputs_embeds"]
        with recording.stage(now.request, "compress", embeds.device):
            # a model over several devices gets these as the caller has them
            as_given = now.arguments.get("input_ids"), kwargs.get("attention_mask"), kwargs.get("position_ids")
            ids, mask, positions = moved(as_given, embeds.device)
            call = Call(ids, embeds, now.seen, now.arguments, self._wanted, self._on_views)
            items = self.family.items(call) if now.seen else []
            sequences = [self._sequence(item) for item in items]
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
                    layout=cut.layout,
                    request=request,
                    added=[cut.taken(part) for part in self.family.added(kwargs)],
                    next_position=cut.next_position,
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

    def _sequence(self, placed: PromptItem) -> VisualSequence:
        item = placed.item
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
    for placed, sequence, rows in zip(items, sequences, cut.rows, strict=True):
        item = placed.item
        request.samples[placed.sample].items.append(
            recording.ItemRecord(
                modality=item.modality,
                tokens_before=item.num_tokens,
                tokens_after=sequence.num_content,
                rows=rows,
                grid=item.grid if item.views is None else item.views.grid,
                owner=sequence.owner,
                positions=sequence.positions,
                kept=sequence.stands,
                info=sequence.info,
            )
        )
