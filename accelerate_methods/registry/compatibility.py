"""Which method runs on which model family, and why not where it does not. Tables and commands read this."""

from __future__ import annotations

from accelerate_methods.registry.families import FAMILIES, ModelFamily, families
from accelerate_methods.registry.names import method_class
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.method import Method
from accelerate_methods.stages.sample import outside_of_models
from accelerate_methods.stages.signals import missing_signals, resolve_signal


def why_not(method: type[Method], family: ModelFamily) -> str | None:
    """Reason why ``method`` cannot act on ``family``, or None if it can."""
    offered = family.stages | outside_of_models(method)
    stages = [stage for stage in method.class_stages() if stage not in offered]
    if stages:
        models = "transformers' models do" if family.classes else "this architecture does"
        return f"acts at the {stages[0]} stage, which {models} not offer"
    missing = missing_signals(method, family.signals)
    if missing:
        return f"needs {', '.join(missing)}"
    if not method.modalities & family.modalities:
        return f"acts on {', '.join(sorted(method.modalities))} only"
    return None


def runs_on(name: str, key: str) -> bool:
    """Whether the method called ``name`` can do something on one of the families called ``key``."""
    return any(why_not(method_class(name), family) is None for family in families() if family.key == key)


def check(pipeline: Pipeline, key: str, model_class: str | None = None) -> None:
    """Raise :class:`MethodError` if a method of ``pipeline`` can do nothing on the families called ``key``.

    Args:
        model_class: class of the model, if it is known; one that no family here names is not judged.
    """
    fit = [f for f in families() if f.key == key and (model_class is None or model_class in f.classes)]
    for method in (type(m) for m in pipeline.methods):
        reasons = [why_not(method, f) for f in fit]
        if fit and all(reasons):
            runs = [f.name for f in FAMILIES if why_not(method, f) is None]
            raise MethodError(
                f"{method.name} cannot run on {' or '.join(f.name for f in fit)}: {reasons[0]}. "
                f"It runs on {', '.join(runs) or 'none of the families here'}."
            )


def adaptation(method: type[Method], family: ModelFamily) -> str | None:
    """What ``method`` reads on ``family`` instead of what its paper reads, or None."""
    given = {name: resolve_signal(method, name, family.signals) for name in sorted(method.signals)}
    changed = [f"{real} in place of {name}" for name, real in given.items() if real not in (None, name)]
    return ", ".join(changed) or None
