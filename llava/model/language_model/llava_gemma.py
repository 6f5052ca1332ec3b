"""LLaVA on Gemma."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from transformers import AutoConfig, AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM, GemmaModel

from accelerate_methods.engine.sequences import VisualSequence
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel
from llava.model.splice import Prompts, Spliced


class LlavaGemmaConfig(GemmaConfig):
    model_type = "llava_gemma"


class LlavaGemmaModel(LlavaMetaModel, GemmaModel):
    config_class = LlavaGemmaConfig


class LlavaGemmaForCausalLM(LlavaMetaForCausalLM, GemmaForCausalLM):
    config_class = LlavaGemmaConfig

    def __init__(self, config: LlavaGemmaConfig):
        super(GemmaForCausalLM, self).__init__(config)  # not GemmaForCausalLM's own, which would build a decoder
        self.build(config, LlavaGemmaModel)

    def embed(self, prompts: Prompts, sequences: Sequence[VisualSequence]) -> Spliced:
        # Gemma multiplies its inputs by sqrt(hidden size). transformers 4, with which such models were trained, did so
        # to whatever entered the decoder; transformers 5 does it in the embedding of words.
        scale = self.config.hidden_size**0.5
        scaled = [dataclasses.replace(sequence, tokens=sequence.tokens * scale) for sequence in sequences]
        return super().embed(prompts, scaled)


AutoConfig.register("llava_gemma", LlavaGemmaConfig, exist_ok=True)
AutoModelForCausalLM.register(LlavaGemmaConfig, LlavaGemmaForCausalLM, exist_ok=True)
