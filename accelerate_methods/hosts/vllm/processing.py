"""vLLM's front end under a method: fewer placeholders per image or video, and the method sent along to the workers.

Two mixins, in front of a model's own ``ProcessingInfo`` and ``MultiModalProcessor``. Everything that can be wrong with
a method is found here, where an error is one of the start (what the engine is configured with) or HTTP 400 (what a
request says): in a worker it would end the engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageEmbeddingItems, VideoEmbeddingItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails
from vllm.multimodal.processing.context import InputProcessingContext

from accelerate_methods.hosts.vllm.layouts import Layout, rows_of
from accelerate_methods.hosts.vllm.prompts import WORDS, WORDS_FIELD, PromptWords, looks_at_prompt
from accelerate_methods.hosts.vllm.served import given_signals
from accelerate_methods.hosts.vllm.spec import KEY, from_environment, merged, method_of, sent, written
from accelerate_methods.registry.pipeline import ModelFacts, Pipeline
from accelerate_methods.stages.errors import MethodError

#: beginning of the keyword argument under which a worker finds the method of each item, as bytes
FIELD = "accelerate_method_"


def configured(model_config: Any) -> tuple[Any, ...]:
    """What the engine is configured with, from the environment, the checkpoint's config and the processor's arguments.

    All are None where nobody has spoken of compression.
    """
    multimodal = (getattr(model_config.multimodal_config, "mm_processor_kwargs", None) or {}).get(KEY)
    return from_environment(), getattr(model_config.hf_config, KEY, None), multimodal


class ContextWithoutKey(InputProcessingContext):
    """vLLM's context, whose arguments for transformers' processor leave our own out."""

    def get_merged_mm_kwargs(self, kwargs: Mapping[str, object], **rest: Any) -> dict[str, Any]:
        found = super().get_merged_mm_kwargs(kwargs, **rest)
        return _without_keys(found)


class CompressedInfo:
    """Mixin in front of a model's ``ProcessingInfo``."""

    def __init__(self, ctx: InputProcessingContext) -> None:
        super().__init__(ContextWithoutKey(ctx.model_config, ctx.tokenizer))
        self._sources = configured(self.ctx.model_config)
        self._checked: set[Any] = set()
        self.method({})

    def facts(self, method: Any) -> ModelFacts:
        """What the model offers to a method."""
        raise NotImplementedError

    def media_ids(self) -> set[int]:
        """Ids that stand for images and videos in a prompt."""
        names = [f"{kind}_token_{end}" for kind in ("image", "video") for end in ("id", "index")]
        return {number for name in names if (number := getattr(self.get_hf_config(), name, None)) is not None}

    def words_around(self, items: Any) -> list[int]:
        """Ids of the words that vLLM puts around the images and videos of a prompt (``MultiModalDataItems``)."""
        return []

    def layout(self, modality: str, items: Any, index: int, processed: Any) -> Layout:
        """Of one item of a request.

        Args:
            items: vLLM's ``ModalityDataItems``.
            processed: ``MultiModalKwargsItem``, what transformers' processor has made of it.
        """
        raise NotImplementedError

    def dense_rows(self, modality: str, items: Any, index: int, processed: Any) -> int:
        """Rows of one item without any method; arguments as of :meth:`layout`."""
        return self.layout(modality, items, index, processed).item.length

    def check(self, method: Any) -> None:
        """What this model asks beyond :meth:`facts`."""

    def method(self, request: Mapping[str, Any]) -> Any:
        """The :class:`Served` of a request with these ``mm_processor_kwargs``, None for none.

        Raises:
            MethodError: a method, parameter or model that does not fit.
        """
        found = method_of(merged((*self._sources, request.get(KEY))))
        if found is not None and found not in self._checked:
            Pipeline((found,)).check(self.facts(found))
            self.check(found)
            self._checked.add(found)
        return found


