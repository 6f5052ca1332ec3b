"""Names, plug-ins, configs and combinations of methods. Listing names imports no method."""

from accelerate_methods.registry.names import available, get, method_class, register

__all__ = ["available", "get", "method_class", "register"]
