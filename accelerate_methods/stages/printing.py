"""How dataclasses that hold tensors are printed: shapes in the place of the numbers."""

from __future__ import annotations

import dataclasses
from typing import Any


class ShapesShown:
    """Base of a dataclass made with ``repr=False``: one line with the fields that are not at their defaults."""

    def __repr__(self) -> str:
        said = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if value is default or (isinstance(value, (str, int, bool, dict, list)) and value == default):
                continue
            said.append(f"{field.name}={summary(value)}")
        return f"{type(self).__name__}({', '.join(said)})"


def summary(value: Any) -> str:
    """A value in a few words: a tensor or array as ``float32[4, 196]``, what a container holds, else its ``repr``."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {summary(held)}" for key, held in value.items()) + "}"
    if isinstance(value, (list, tuple)) and (len(value) > 4 or any(hasattr(held, "shape") for held in value)):
        more = ", ..." if len(value) > 2 else ""
        return f"[{', '.join(map(summary, value[:2]))}{more}]" + (f" of {len(value)}" if more else "")
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return repr(value)
