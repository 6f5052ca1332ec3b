"""Signals: what a method may ask a host for, and what it is given in its place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate_methods.stages.errors import MethodError, UnknownNameError

if TYPE_CHECKING:
    from torch import Tensor

    from accelerate_methods.stages.method import Method

#: Everything a method may ask a host for, with the shape it gets. F frames/views, N visual tokens per frame. What comes
#: out of an encoder layer is taken in the layer whose output is the visual feature, and averaged over heads; for other
#: layers and another treatment of heads: :class:`Signal`. In a video everything is pooled as the features are; in
#: ``views.Views`` N is the number of patches.
SIGNALS = {
    "frame_features": "[F, G] one global feature per frame (SigLIP attention-pooling head output)",
    "pooling_attention": "[F, N] head-averaged attention of the pooling probe",
    "cls_attention": "[F, N] head-averaged attention of the CLS token (softmax over all tokens, CLS included)",
    "received_attention": "[F, N] attention a patch receives from all tokens, averaged over heads and queries",
    "key_states": "[F, N, d] head-averaged key states",
    "image_embeds": "[F, N, C] patches in the image-text space of CLIP (post_layernorm and visual_projection, float32)",
    "text_embeds": "[M, C] the question in that space, one row per 77 ids of it",
    "prompt_mean": "[D] mean embedding of the prompt's text tokens, as the language model gets them",
    "prompt_rows": "[L, D] embeddings of the prompt's text tokens, zeros in the rows of all others",
    "question_rows": "[M, D] the question's words (Method.words) as rows of the language model's embedding table",
    "patch_pixels": "[F, N, W] pixels in [0, 1] of each token, of the first of the frames that it holds",
    "encoder_tokens": "[F, N, C] tokens as they enter the projector, patches that make one averaged; if they are kept",
}
#: what compares images with text, for which a CLIP checkpoint with its text tower is needed
IMAGE_TEXT = frozenset({"image_embeds", "text_embeds"})
#: what every host gives, whatever its vision encoder; "encoder_tokens" those that keep them: a method does without
ANYWHERE = frozenset({"prompt_mean", "prompt_rows", "question_rows", "encoder_tokens"})
#: what is said of the text of a whole prompt
OF_PROMPT = frozenset({"prompt_mean", "prompt_rows"})
#: what can be said of a question alone
OF_QUESTION = frozenset({"text_embeds", "question_rows"})


#: those that are read in a layer of the vision encoder, with keys and queries of several heads
LAYER_SIGNALS = frozenset({"cls_attention", "received_attention", "key_states"})
HEADS = ("mean", "joined")


class Signal(str):
    """A signal of a certain encoder layer: ``Signal("key_states", layer="next", heads="joined")``.

    It is a string (here "key_states@next/joined"), and is declared, looked up and printed as any name is. A plain name
    is the same signal in the feature's layer with the mean over heads.

    Args:
        name: one of :data:`LAYER_SIGNALS`, or a whole such string.
        layer: "feature", the layer whose output is the visual feature; "next", the layer that this feature goes into
            (where the encoder ends with the feature, its own layer); a number, counted from 0, negative ones from the
            end; or a share in (0, 1) of the encoder's depth, rounded up: 0.375 of 24 layers is the ninth. Where some
            layers attend to windows only, a share goes on to the next one that sees whole frames.
        heads: "mean", averaged over heads; or "joined": queries and keys are not split, one head of the whole width
            with its own scale, key states [F, N, H*d].

    Raises:
        MethodError: a signal that is not of a layer, a layer or treatment that does not exist.
    """

    name: str
    layer: str | int | float
    heads: str

    def __new__(cls, name: str, layer: str | int | float = "feature", heads: str = "mean") -> Signal:
        if "@" in name:
            name, _, rest = name.partition("@")
            text, _, heads = rest.partition("/")
            heads = heads or "mean"
            layer = text if text.isalpha() else float(text) if "." in text else int(text)
        plain = layer == "feature" and heads == "mean"
        if not plain:
            _check_layer(name, layer, heads)
        own = super().__new__(cls, name if plain else f"{name}@{layer}" + ("" if heads == "mean" else f"/{heads}"))
        own.name, own.layer, own.heads = name, layer, heads
        return own


def _check_layer(name: str, layer: str | int | float, heads: str) -> None:
    if name not in LAYER_SIGNALS:
        raise UnknownNameError("signal of an encoder layer", name, LAYER_SIGNALS)
    if heads not in HEADS:
        raise UnknownNameError("treatment of heads", heads, HEADS)
    named = isinstance(layer, str) and layer in ("feature", "next")
    share = isinstance(layer, float) and 0 < layer < 1
    if not (named or share or (isinstance(layer, int) and not isinstance(layer, bool))):
        raise MethodError(f"layer {layer!r} of {name}: 'feature', 'next', a number, or a share of the depth in (0, 1).")


def resolve_signal(method: Method, name: str, available: frozenset[str]) -> str | None:
    """The signal that ``method`` gets where it asks for ``name``: itself, its substitute, or None.

    A substitute by a plain name serves in every layer.
    """
    asked, available = Signal(name), available | ANYWHERE
    if asked.name in available:
        return name
    substitute = method.substitutes.get(name, method.substitutes.get(asked.name))
    if substitute is None or Signal(substitute).name not in available:
        return None
    return substitute if "@" in substitute else str(Signal(substitute, asked.layer, asked.heads))


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
