"""A pipeline on one model object of transformers: its wrappers, and what happens in a forward under them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from accelerate_methods.engine import recording
from accelerate_methods.engine.cache import check_cache, request_state
from accelerate_methods.engine.devices import moved
from accelerate_methods.engine.long_prompts import PromptFit, context_length, tell
from accelerate_methods.engine.loop import DecoderOutput, needs_loop, run_decoder
from accelerate_methods.engine.output_rows import IGNORED, OutputRows, as_the_caller_had_them, shifted, unshifted
from accelerate_methods.engine.prompt import PromptLayout
from accelerate_methods.engine.sequences import VisualSequence, compressed_sequence
from accelerate_methods.hosts.calls import (
    acts_on_text,
    check_visuals,
    refuse_base_model,
    refuse_embeddings,
    refuse_outputs,
)
from accelerate_methods.hosts.drafts import drafts_behind, expect_drafts, expect_new_tokens, in_two, refuse_drafts
from accelerate_methods.hosts.native.family import Call, Family, read_prompt
from accelerate_methods.hosts.native.prompt import CutPrompt, PromptItem, cut_prompt
from accelerate_methods.hosts.native.watching import Forward, VisionWatch
from accelerate_methods.hosts.native.wrapping import Wrappers
from accelerate_methods.hosts.questions import (
    asks,
    prompt_texts,
    question_reader,
    questions_of,
    signals_of_prompts,
)
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.stages.compress import ViewCompressMethod, VisualItem
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.signals import OF_PROMPT, resolve_signal

_REQUEST = "accelerate_request"  # attribute of a cache: the record of its request


class NativeAcceleration:
    """A pipeline on one model object.

    Attributes:
        adaptations: signal that a method asks for -> what this model gives instead.
        tokenizer: reads the question out of the prompt where the caller gives none; None: the caller has to.
    """

    tokenizer: Any = None

    def __init__(self, model: nn.Module, family: Family, pipeline: Pipeline):
        self.model, self.family, self.pipeline = model, family, pipeline
        available = family.available(pipeline)
        given = {name: resolve_signal(m, name, available) for m in pipeline.methods for name in m.signals}
        self.adaptations = {name: real for name, real in given.items() if name != real}
        self._wanted = frozenset(given.values())
        family.prepare(self._wanted)
        family.prepare_text(self._wanted, pipeline)
        method = pipeline.compress
        acts = isinstance(method, ViewCompressMethod) and not pipeline.loses_grid
        self._on_views = family.views & method.modalities if acts else frozenset()
        self._now: ContextVar[Forward | None] = ContextVar("accelerate_forward", default=None)
        #: attention mask that ``generate`` has just prepared for a forward
        self._generated_mask: ContextVar[Any] = ContextVar("accelerate_generated_mask", default=None)
        #: questions that ``generate`` was given
        self._questions: ContextVar[Any] = ContextVar("accelerate_questions", default=None)
        self._vision = VisionWatch(model, family, self._now, pipeline.encode)
        self._wrappers = Wrappers()
        self._signature = inspect.signature(model.forward)

    # -- on and off --------------------------------------------------------------------------------------------------

    def install(self) -> None:
        wrap = self._wrappers.wrap
        self._outer = wrap(self.model, "forward", self._forward)
        self._base = wrap(self.model.model, "forward", self._on_base)
        self._inner = wrap(self.family.language, "forward", self._decode)
        self._generate = wrap(self.model, "generate", self._generated)
        self._prepare_inputs = wrap(self.model, "prepare_inputs_for_generation", self._prepared)
        self._prepare_cache = wrap(self.model, "_prepare_cache_for_generation", self._caching)
        self._candidate_generator = wrap(self.model, "_get_candidate_generator", self._drafting)
        self._vision.install(self._wrappers)

    def remove(self) -> None:
        self._wrappers.remove()

    # -- generate ----------------------------------------------------------------------------------------------------

    def _generated(self, *args: Any, questions: Any = None, **kwargs: Any) -> Any:
        """In the place of ``model.generate``, which knows no ``questions``."""
        token = self._questions.set(questions)
        try:
            return self._generate(*args, **kwargs)
        finally:
            self._questions.reset(token)

    def _prepared(self, *args: Any, **kwargs: Any) -> Any:
        """In the place of ``model.prepare_inputs_for_generation``.

        Assisted decoding gives a whole chat again on top of the cache of its former turns.
        """
        cache, whole = kwargs.get("past_key_values"), kwargs.get("next_sequence_length") is None
        if kwargs.get("is_first_iteration") and whole and cache is not None and cache.get_seq_length():
            ids = args[0] if args else kwargs["input_ids"]
            kwargs["next_sequence_length"] = ids.shape[1] - cache.get_seq_length()
        prepared = self._prepare_inputs(*args, **kwargs)
        self._generated_mask.set(prepared.get("attention_mask"))
        return prepared

    def _caching(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """In the place of ``model._prepare_cache_for_generation``; the longest cache comes last."""
        prepared = self._prepare_cache(generation_config, model_kwargs, *args, **kwargs)
        expect_new_tokens(generation_config, model_kwargs, kwargs.get("max_cache_length", args[-1] if args else 0))
        return prepared

    def _drafting(self, **kwargs: Any) -> Any:
        """In the place of ``model._get_candidate_generator``, with which assisted decoding begins."""
        refuse_drafts(self.pipeline, kwargs.get("generation_config"))
        expect_drafts(kwargs["model_kwargs"].get("past_key_values"), kwargs["input_ids"].shape[1])
        return self._candidate_generator(**kwargs)

    # -- one forward -------------------------------------------------------------------------------------------------

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """In the place of ``model.forward``; ``questions`` as in ``generate``."""
        questions = kwargs.pop("questions", None)
        arguments = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        extra = arguments.pop("kwargs", {})
        arguments |= extra
        cache = arguments.get("past_key_values")
        if needs_loop(self.pipeline):
            check_cache(cache, self.pipeline.name)
        begins = cache is None or not cache.get_seq_length()
        drafts = drafts_behind(arguments) if begins and needs_loop(self.pipeline) else 0
        if drafts:
            return self._in_two_steps(arguments, drafts)
        now, ahead = Forward(arguments), self._vision.take_request()
        now.questions = self._questions.get() if questions is None else questions
        mask, generated = arguments.get("attention_mask"), self._generated_mask.get()
        now.generates = mask is not None and mask is generated
        self._generated_mask.set(None)
        if now.seen:
            now.request = ahead
        elif begins:
            now.request = recording.new_request()
        visuals = bool(now.seen) or any(v is not None for k, v in arguments.items() if k.startswith("pixel_values"))
        refuse_embeddings(self.pipeline, arguments, begins)
        if visuals:
            check_visuals(self.pipeline, arguments, begins)
        if needs_loop(self.pipeline):
            refuse_outputs(self.pipeline, arguments, self.model.config, self.family.language.config)
        if now.unseen and needs_loop(self.pipeline):
            raise MethodError(
                f"{self.pipeline.name}: the features of the {' and '.join(now.unseen)}s were computed before it was "
                "attached, by another model (which this one drafts for: attach a method to that one, too), or cut into "
                "pieces (prefill_chunk_size); give the pixels and the prompt as a whole."
            )
        token = self._now.set(now)
        try:
            if visuals and needs_loop(self.pipeline):
                return self._cut_forward(now, arguments, extra)
            return self._outer(*args, **kwargs)
        finally:
            self._now.reset(token)

    def _on_base(self, *args: Any, **kwargs: Any) -> Any:
        """In the place of ``model.model.forward``, which ``model.forward`` calls, and nobody else should."""
        if self._now.get() is None:
            given = inspect.signature(self._base).bind_partial(*args, **kwargs)
            refuse_base_model(self.pipeline, given.arguments)
        return self._base(*args, **kwargs)

    def _in_two_steps(self, arguments: dict[str, Any], drafts: int) -> Any:
        """A first call with drafts behind the prompt, as two calls."""
        prompt, later = in_two(arguments, drafts)
        self._generated_mask.set(prompt.get("attention_mask"))
        first = self._forward(**prompt)
        output = self._forward(**later)
        output.logits = torch.cat([first.logits[:, -1:], output.logits], dim=1)
        return output

    def _cut_forward(self, now: Forward, arguments: dict[str, Any], extra: dict[str, Any]) -> Any:
        """A forward whose prompt is cut; the loss is that of the rows that are left, and is computed here.

        Args:
            extra: those of the ``arguments`` that the loss gets too (``num_items_in_batch``, ``shift_labels`` ...).
        """
        asked, labels = arguments.get("return_dict"), arguments.get("labels")
        output = self._outer(**{**arguments, "labels": None, "return_dict": True})
        if labels is not None:
            shift_labels = extra.get("shift_labels")
            more = {} if shift_labels is None else {"shift_labels": self._shift_labels(shift_labels, now)}
            loss = self.model.loss_function(
                logits=output.logits,
                labels=now.in_rows(self._labels(labels, now)),
                vocab_size=output.logits.shape[-1],
                **{**extra, **more},
            )
            output = type(output)(**{**output, "loss": loss})  # anew: the loss comes first in a tuple
        return output if (self.model.config.return_dict if asked is None else asked) else output.to_tuple()

    @staticmethod
    def _labels(labels: Tensor, now: Forward) -> Tensor:
        """[B, L] labels of the uncompressed prompt -> [B, K] of the rows that are left; none in padding.

        Neither at the first row of a sample: what stands before it is padding, which predicts nothing.
        """
        left = now.output.labels(labels.to(now.cut.source.device).gather(1, now.cut.source))
        return left.masked_fill(~now.real | (now.real.cumsum(1) == 1), IGNORED)

    def _shift_labels(self, shift_labels: Tensor, now: Forward) -> Tensor:
        """[B, L] label behind each row of the uncompressed prompt -> [B, R] behind each row of the output."""
        source = now.cut.source if now.output.kept is None else now.cut.source.gather(1, now.output.kept)
        last = shift_labels.to(source.device).gather(1, source[:, -1:]).squeeze(1)  # padding is on the left
        return now.in_rows(shifted(self._labels(unshifted(shift_labels), now), now.real, last))

    def _decode(self, *args: Any, **kwargs: Any) -> Any:
        """In the place of the language model's ``forward``."""
        now = self._now.get()
        if args or now is None or kwargs.get("inputs_embeds") is None:
            return self._inner(*args, **kwargs)  # not called by the model that we are attached to
        cache = kwargs.get("past_key_values")
        if cache is None or not cache.get_seq_length():
            return self._prefill(now, kwargs)
        state = request_state(cache)
        request = getattr(cache, _REQUEST, None)
        if request is not None:
            request.decode_steps += 1
        with recording.stage(request, "decode", kwargs["inputs_embeds"].device):
            if state is None and not self.pipeline.acts_on_text:  # text alone so far
                return self._inner(**kwargs)
            # Several ids per token are coordinates, kept whatever was dropped: transformers says where tokens go on
            # (generate: behind the last one; forward: behind the largest, which may be that of a long video).
            # Without a mask to count by it counts the cache, which is shorter than the prompt; the loop knows better.
            positions = kwargs.get("position_ids")
            counted = kwargs.get("attention_mask") is not None or now.arguments.get("position_ids") is not None
            more = {"position_ids": positions} if counted and positions is not None and positions.ndim == 3 else {}
            embeds = kwargs["inputs_embeds"]
            # what is padding among the keys is known; a turn of several tokens may be padded itself
            mask = moved(kwargs.get("attention_mask"), embeds.device) if embeds.shape[1] > 1 else None
            return self._plain(self._run(kwargs, embeds, attention_mask=mask, request=request, **more))

    def _prefill(self, now: Forward, kwargs: dict[str, Any]) -> Any:
        embeds, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
        on_text = not now.seen and acts_on_text(self.pipeline, kwargs, embeds, now.arguments.get("position_ids"))
        if not now.seen and not (mask is None or (isinstance(mask, Tensor) and mask.shape == embeds.shape[:2])):
            return self._inner(**kwargs)  # text under a mask of its own kind: the model's affair, and not recorded
        acts = on_text or (bool(now.seen) and needs_loop(self.pipeline))
        with recording.stage(now.request, "compress", embeds.device):
            # a model over several devices gets these as the caller has them
            as_given = now.arguments.get("input_ids"), kwargs.get("attention_mask"), kwargs.get("position_ids")
            ids, mask, positions = moved(as_given, embeds.device)
            seen, host = read_prompt(now.seen, ids, mask, positions, embeds)
            call = Call(host.ids, embeds, seen, now.arguments, self._wanted, self._on_views)
            items = self.family.items(call) if now.seen else []
            self._tell(items, call, now.questions, mask)
            sequences = [self._sequence(found.item) for found in items]
            cut = now.cut = cut_prompt(
                embeds, mask, positions, items, sequences, self.pipeline.positions == "original", host
            )
            now.seen.clear()
        request = now.request
        fits = _fits(cut, self.family.language.config)
        tell(fits, self.model.config)
        if request is not None:
            _describe(request, items, sequences, cut, fits)
            request.started(len(self.family.language.layers))
        with recording.stage(request, "prefill", embeds.device):
            if acts:
                now.output = self._run(
                    kwargs,
                    cut.embeds,
                    attention_mask=cut.valid if cut.padded else None,
                    position_ids=cut.positions,
                    layout=self._layout(cut, kwargs),
                    request=request,
                )
                now.rows = self._rows(now)
                output = self._plain(now.output, now.rows)
            else:  # there is nothing to cut; packed prompts are as right as without a method
                output = self._inner(**kwargs)
        if request is not None and not request.layer_tokens:
            request.layer_tokens = [cut.layout.lengths] * len(self.family.language.layers)
        cache = output.past_key_values
        if cache is not None:
            setattr(cache, _REQUEST, request)
        return output

    def _tell(self, items: list[PromptItem], call: Call, questions: Any, mask: Tensor | None) -> None:
        """What the methods are told of the text of each prompt.

        Raises:
            MethodError: nobody says what the question is.
        """
        by_rows = OF_PROMPT & self._wanted
        if not items or not (by_rows or asks(self.pipeline, self._wanted)):
            return
        count = call.embeds.shape[0]
        visual = torch.zeros(call.embeds.shape[:2], dtype=torch.bool, device=call.embeds.device)
        for found in items:
            visual[found.sample, found.all_rows] = True
        real = torch.ones_like(visual) if mask is None else mask.bool()

        def rows() -> Iterator[tuple[Tensor, Tensor]]:
            for ids, here, keep in zip(call.ids, visual.cpu(), real.cpu(), strict=True):
                yield ids[keep], here[keep]

        given = questions_of(self.pipeline, self._wanted, questions, count, self.tokenizer, rows)
        of_prompt = signals_of_prompts(call.embeds, real & ~visual, by_rows)
        read = question_reader(self.pipeline, self._wanted, self.tokenizer, self.model.get_input_embeddings())
        texts = prompt_texts(given, of_prompt, self.family.text_tower, count, read)
        for found in items:
            texts[found.sample].tell(found.item)

    def _layout(self, cut: CutPrompt, kwargs: dict[str, Any]) -> PromptLayout:
        added = [cut.taken(part) for part in self.family.added(kwargs)]
        return dataclasses.replace(cut.layout, added=added, next_position=cut.next_position, full=cut.full)

    def _run(self, kwargs: dict[str, Any], embeds: Tensor, **more: Any) -> DecoderOutput:
        return run_decoder(
            self.family.language,
            self.pipeline,
            inputs_embeds=embeds,
            past_key_values=kwargs.get("past_key_values"),
            use_cache=kwargs.get("use_cache"),
            **more,
        )

    def _rows(self, now: Forward) -> OutputRows | None:
        """Where the rows that are left go; None: as the loop has them.

        Raises:
            MethodError: the caller wants logits at certain rows, and rows were dropped.
        """
        cut, dropped = now.cut, now.output.kept is not None or now.cut.layout.lengths != now.cut.dense
        if dropped and isinstance(now.arguments.get("logits_to_keep"), Tensor):
            raise MethodError(
                f"{self.pipeline.name} has dropped rows of the prompt: logits_to_keep cannot name rows by their "
                "numbers. Give how many of the last ones to keep."
            )
        if cut.given is None or now.generates:  # generate reads the last row, wherever the padding was
            return None
        return as_the_caller_had_them(now.real, cut.given)

    @staticmethod
    def _plain(output: DecoderOutput, rows: OutputRows | None = None) -> BaseModelOutputWithPast:
        """What the language model itself would return: some models hand on whatever they find."""
        hidden = output.last_hidden_state
        return BaseModelOutputWithPast(hidden if rows is None else rows.of_states(hidden), output.past_key_values)

    def _sequence(self, item: VisualItem) -> VisualSequence:
        item.signals = moved(item.signals, item.features.device)
        return compressed_sequence(item, self.pipeline.compress, self.family.project)


