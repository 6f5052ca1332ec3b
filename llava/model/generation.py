"""``forward`` and ``generate`` of a causal LM with images: what happens around encode, compress and embed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, ClassVar, TypedDict, Unpack

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from accelerate_methods.engine import recording
from accelerate_methods.engine.devices import computes_on, moved
from accelerate_methods.engine.eviction import expect_drafts_on
from accelerate_methods.engine.long_prompts import PromptFit, tell
from accelerate_methods.engine.output_rows import OutputRows, on_the_right, real_rows
from accelerate_methods.engine.prompt import PromptLayout, goes_on
from accelerate_methods.engine.sequences import VisualSequence
from accelerate_methods.hosts.calls import PACKING, refuse_embeddings
from accelerate_methods.hosts.drafts import expect_new_tokens, refuse_drafts
from accelerate_methods.stages.compress import VisualItem
from accelerate_methods.stages.errors import MethodError
from llava.model.context import check_text, fits_of
from llava.model.splice import Prompts, Spliced, splice
from llava.model.targets import Targets
from llava.model.vision import brings_images, has_images

_VISUAL = ("images", "image_sizes", "modalities", "questions")


class ForwardArguments(TypedDict, total=False):
    """What ``forward`` takes beside the arguments of every causal LM.

    ``images``, ``image_sizes``, ``modalities``, ``questions``: as in ``generate``. ``return_dict=False`` gives a tuple;
    ``dpo_forward`` gives (logits, labels). ``num_items_in_batch`` and ``shift_labels`` (the label behind each id) go to
    the loss. ``layout`` and ``request`` travel from ``generate`` to the decoder loop and the recorder. Anything else
    goes to the decoder.
    """

    images: Any
    image_sizes: Any
    modalities: str | list[str]
    questions: list[str] | None
    use_cache: bool | None
    output_attentions: bool | None
    output_hidden_states: bool | None
    return_dict: bool | None
    dpo_forward: bool
    num_items_in_batch: int | Tensor | None
    shift_labels: Tensor | None
    cache_position: Tensor | None
    layout: PromptLayout | None
    request: recording.RequestRecord | None


class MultimodalGeneration:
    """Mixin in front of a transformers causal LM whose ``prepare_multimodal`` makes embeddings of images and text."""

    #: pipeline attached to this object; an instance attribute, set and removed by the host
    acceleration: Any = None
    #: whether the decoder itself wants to know where images and videos stand, also without a method
    decoder_reads_layout: ClassVar[bool] = False
    #: more arguments of ``forward`` and ``generate`` that an architecture's vision side reads (``Prompts.own``)
    visual_arguments: ClassVar[tuple[str, ...]] = ()
    #: the checkpoint's, for architectures that read the question out of the prompt; set by ``load_pretrained_model``
    prompt_tokenizer: Any = None
    #: modules beside tower and projector that 8-bit and 4-bit loading leaves as they are
    unquantised: ClassVar[tuple[str, ...]] = ()
    #: whether the embedding may keep rows that the tokenizer has no token for
    spare_vocabulary: ClassVar[bool] = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[ForwardArguments],
    ):
        """Causal LM over the expanded sequence; ``images`` are spliced in when ``input_ids`` hold placeholders.

        With a method attached, the logits are those of the rows that the last layer still had, and labels go along.
        Padding stands where it stands without a method.

        Raises:
            ValueError: placeholders and images do not match. In training (in training mode, or with ``labels``) a
                sample without a placeholder may bring a dummy image, which is skipped.
            MethodError: a prompt of embeddings, or states of the layers, while a method is attached.
        """
        visual = {name: kwargs.pop(name) for name in (*_VISUAL, *self.visual_arguments) if name in kwargs}
        layout, request = kwargs.pop("layout", None), kwargs.pop("request", None)
        dpo_forward, return_dict = kwargs.pop("dpo_forward", False), kwargs.pop("return_dict", None)
        targets = Targets(labels, kwargs.pop("shift_labels", None), kwargs.pop("num_items_in_batch", None))
        kwargs.pop("cache_position", None)
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.get(name, ...) is None:
                del kwargs[name]
        decoding = past_key_values is not None and past_key_values.get_seq_length() > 0
        spliced: Spliced | None = None
        if self.acceleration is not None and layout is None:
            refuse_embeddings(self.acceleration.pipeline, {"inputs_embeds": inputs_embeds}, begins=not decoding)
        if inputs_embeds is not None and layout is None and not decoding and has_images(visual.get("images")):
            raise ValueError("images need input_ids: no placeholder in embeddings says where they stand.")
        if inputs_embeds is None and brings_images(input_ids, visual.get("images"), decoding):
            request = request or recording.new_request()
            self._check_text_side(attention_mask, position_ids, kwargs)
            spliced = self.prepare_multimodal(
                input_ids, attention_mask, targets.of_ids, **visual, request=request,
                padding_side="left" if self._cuts_inside() else None,
                dummies=self.training or labels is not None,
            )  # fmt: skip
            targets = targets.spliced(spliced, attention_mask)
            inputs_embeds, input_ids = spliced.inputs_embeds, None
            attention_mask = spliced.mask.long() if len(set(spliced.lengths)) > 1 else None
            position_ids = spliced.position_ids if self._gapped() or attention_mask is not None else None
            layout = spliced.layout
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
        if self.acceleration is not None:
            kwargs |= {"pipeline": self.acceleration.pipeline, "layout": layout, "request": request}
        elif self.decoder_reads_layout:
            kwargs |= {"layout": layout, "request": request}
        tokens = inputs_embeds if inputs_embeds is not None else input_ids
        if input_ids is not None and not decoding:
            check_text(input_ids, attention_mask, self.config)
        layers = self.config.num_hidden_layers
        if request is not None and not decoding:
            request.started(layers)
        with _llm_stage(request, tokens, decoding):
            outputs = self.model(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)
            hidden = outputs.last_hidden_state
            if spliced is not None:
                rows = self._output_rows(spliced, outputs, logits_to_keep)
                hidden = hidden if rows is None else rows.of_states(hidden)
                targets = targets.of_output(outputs, spliced.mask, rows)
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            # back to the first device, also so that the time of this stage covers the work on all of them
            logits = moved(self.lm_head(hidden[:, kept]), tokens.device)
        if request is not None and not decoding and not request.layer_tokens:  # the model's own forward: no layer cuts
            request.layer_tokens = [[sample.length for sample in request.samples]] * layers
        if dpo_forward:
            return logits, targets.labels
        result = CausalLMOutputWithPast(
            loss=targets.loss(self.loss_function, logits),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=getattr(outputs, "hidden_states", None),
            attentions=getattr(outputs, "attentions", None),
        )
        return result if return_dict is None or return_dict else result.to_tuple()

    def _gapped(self) -> bool:
        return self.acceleration is not None and self.acceleration.pipeline.positions == "original"

    def _cuts_inside(self) -> bool:
        """Whether the sequence gets shorter between decoder layers."""
        return self.acceleration is not None and bool(self.acceleration.pipeline.prefills)

    def _check_text_side(self, mask: Tensor | None, positions: Tensor | None, kwargs: dict[str, Any]) -> None:
        """What is beside the ids of a prompt with images: one row of the batch is one prompt."""
        error = ValueError if self.acceleration is None else MethodError
        if mask is not None and mask.ndim != 2:
            raise error(f"prompts with images need a 2-D attention_mask of their ids, got {mask.ndim}-D.")
        if any(kwargs.get(name) is not None for name in PACKING) or not goes_on(positions, mask):
            raise error(
                "prompts with images cannot be packed (position_ids that jump or start again, cu_seq_lens): give each "
                "prompt a row of the batch, with an attention_mask."
            )

    def _output_rows(self, spliced: Spliced, outputs: Any, logits_to_keep: int | Tensor) -> OutputRows | None:
        """Where the rows of the decoder's output go so that padding is on the side of the config; None: they are there.

        Raises:
            MethodError: the caller wants logits at certain rows, and rows were dropped.
        """
        kept = getattr(outputs, "kept", None)
        if isinstance(logits_to_keep, Tensor) and (kept is not None or spliced.shortened):
            raise MethodError(
                f"{self.acceleration.pipeline.name} has dropped rows of the prompt: logits_to_keep cannot name rows by "
                "their numbers. Give how many of the last ones to keep."
            )
        if not self._cuts_inside() or self.padding_side == "left" or len(set(spliced.lengths)) == 1:
            return None
        return on_the_right(real_rows(outputs, spliced.mask))

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Any = None,
        image_sizes: Any = None,
        modalities: str | list[str] = ("image",),
        questions: list[str] | None = None,
        **kwargs: Any,
    ):
        """transformers' ``generate``; returns new tokens only, also for text-only prompts.

        ``inputs`` (or ``input_ids``) [B, n] may be padded on either side if ``attention_mask`` says so; samples of
        different length are re-padded on the left, so that a batch gives the answers of its samples one by one.

        Args:
            images: [N, 3, S, S], or a list / 5-D tensor of images [3, S, S] or [V, 3, S, S] and videos [T, 3, S, S],
                in the order of the placeholders of all prompts.
            image_sizes: (width, height) of each, for any-resolution images.
            modalities: "image" or "video" for each, or one for all.
            questions: what is asked, one text per prompt, for a method that looks at it.
        """
        if kwargs.get("inputs_embeds") is not None:
            raise NotImplementedError("`inputs_embeds` is not supported; pass input ids and images.")
        kwargs.pop("inputs_embeds", None)
        kwargs.pop("position_ids", None)
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        if inputs is None:
            raise ValueError("generate needs input ids: pass them first, as inputs= or as input_ids=.")
        if kwargs.get("use_cache") is False:
            # transformers would feed only the newest token to the second step: the prompt exists as embeddings alone
            raise ValueError("generate needs the KV cache (use_cache=False is not possible with images as embeddings).")
        self._check_how(kwargs)
        own = {name: kwargs.pop(name) for name in self.visual_arguments if name in kwargs}
        attention_mask = kwargs.pop("attention_mask", None)
        request = recording.new_request()
        if has_images(images):
            spliced = self.prepare_multimodal(
                inputs, attention_mask, None, images, modalities, image_sizes,
                padding_side="left", request=request, questions=questions, **own,
            )  # fmt: skip
        else:
            spliced = self._text_only(inputs, attention_mask, request)
        if self.acceleration is not None or spliced.update is not None:
            kwargs["layout"] = spliced.layout
        if request is not None:
            kwargs["request"] = request
        beginning = self.begin(spliced, request)
        if beginning.get("past_key_values") is not None and kwargs.get("cache_implementation") is not None:
            raise ValueError(
                f"{type(self).__name__} makes the cache of its prompts itself: leave cache_implementation out."
            )
        return super().generate(**beginning, **kwargs)

    def _check_how(self, kwargs: dict[str, Any]) -> None:
        """ValueError if transformers would take parts of the prompt from its ids: here it has embeddings alone."""

        def asked(name: str) -> Any:
            return kwargs.get(name, getattr(kwargs.get("generation_config") or self.generation_config, name, None))

        if asked("prefill_chunk_size") is not None:
            raise ValueError("prefill_chunk_size is not possible: the prompt is read as a whole, as embeddings.")
        if asked("guidance_scale") not in (None, 1) and kwargs.get("negative_prompt_ids") is None:
            raise ValueError(
                "guidance_scale needs negative_prompt_ids here: the prompt exists as embeddings alone, of which "
                "transformers cannot take the last token for the unconditional answer."
            )

    def _text_only(self, inputs: Tensor, mask: Tensor | None, request: recording.RequestRecord | None) -> Spliced:
        embed = self.get_model().embed_tokens
        device = computes_on(embed)
        mask = None if mask is None else mask.to(device)
        spliced = splice(inputs.to(device), mask, None, [], embed, original_positions=False, padding_side="left")
        fits = self.told_fits(spliced, Prompts(inputs), [])
        if request is not None:
            describe(request, [], [], spliced, fits)
        return spliced

    def told_fits(self, spliced: Spliced, prompts: Prompts, items: Sequence[VisualItem]) -> list[PromptFit]:
        """How the prompts fit into the model's context; the user is told of those that do not."""
        fits = fits_of(spliced, prompts, items, self.config)
        tell(fits, self.config)
        return fits

    def begin(self, spliced: Spliced, request: recording.RequestRecord | None) -> dict[str, Any]:
        """What transformers' ``generate`` begins with: the prompts. An architecture that does not keep all of a prompt
        in its cache may read it here and give what is left to be read, and ``past_key_values``."""
        return {
            "inputs_embeds": spliced.inputs_embeds,
            "attention_mask": spliced.mask.long(),
            "position_ids": spliced.position_ids,
        }

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any):
        prepared = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if self.acceleration is not None:
            expect_new_tokens(generation_config, model_kwargs, kwargs.get("max_cache_length", args[-1] if args else 0))
        return prepared

    def _get_candidate_generator(self, **kwargs: Any) -> Any:
        """Assisted decoding begins.

        Raises:
            MethodError: it cannot give the answer of greedy decoding with the method that is attached.
            NotImplementedError: a draft model; with a method attached a MethodError.
        """
        if self.acceleration is not None:
            refuse_drafts(self.acceleration.pipeline, kwargs.get("generation_config"))
            expect_drafts_on(kwargs["model_kwargs"].get("past_key_values"))
        early_exit = getattr(kwargs.get("generation_config"), "assistant_early_exit", None)
        if kwargs.get("assistant_model") is not None or early_exit is not None:
            raise (NotImplementedError if self.acceleration is None else MethodError)(
                "a draft model (assistant_model, assistant_early_exit) is not possible with this tree: it would be "
                "given this model's embeddings of the prompt. Use prompt_lookup_num_tokens, or transformers' own model."
            )
        # There is one sample, which is not padded; transformers (5.17) would cut its mask to as many columns as there
        # are ids, and the ids are the new tokens alone.
        kwargs["model_kwargs"].pop("attention_mask", None)
        return super()._get_candidate_generator(**kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, layout: PromptLayout | None = None,
        request: recording.RequestRecord | None = None, **kwargs: Any,
    ):  # fmt: skip
        # transformers looks for ``inputs_embeds`` in this signature before it accepts embeddings in generate, and for
        # whatever else generate is given
        more = {name: kwargs.pop(name, None) for name in ("images", "image_sizes")}
        more |= {"layout": layout, "request": request}
        prepared = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        return {**prepared, **{name: value for name, value in more.items() if value is not None}}


