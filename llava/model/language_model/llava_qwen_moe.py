"""LLaVA on Qwen1.5-MoE / Qwen2-MoE."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen2MoeModel

from llava.model.checkpoint import share_weight_conversion
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaQwenMoeConfig(Qwen2MoeConfig):
    model_type = "llava_qwen_moe"


class LlavaQwenMoeModel(LlavaMetaModel, Qwen2MoeModel):
    config_class = LlavaQwenMoeConfig


class LlavaQwenMoeForCausalLM(LlavaMetaForCausalLM, Qwen2MoeForCausalLM):
    """For inference: the loss has no term that balances the experts."""

    config_class = LlavaQwenMoeConfig

    def __init__(self, config: LlavaQwenMoeConfig):
        super(Qwen2MoeForCausalLM, self).__init__(config)  # not Qwen2MoeForCausalLM's own, which would build a decoder
        self.build(config, LlavaQwenMoeModel)


share_weight_conversion("qwen2_moe", "llava_qwen_moe")
AutoConfig.register("llava_qwen_moe", LlavaQwenMoeConfig, exist_ok=True)
AutoModelForCausalLM.register(LlavaQwenMoeConfig, LlavaQwenMoeForCausalLM, exist_ok=True)
