"""``--match``: which methods' budgets a comparison solves for one target, and what they came to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from accelerate_methods.bench.matching import KINDS, Target, parameter_of, solution
from accelerate_methods.registry import compatibility
from accelerate_methods.registry.names import method_class
from accelerate_methods.registry.settings import Setting
from accelerate_methods.stages.errors import MethodError
from lmms_eval_accelerate.runs.files import SUMMARY, read_json
from lmms_eval_accelerate.runs.request import Run

#: what a method is compared with at equal budgets
BASELINES = ("random", "uniform", "pool", "downsample", "fewer_frames")


def why_not(method: str | None, target: Target) -> str | None:
    """Why the budget of a setting's method cannot be solved; None if it can."""
    if method is None:
        return "no method"
    if "+" in method:
        return f"{method} is a combination, of which no single budget is the one to solve."
    try:
        parameter_of(method_class(method), target.kind)
    except MethodError as error:
        return str(error)
    return None


def arguments(method: str | None, target: Target | None) -> dict[str, Any]:
    """Model arguments with which a run solves its method's budget, and where it starts; none where it cannot."""
    if target is None or why_not(method, target) is not None:
        return {}
    parameter = parameter_of(method_class(method), target.kind)
    return {parameter: target.value, "match": str(target).replace("=", ":")}


def baselines(family: str) -> str:
    """Those of :data:`BASELINES` that run on the family, as words of ``--methods``."""
    return " ".join(name for name in BASELINES if compatibility.runs_on(name, family))


def without_budgets(settings: Sequence[Setting], words: str, ratio: float | None, target: Target) -> list[Setting]:
    """The settings as they are called where their budgets are solved.

    Raises:
        MethodError: budgets that are given as well.
    """
    if "@" in words or ratio is not None:
        raise MethodError(f"--match {target} solves the budgets; leave @ratio and --retention-ratio out.")
    found = []
    for setting in settings:
        if why_not(setting.method, target) is None:
            own = method_class(setting.method).budget_fields()
            setting = Setting(setting.method, tuple(pair for pair in setting.params if pair[0] not in own))
        found.append(setting)
    return list(dict.fromkeys(found))


def told(target: Target, settings: Sequence[Setting], runs: Sequence[Run]) -> Iterator[str]:
    """What each method's budget came to, and why some were not solved."""
    yield f"budgets solved for {target} ({KINDS[target.kind]}):"
    for setting, run in zip(settings, runs, strict=True):
        if setting.method is not None:
            reason = why_not(setting.method, target)
            found = read_json(run.output / SUMMARY)["settings"].get("matched")
            yield f"  {setting.label}: " + (f"not matched: {reason}" if reason else solution(found))
