"""Model classes by model id: ``lmms_eval_accelerate.models.llava_onevision_fastvid`` is made on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate_methods.stages.errors import UnknownNameError
from lmms_eval_accelerate.manifest import FAMILIES, TRAINED, model_ids


def model_class(model_id: str) -> type:
    """Class behind a model id: its family's class with the method as default."""
    known = model_ids()
    if model_id not in known:
        raise UnknownNameError("model", model_id, known)
    family, method = known[model_id]
    if family == "hf":
        from lmms_eval_accelerate.models.native import HfAccelerated as base
    elif family in TRAINED:
        from lmms_eval_accelerate.models.architectures import class_of

        base = class_of(family)
    else:
        from lmms_eval_accelerate.models import families

        base = families.FAMILY_CLASSES[family]
    return type(model_id, (base,), {"model_id": model_id, "default_method": method, "__module__": __name__})


if not TYPE_CHECKING:  # to a type checker any name would be there

    def __getattr__(name: str) -> Any:
        if name.startswith(tuple(FAMILIES)) and name in model_ids():
            globals()[name] = model_class(name)  # one class object per id, so that isinstance and pickle work
            return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
