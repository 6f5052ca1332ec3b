"""An engine of vLLM that was told of compression, at its start: models that cannot be compressed, and the scheduler."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.config.ec_manager_config import EncoderCacheManagerConfig

from accelerate_methods.hosts.vllm import MODELS
from accelerate_methods.hosts.vllm.processing import configured
from accelerate_methods.hosts.vllm.spec import KEY, VARIABLE, merged, method_of
from accelerate_methods.stages.errors import MethodError

_ENCODER_CACHE = "accelerate_methods.hosts.vllm.encoder_budget.DenseEncoderBudget"


def configure(vllm_config: VllmConfig, architecture: str) -> None:
    """Nothing where the engine was told nothing.

    Raises:
        MethodError: a method for a model whose vision side is not known here: it would run dense and say nothing.
    """
    sources = configured(vllm_config.model_config)
    if all(source is None for source in sources):
        return
    if architecture in MODELS:
        if vllm_config.ec_manager_config.encoder_cache_manager_cls is None:
            vllm_config.ec_manager_config = EncoderCacheManagerConfig(encoder_cache_manager_cls=_ENCODER_CACHE)
        return
    if not vllm_config.model_config.is_multimodal_model:  # such as the draft model of another
        return
    method = method_of(merged(sources))
    if method is not None:
        raise MethodError(
            f"{method.name} cannot be served on {architecture}. Models that can: {', '.join(MODELS)}. Leave {KEY} and "
            f"{VARIABLE} out to run it without a method."
        )
