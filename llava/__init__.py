"""A LLaVA-NeXT compatible tree (LLaVA-1.5, 1.6, OneVision, Video) for today's torch and transformers.

Importing the package alone costs nothing: torch, transformers and the video readers are loaded by the modules that
need them. Which names of the official trees and of the code built on them are here: docs/llava_names.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llava import left_out

__version__ = "0.1.0"

left_out.install()

if TYPE_CHECKING:
    from llava.model import LlavaLlamaForCausalLM as LlavaLlamaForCausalLM
else:

    def __getattr__(name: str):
        if name == "LlavaLlamaForCausalLM":
            from llava.model import LlavaLlamaForCausalLM

            return LlavaLlamaForCausalLM
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