class CompressedProcessor:
    """Mixin in front of a model's ``MultiModalProcessor``."""

    _made_up = False  # whether the prompt is one of vLLM's own, which says nothing

    def get_dummy_mm_inputs(self, *args: Any, **kwargs: Any) -> Any:
        self._made_up = True
        try:
            return super().get_dummy_mm_inputs(*args, **kwargs)
        finally:
            self._made_up = False

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = {key: value for key, value in inputs.hf_processor_mm_kwargs.items() if key != WORDS}
        method = self.info.method(arguments)
        if method is not None and looks_at_prompt(method):
            arguments[WORDS] = self._words(method, inputs).written()
        return super().apply(dataclasses.replace(inputs, hf_processor_mm_kwargs=arguments), *args, **kwargs)

    def _words(self, method: Any, inputs: Any) -> PromptWords:
        info, wanted = self.info, given_signals(method, self.info.facts(method).signals)
        around = info.words_around(inputs.mm_data_items)
        words = PromptWords.of(method, wanted, inputs.prompt, info.media_ids(), around, info.get_tokenizer())
        if not self._made_up:
            words.check(method, wanted)
        return words

    def _get_mm_hashes(self, inputs: Any) -> Any:
        # what the engine is configured with is not hashed by vLLM: caches may outlive or be shared between engines
        arguments = inputs.hf_processor_mm_kwargs
        method = self.info.method(arguments)
        own = {} if method is None else {**_keys(arguments), KEY: written(method).decode()}
        return super()._get_mm_hashes(
            dataclasses.replace(inputs, hf_processor_mm_kwargs={**_without_keys(arguments), **own})
        )

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Any) -> Mapping[str, object]:
        found = super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached)
        return {**found, **_keys(inputs.hf_processor_mm_kwargs)}  # some models leave what they do not know out

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        method = self.info.method(hf_kwargs)
        out = super()._apply_hf_processor_main(mm_items=mm_items, hf_kwargs=_without_keys(hf_kwargs))
        for modality, count in mm_items.get_all_counts().items():
            if method is None or modality not in method.modalities or not count:
                continue
            if isinstance(mm_items[modality], ImageEmbeddingItems | VideoEmbeddingItems):
                raise MethodError(
                    f"{method.name} cannot act on {modality} embeddings made elsewhere: it compresses what this model "
                    "encodes. Send pixels, or ask for no method."
                )
            rows = [self.info.dense_rows(modality, mm_items[modality], i, _Single(out, i)) for i in range(count)]
            out[FIELD + modality] = torch.stack([as_tensor(sent(method, dense)) for dense in rows])
            if WORDS in hf_kwargs:
                words = as_tensor(hf_kwargs[WORDS].encode())
                out[WORDS_FIELD + modality] = words.expand(count, -1).contiguous()
        return out

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        fields = super()._get_mm_fields_config(hf_inputs, _without_keys(hf_processor_mm_kwargs))
        own = {
            field + modality: MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
            for modality in ("image", "video")
            for field in (FIELD, WORDS_FIELD)
            if field + modality in hf_inputs
        }
        return {**fields, **own}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        method = self.info.method(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(
            mm_items=mm_items,
            hf_processor_mm_kwargs=_without_keys(hf_processor_mm_kwargs),
            out_mm_kwargs=out_mm_kwargs,
        )
        if method is None:
            return updates
        return [
            self._shortened(update, method, mm_items, out_mm_kwargs) if update.modality in method.modalities else update
            for update in updates
        ]

    def _shortened(self, update: Any, method: Any, mm_items: Any, out_mm_kwargs: Any) -> PromptReplacement:
        """A replacement with as many placeholders as the method leaves."""

        def replacement(index: int) -> Any:
            full = update.replacement(index) if callable(update.replacement) else update.replacement
            modality = update.modality
            layout = self.info.layout(modality, mm_items[modality], index, out_mm_kwargs[modality][index])
            return self._replaced(full, rows_of(method, layout), layout, method)

        return PromptReplacement(modality=update.modality, target=update.target, replacement=replacement)

    def _replaced(self, full: Any, rows: int, layout: Layout, method: Any) -> Any:
        """What stands in the prompt for an item of ``rows`` rows, in the place of ``full``."""
        if isinstance(full, PromptUpdateDetails):
            raise MethodError(f"{method.name}: this model writes more than placeholders for an item.")
        return full[:1] * rows


class _Single:
    """One item of what transformers' processor has made of several, read as vLLM's ``MultiModalKwargsItem``."""

    def __init__(self, made: Mapping[str, Any], index: int):
        self._made, self._index = made, index

    def __getitem__(self, key: str) -> Any:
        return SimpleNamespace(data=self._made[key][self._index])


def with_runs(full: Any, count: int) -> PromptUpdateDetails:
    """A replacement of placeholders and words around them, of whose runs of placeholders ``count`` each are left."""
    is_media = full.is_embed(full.full).tolist()
    token = next(word for word, media in zip(full.full, is_media, strict=True) if media)
    out: list[int] = []
    for index, (word, media) in enumerate(zip(full.full, is_media, strict=True)):
        if not media:
            out.append(word)
        elif not index or not is_media[index - 1]:
            out += [token] * count
    return PromptUpdateDetails.select_token_id(out, token)


def as_tensor(text: bytes) -> Tensor:
    """As vLLM carries fields of an item."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def as_bytes(field: Tensor) -> bytes:
    """What :func:`as_tensor` was given."""
    return field.numpy().tobytes()


def _keys(kwargs: Mapping[str, object]) -> dict[str, object]:
    return {key: kwargs[key] for key in (KEY, WORDS) if key in kwargs}


def _without_keys(kwargs: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in kwargs.items() if key not in (KEY, WORDS)}
