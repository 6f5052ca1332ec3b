"""Adapters from golden contracts to our implementation, one module per method."""

from . import base_models, base_text_image, fastvid

_MODULES = (base_text_image, base_models, fastvid)

ADAPTERS = {key: adapter for module in _MODULES for key, adapter in module.ADAPTERS.items()}
TEXT_CHECKS = {key: check for module in _MODULES for key, check in getattr(module, "TEXT_CHECKS", {}).items()}
