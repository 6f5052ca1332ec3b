"""Modules that other LLaVA trees have and this one has not: importing one says why, and what to use instead.

A finder at the very end of ``sys.meta_path`` knows exactly the names below. Whatever exists is found before it is
asked, and for every other name Python says what it always says.
"""

from __future__ import annotations

import sys
from typing import Any

_ATTACH = "methods attach to the plain model here: accelerate_methods.accelerate(model, {}) (docs/methods.md)"
_SUPPORTED = "load_pretrained_model of llava.model.builder loads LLaVA-1.5, 1.6, OneVision and Video checkpoints"

#: module -> why it is not here, and what is instead
REASONS: dict[str, str] = {
    "llava.data": "training data are no part of this tree, which is for inference",
    "llava.train": "this tree is for inference; train with LLaVA-NeXT's own scripts, the checkpoint then loads here",
    "llava.model.constants": f"Yi-VL's copy of llava.constants; Yi-VL checkpoints are not supported ({_SUPPORTED})",
    "llava.model.s2wrapper": "multi-scale (s2) vision towers are not supported",
    "llava.model.modeling_llama_pdrop": "a pruning method's patched copy of LLaMA; " + _ATTACH.format("<method>"),
    "llava.model.language_model.llava_llama_pdrop": "a pruning method's patched model; " + _ATTACH.format("<method>"),
    "llava.model.language_model.modelling_sparse_llama": (
        "a pruning method's patched copy of LLaMA; " + _ATTACH.format("<method>")
    ),
    "llava.model.language_model.modeling_qwen2": (
        "a patched copy of Qwen2; the plain classes are transformers', and " + _ATTACH.format("<method>")
    ),
}


class _Finder:
    """See the module."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name in REASONS:
            raise ModuleNotFoundError(f"{name} is not here: {REASONS[name]}. See docs/llava_names.md.", name=name)


def install() -> None:
    """Have the finder asked last, once per process."""
    if not any(getattr(finder, "__module__", None) == __name__ for finder in sys.meta_path):
        sys.meta_path.append(_Finder)