@contextlib.contextmanager
def _llm_stage(request: recording.RequestRecord | None, tokens: Tensor, decoding: bool) -> Iterator[None]:
    if request is None:
        yield
        return
    request.decode_steps += decoding
    with request.span("decode" if decoding else "prefill", tokens.device):
        yield


def describe(
    request: recording.RequestRecord,
    items: Sequence[VisualItem],
    sequences: Sequence[VisualSequence],
    spliced: Spliced,
    fits: Sequence[PromptFit],
) -> None:
    """Fill the record of a request from what was spliced."""
    for numbers, spans, length, dense, fit in zip(
        spliced.items, spliced.spans, spliced.lengths, spliced.dense_lengths, fits, strict=True
    ):
        shrunk = sum((items[n].full_length or items[n].length) - items[n].length for n in numbers)
        sample = recording.SampleRecord(
            dense_length=min(dense + shrunk, spliced.max_length or dense + shrunk),
            length=length,
            cut=fit.cut,
            untrained=fit.untrained,
            over_dense=fit.over_dense,
            limit=fit.limit,
        )
        for n, span in zip_longest(numbers, spans):  # a prompt that was cut may have lost its last items
            start, rows = (0, 0) if span is None else (span.start, span.length)
            left = sequences[n].first(rows)
            sample.items.append(recording.item_record(items[n], left, tokens_after=left.num_content, start=start))
        request.samples.append(sample)
