"""LLaVA on Mixtral."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, MixtralModel

from llava.model.checkpoint import share_weight_conversion
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaMixtralConfig(MixtralConfig):
    model_type = "llava_mixtral"


class LlavaMixtralModel(LlavaMetaModel, MixtralModel):
    config_class = LlavaMixtralConfig


class LlavaMixtralForCausalLM(LlavaMetaForCausalLM, MixtralForCausalLM):
    """For inference: the loss has no term that balances the experts."""

    config_class = LlavaMixtralConfig

    def __init__(self, config: LlavaMixtralConfig):
        super(MixtralForCausalLM, self).__init__(config)  # not MixtralForCausalLM's own, which would build a decoder
        self.build(config, LlavaMixtralModel)


share_weight_conversion("mixtral", "llava_mixtral")
AutoConfig.register("llava_mixtral", LlavaMixtralConfig, exist_ok=True)
AutoModelForCausalLM.register(LlavaMixtralConfig, LlavaMixtralForCausalLM, exist_ok=True)