def _fits(cut: CutPrompt, config: Any) -> list[PromptFit]:
    """How the prompts fit into the positions for which the model was trained: transformers cuts none.

    Positions count, not tokens: those of several ids per token (M-RoPE) may be far below or above.
    """
    limit = context_length(config)
    fits = limit is None or cut.highest < limit  # or else how many do not is read from the device
    over = [[0, 0]] * len(cut.dense) if fits else cut.beyond(limit).tolist()
    return [
        PromptFit(tokens=length, limit=limit, untrained=untrained, over_dense=dense)
        for length, (untrained, dense) in zip(cut.layout.lengths, over, strict=True)
    ]


def _describe(
    request: recording.RequestRecord,
    items: list[PromptItem],
    sequences: list[VisualSequence],
    cut: CutPrompt,
    fits: list[PromptFit],
) -> None:
    request.samples = [
        recording.SampleRecord(
            dense_length=dense, length=fit.tokens, untrained=fit.untrained, over_dense=fit.over_dense, limit=fit.limit
        )
        for dense, fit in zip(cut.dense, fits, strict=True)
    ]
    for found, sequence, rows in zip(items, sequences, cut.rows, strict=True):
        record = recording.item_record(found.item, sequence, tokens_after=sequence.num_content, rows=rows)
        request.samples[found.sample].items.append(record)
