"""LLaVA on Mistral (LLaVA-1.6 mistral)."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, MistralForCausalLM, MistralModel

from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaMistralConfig(MistralConfig):
    model_type = "llava_mistral"


class LlavaMistralModel(LlavaMetaModel, MistralModel):
    config_class = LlavaMistralConfig


class LlavaMistralForCausalLM(LlavaMetaForCausalLM, MistralForCausalLM):
    config_class = LlavaMistralConfig

    def __init__(self, config: LlavaMistralConfig):
        super(MistralForCausalLM, self).__init__(config)  # not MistralForCausalLM's own, which would build a decoder
        self.build(config, LlavaMistralModel)


AutoConfig.register("llava_mistral", LlavaMistralConfig, exist_ok=True)
AutoModelForCausalLM.register(LlavaMistralConfig, LlavaMistralForCausalLM, exist_ok=True)
