"""The encode stage: between the blocks of the vision encoder."""

from __future__ import annotations

from accelerate_methods.stages.method import Method


class EncodeMethod(Method):
    """Acts between the blocks of the vision encoder (token merging inside the ViT)."""

    stage = "encode"
