"""Adapters from golden contracts to our implementation, one module per method."""

from tests.conformance.adapters import (
    base_models,
    base_text_image,
    dycoke,
    fastervlm,
    fastv,
    fastvid,
    prunevid,
    visionzip,
)

_MODULES = (base_text_image, base_models, fastv, fastvid, dycoke, prunevid, fastervlm, visionzip)

ADAPTERS = {key: adapter for module in _MODULES for key, adapter in module.ADAPTERS.items()}
TEXT_CHECKS = {key: check for module in _MODULES for key, check in getattr(module, "TEXT_CHECKS", {}).items()}
