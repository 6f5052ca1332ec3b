"""What lmms-eval reads at start-up: one model id per family and method, one per trained architecture, and ``served``.

Nothing heavy may be imported here.

lmms-eval loads all plugins in one try block: an import that fails here would take every other plugin along.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from accelerate_methods.registry import available
from accelerate_methods.registry.architectures import ARCHITECTURES
from accelerate_methods.registry.families import keys

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

#: key of our families -> id of the stock model whose prompts and inputs they reproduce ("auto": that of the
#: checkpoint's class)
FAMILIES = {key: declared[0].stock_model for key, declared in keys().items()}
#: those whose tasks ask in messages
CHAT = frozenset(key for key, declared in keys().items() if declared[0].chat)

#: keys of trained architectures, which are model ids themselves (with ``method=`` or ``config=``, or none)
TRAINED = frozenset(entry.key for entry in ARCHITECTURES)
#: model id of what a server answers (``models/served.py``)
SERVED = "served"
#: suffix of the model id that takes any method (``method=`` or ``config=``), or none
ANY_METHOD = "accelerated"


def model_ids() -> dict[str, tuple[str, str | None]]:
    """Model id -> (family, method); method None where the arguments choose it."""
    suffixes: dict[str, str | None] = {ANY_METHOD: None, **{name: name for name in available()}}
    families = [family for family in FAMILIES if family not in TRAINED]
    found = {f"{family}_{suffix}": (family, method) for family in families for suffix, method in suffixes.items()}
    return {**found, **{key: (key, None) for key in FAMILIES if key in TRAINED}}


def any_method(family: str) -> str:
    """The model id of a family that takes any method, or none."""
    return family if family in TRAINED else f"{family}_{ANY_METHOD}"


def manifests() -> list[ModelManifest]:
    """Entry point ``lmms_eval.models``. The class of an id is made when it is asked for, see ``models/__init__.py``.

    lmms-eval's own ``llama_vid``, which needs a clone of the official code, gives way to ours: plugins come last.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    made = []
    for name, (family, _) in model_ids().items():
        kind = "chat_class_path" if family in CHAT else "simple_class_path"
        made.append(ModelManifest(model_id=name, **{kind: f"{__package__}.models.{name}"}))
    made.append(ModelManifest(model_id=SERVED, chat_class_path=f"{__package__}.models.served.Served"))
    _list(made)
    return made


def _list(made: list[ModelManifest]) -> None:
    """Let ``lmms-eval models`` and its wizard show them, too: both read these dictionaries and not the manifests."""
    harness = sys.modules.get("lmms_eval.models")  # calls us while it is imported
    for manifest in made:
        kind = "SIMPLE" if manifest.chat_class_path is None else "CHAT_TEMPLATE"
        shown = getattr(harness, f"AVAILABLE_{kind}_MODELS", {})
        shown.setdefault(manifest.model_id, manifest.model_id)
