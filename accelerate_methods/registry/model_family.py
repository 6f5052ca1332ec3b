"""A model family: what a method finds there, and under which names its models are run."""

from __future__ import annotations

import dataclasses

BOTH_MODALITIES = frozenset({"image", "video"})
#: behind the vision side: where methods can act on any decoder
LATER_STAGES = frozenset({"compress", "prefill", "decode"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """A model family as methods and the harness see it.

    Attributes:
        name: in tables and errors.
        signals: what its vision encoder gives (``stages.signals``); modalities: kinds of item that a method can act on.
        stages: where methods can act.
        limits: why no more modalities, a sentence for errors.
        classes: classes of transformers that belong to it, and the ``module`` that defines them; empty for models of
            the llava tree, whose models are told apart when they are loaded.
        host: the native host's class, as "module:Class" or itself.
        key: its models in lmms-eval are ``<key>_<method>``; families may share one.
        stock_model: lmms-eval's own model id whose prompts and inputs are reproduced ("auto": that of the checkpoint's
            class); chat: whether tasks ask it in messages.
        tasks: what is evaluated unless the user says otherwise.
    """

    name: str
    signals: frozenset[str]
    modalities: frozenset[str] = BOTH_MODALITIES
    stages: frozenset[str] = LATER_STAGES
    limits: str = ""
    classes: tuple[str, ...] = ()
    module: str | tuple[str, ...] = ()
    host: str | type | None = None
    key: str = "hf"
    stock_model: str = "auto"
    chat: bool = True
    tasks: str = "videomme"
