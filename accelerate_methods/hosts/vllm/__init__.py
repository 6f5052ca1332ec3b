"""Plugin for vLLM: its own models, with fewer visual tokens behind their vision side.

vLLM finds :func:`register` by the entry point ``vllm.general_plugins`` and calls it in each of its processes. The
models that it registers are vLLM's classes under vLLM's names, so checkpoints and requests stay as they are; where no
method is asked for, nothing is different (docs/serving.md). Importing this package does not import vLLM.

``spec`` says what is asked for, ``served`` makes the number of tokens exact, ``layouts`` and ``grids`` know it from
sizes, ``processing`` tells vLLM's front end, ``encoder_budget`` its scheduler; ``tower``, ``llava`` ... act in the
workers.
"""

from __future__ import annotations

import importlib
from typing import Any

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
    "Qwen3VLForConditionalGeneration": f"{_HERE}.qwen3_vl:CompressedQwen3VL",
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


class ConfigHook:
    """Entry of vLLM's table of what is done with an architecture's config, in front of the one that was there.

    vLLM asks it once, while it starts, of whatever model: the only place to learn of one that no method acts on.
    """

    def __init__(self, architecture: str, before: Any = None):
        self.architecture, self._before = architecture, before

    def verify_and_update_model_config(self, model_config: Any) -> None:
        if self._before is not None:
            self._before.verify_and_update_model_config(model_config)

    def verify_and_update_config(self, vllm_config: Any) -> None:
        if self._before is not None:
            self._before.verify_and_update_config(vllm_config)
        importlib.import_module(f"{_HERE}.configuring").configure(vllm_config, self.architecture)


def register() -> None:
    """Put the models of :data:`MODELS` into vLLM's registry; calling it again changes nothing.

    Raises:
        MethodError: see :func:`check_release`. vLLM does not start then.
    """
    check_release(importlib.import_module("vllm").__version__)
    registry = importlib.import_module("vllm.model_executor.models.registry").ModelRegistry
    for architecture, where in MODELS.items():
        registry.register_model(architecture, where)
    hooks = importlib.import_module("vllm.model_executor.models.config").MODELS_CONFIG_MAP
    for architecture in registry.get_supported_archs():
        before = hooks.get(architecture)
        if not isinstance(before, ConfigHook):
            hooks[architecture] = ConfigHook(architecture, before)
