"""Signals: what a method may ask a host for, and what it is given in its place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate_methods.stages.errors import MethodError

if TYPE_CHECKING:
    from torch import Tensor

    from accelerate_methods.stages.method import Method

#: Everything a method may ask a host for, with the shape it gets. F frames/views, N visual tokens per frame. What comes
#: out of an encoder layer is taken in the layer whose output is the visual feature. In a video everything is pooled as
#: the features are; in ``views.Views`` N is the number of patches.
SIGNALS = {
    "frame_features": "[F, G] one global feature per frame (SigLIP attention-pooling head output)",
    "pooling_attention": "[F, N] head-averaged attention of the pooling probe",
    "cls_attention": "[F, N] head-averaged attention of the CLS token (softmax over all tokens, CLS included)",
    "received_attention": "[F, N] attention a patch receives from all tokens, averaged over heads and queries",
    "key_states": "[F, N, d] head-averaged key states",
    "image_embeds": "[F, N, C] patches in the image-text space of CLIP (post_layernorm and visual_projection, float32)",
    "text_embeds": "[M, C] the question in that space, one row per 77 ids of it",
    "prompt_mean": "[D] mean embedding of the prompt's text tokens, as the language model gets them",
}
#: those of the prompt, which all images of a sample share
TEXT_SIGNALS = frozenset({"text_embeds", "prompt_mean"})


def resolve_signal(method: Method, name: str, available: frozenset[str]) -> str | None:
    """The signal that ``method`` gets where it asks for ``name``: itself, its substitute, or None."""
    if name in available:
        return name
    substitute = method.substitutes.get(name)
    return substitute if substitute in available else None


def missing_signals(method: Method | type[Method], available: frozenset[str]) -> list[str]:
    """Signals that ``method`` asks for and that neither they nor their substitutes are ``available``."""
    return sorted(name for name in method.signals if resolve_signal(method, name, available) is None)


def pick_signal(signals: dict[str, Tensor], names: tuple[str, ...], where: str) -> Tensor:
    """The first of ``names`` that is among ``signals``."""
    for name in names:
        if name in signals:
            return signals[name]
    have = ", ".join(sorted(signals)) or "none"
    wanted = " or ".join(repr(name) for name in names)
    raise MethodError(f"signal {wanted} was not provided for this {where} (provided: {have}).")
