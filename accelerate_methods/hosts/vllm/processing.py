"""vLLM's front end under a method: fewer placeholders per image or video, and the method sent along to the workers.

Two mixins, in front of a model's own ``ProcessingInfo`` and ``MultiModalProcessor``. Everything that can be wrong with
a method is found here, where an error is one of the start (what the engine is configured with) or HTTP 400 (what a
request says): in a worker it would end the engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageEmbeddingItems, VideoEmbeddingItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails
from vllm.multimodal.processing.context import InputProcessingContext

from accelerate_methods.hosts.vllm.layouts import Layout, rows_of
from accelerate_methods.hosts.vllm.spec import KEY, from_environment, merged, method_of, written
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
        return {key: value for key, value in found.items() if key != KEY}


class CompressedInfo:
    """Mixin in front of a model's ``ProcessingInfo``."""

    def __init__(self, ctx: InputProcessingContext) -> None:
        super().__init__(ContextWithoutKey(ctx.model_config, ctx.tokenizer))
        self._sources = configured(self.ctx.model_config)
        self._checked: set[Any] = set()
        self.method({})

    def facts(self) -> ModelFacts:
        """What the model offers to methods."""
        raise NotImplementedError

    def layout(self, modality: str, items: Any, index: int, processed: Any) -> Layout:
        """Of one item of a request.

        Args:
            items: vLLM's ``ModalityDataItems``.
            processed: ``MultiModalKwargsItem``, what transformers' processor has made of it.
        """
        raise NotImplementedError

    def check(self, method: Any) -> None:
        """What this model asks beyond :meth:`facts`."""

    def method(self, request: Mapping[str, Any]) -> Any:
        """The :class:`Served` of a request with these ``mm_processor_kwargs``, None for none.

        Raises:
            MethodError: a method, parameter or model that does not fit.
        """
        found = method_of(merged((*self._sources, request.get(KEY))))
        if found is not None and found not in self._checked:
            Pipeline((found,)).check(self.facts())
            self.check(found)
            self._checked.add(found)
        return found


class CompressedProcessor:
    """Mixin in front of a model's ``MultiModalProcessor``."""

    def _get_mm_hashes(self, inputs: Any) -> Any:
        # what the engine is configured with is not hashed by vLLM: caches may outlive or be shared between engines
        method = self.info.method(inputs.hf_processor_mm_kwargs)
        rest = _without_key(inputs.hf_processor_mm_kwargs)
        own = {} if method is None else {KEY: written(method).decode()}
        return super()._get_mm_hashes(dataclasses.replace(inputs, hf_processor_mm_kwargs={**rest, **own}))

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        method = self.info.method(hf_kwargs)
        out = super()._apply_hf_processor_main(mm_items=mm_items, hf_kwargs=_without_key(hf_kwargs))
        for modality, count in mm_items.get_all_counts().items():
            if method is None or modality not in method.modalities or not count:
                continue
            if isinstance(mm_items[modality], ImageEmbeddingItems | VideoEmbeddingItems):
                raise MethodError(
                    f"{method.name} cannot act on {modality} embeddings made elsewhere: it compresses what this model "
                    "encodes. Send pixels, or ask for no method."
                )
            text = torch.frombuffer(bytearray(written(method)), dtype=torch.uint8)
            out[FIELD + modality] = text.expand(count, -1).contiguous()
        return out

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        fields = super()._get_mm_fields_config(hf_inputs, _without_key(hf_processor_mm_kwargs))
        own = {
            FIELD + modality: MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
            for modality in ("image", "video")
            if FIELD + modality in hf_inputs
        }
        return {**fields, **own}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        method = self.info.method(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(
            mm_items=mm_items,
            hf_processor_mm_kwargs=_without_key(hf_processor_mm_kwargs),
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


def _without_key(kwargs: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in kwargs.items() if key != KEY}
