"""What a comparison runs; the language of settings is that of ``accelerate_methods``."""

from accelerate_methods.settings import Setting, has_budget, settings_of

__all__ = ["Setting", "has_budget", "settings_of"]
