"""Qwen3-VL in vLLM: runs as vLLM has it, and says that no method is served there yet.

Its prompts have a timestamp before every frame of a video, so placeholders would have to be counted per frame, and its
language model takes features at several layers. Until both are handled a method is refused, not left out in silence.
"""

from __future__ import annotations

from vllm.model_executor.models import qwen3_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from accelerate_methods.hosts.vllm.processing import CompressedInfo, CompressedProcessor
from accelerate_methods.hosts.vllm.served import Served
from accelerate_methods.registry import families
from accelerate_methods.registry.pipeline import ModelFacts
from accelerate_methods.stages.errors import MethodError


class DenseQwen3VLInfo(CompressedInfo, qwen3_vl.Qwen3VLProcessingInfo):
    def facts(self) -> ModelFacts:
        about = families.QWEN_VL
        return ModelFacts(about.name, frozenset({"compress"}), about.signals, about.modalities, layers=1)

    def check(self, method: Served) -> None:
        raise MethodError(
            f"{method.name} cannot be served on Qwen3-VL yet: its videos are laid out frame by frame with text in "
            "between. Qwen2-VL and Qwen2.5-VL are served; under transformers so is Qwen3-VL."
        )


class DenseQwen3VLProcessor(CompressedProcessor, qwen3_vl.Qwen3VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    DenseQwen3VLProcessor, info=DenseQwen3VLInfo, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder
)
class DenseQwen3VL(qwen3_vl.Qwen3VLForConditionalGeneration):
    pass
