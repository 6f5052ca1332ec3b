"""Plugin for vLLM: its own models, with fewer visual tokens behind their vision side.

vLLM finds :func:`register` by the entry point ``vllm.general_plugins`` and calls it in each of its processes. The
models that it registers are vLLM's classes under vLLM's names, so checkpoints and requests stay as they are; where no
method is asked for, nothing is different (docs/serving.md). Importing this package does not import vLLM.

``spec`` says what is asked for, ``served`` makes the number of tokens exact, ``layouts`` and ``grids`` know it from
sizes, ``processing`` tells vLLM's front end, ``tower``, ``llava`` ... act in the workers.
"""

from __future__ import annotations

import importlib

from accelerate_methods.stages.errors import MethodError

#: releases of vLLM (major.minor) whose inner interfaces these models are written for
RELEASES = ("0.32", "0.33")
_HERE = "accelerate_methods.hosts.vllm"
#: architecture in a checkpoint's config -> "module:class", imported where vLLM loads the model
MODELS = {
    "LlavaForConditionalGeneration": f"{_HERE}.llava:CompressedLlava",
    "LlavaNextForConditionalGeneration": f"{_HERE}.llava:CompressedLlavaNext",
    "LlavaOnevisionForConditionalGeneration": f"{_HERE}.llava_onevision:CompressedLlavaOnevision",
    "InternVLForConditionalGeneration": f"{_HERE}.internvl:CompressedInternVL",
    "Qwen2VLForConditionalGeneration": f"{_HERE}.qwen_vl:CompressedQwen2VL",
    "Qwen2_5_VLForConditionalGeneration": f"{_HERE}.qwen_vl:CompressedQwen25VL",
    "Qwen3VLForConditionalGeneration": f"{_HERE}.qwen3_vl:DenseQwen3VL",
}


def check_release(version: str) -> None:
    """
    Raises:
        MethodError: a release of vLLM that the plugin is not written for.
    """
    if ".".join(version.split(".")[:2]) not in RELEASES:
        raise MethodError(
            f"mllm-accelerate serves with vLLM {' and '.join(RELEASES)}; this is vLLM {version}, whose inner "
            "interfaces may differ. Install one of those, or set VLLM_PLUGINS='' to run vLLM without the plugin."
        )


def register() -> None:
    """Put the models of :data:`MODELS` into vLLM's registry; calling it again changes nothing."""
    check_release(importlib.import_module("vllm").__version__)
    registry = importlib.import_module("vllm.model_executor.models.registry").ModelRegistry
    for architecture, where in MODELS.items():
        registry.register_model(architecture, where)
