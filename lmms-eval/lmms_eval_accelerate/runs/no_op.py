"""Runs that claim a method and are the dense model all the same: why, and how tables mark them.

Two things give such a run away. It kept every visual token in every layer, which its own counts say; or its answers and
the distributions of their first tokens are those of the dense run, which is seen where both are read. The second holds
whatever the counts say: a method may believe that it dropped tokens.

A run may have been asked to keep everything (a budget of 1, a video method on images, prompts of text alone). It is
marked as well, since its number is the dense model's, and the reason says that nothing is wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from accelerate_methods.registry.names import available
from accelerate_methods.registry.pipeline import Pipeline, resolve
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.fields import budgets
from accelerate_methods.stages.method import Method

if TYPE_CHECKING:
    from lmms_eval_accelerate.report.loyalty import Loyalty

#: stands behind the names of settings that are the dense model in effect
MARK = "∅"
_SHOWN = 4  # steps of a layer-wise ratio that are told one by one


def kept_everything(costs: Mapping[str, Any], methods: Iterable[Mapping[str, Any]]) -> str | None:
    """Why a run, or a task of it, is the dense model by its own counts; None if it is not, or if they cannot tell.

    Args:
        costs: means of ``models.costs.summarise``.
        methods: each method with its parameters, as in a summary.
    """
    pipeline = _pipeline(methods)
    if not pipeline.methods:
        return None
    if not costs.get("with_visual_tokens"):
        known = costs.get("visual_tokens_before") == 0
        return "no prompt has visual tokens: nothing to do" if known and not pipeline.acts_on_text else None
    if costs.get("kept_everything") != costs["with_visual_tokens"]:
        return None
    most, kinds = costs.get("visual_tokens_most", 0), set(costs.get("modalities") or ())
    elsewhere = kinds and not any(method.modalities & kinds for method in pipeline.methods)
    if not elsewhere and not _seen_in_counts(pipeline):
        return None
    reasons = dict.fromkeys(_asked(method, kinds, most) for method in pipeline.methods)
    if None not in reasons:
        return f"every visual token was kept, as asked: {'; '.join(reasons)}"
    return f"every visual token was kept in every layer ({pipeline.describe()})"


def answers_as_dense(loyal: Loyalty, methods: Iterable[Mapping[str, Any]]) -> str | None:
    """Why a run is the dense model by its answers; None if one of them differs, or nothing is known of them."""
    if not loyal.identical:
        return None
    pipeline = _pipeline(methods)
    late = " (the method acts on decode steps only, after the first token)" if pipeline.stages == ("decode",) else ""
    return f"all {loyal.documents} answers, and what their first tokens were taken from, are the dense run's{late}"


def both(*reasons: str | None) -> str | None:
    """One reason out of those that there are."""
    return "; ".join(dict.fromkeys(reason for reason in reasons if reason)) or None


def marked(name: str, reason: str | None) -> str:
    """``name`` with :data:`MARK` behind it if it is the dense model in effect."""
    return f"{name} {MARK}" if reason else name


def explained(reasons: Mapping[str, str | None]) -> list[str]:
    """A line per reason, with those (rows, columns) that have it."""
    having: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if reason:
            having.setdefault(reason, []).append(name)
    return [f"{MARK}: no effect, the dense model's numbers ({', '.join(n)}): {reason}." for reason, n in having.items()]


def closing(reasons: Mapping[str, str | None], of: int) -> str:
    """The last line of a command: how many of ``of`` runs had no effect; empty if none."""
    found = [name for name, reason in reasons.items() if reason]
    if not found:
        return ""
    return f"{MARK} no effect in {len(found)} of {of}: {', '.join(found)} (the dense model's numbers, reasons above)"


def layers_text(shares: Sequence[float]) -> str:
    """What each layer worked on, layers that are alike as one: ``100 % x 2, 25 % x 26``."""
    alike = [(text, len(list(same))) for text, same in itertools.groupby(f"{share:.0%}" for share in shares)]
    if len(alike) > _SHOWN:  # a method that drops a few before every layer
        return f"{alike[0][0]} to {alike[-1][0]}, {len(shares)} layers"
    return ", ".join(f"{text} x {count}" for text, count in alike)


def _pipeline(methods: Iterable[Mapping[str, Any]]) -> Pipeline:
    """The methods of a summary that this process knows."""
    try:
        return resolve([dict(m) for m in methods if m.get("method") in available()])
    except MethodError:  # of another state of the code
        return Pipeline()


def _seen_in_counts(pipeline: Pipeline) -> bool:
    """Whether the numbers of tokens must show that the methods act: not if they put patches back behind the encoder,
    choose as many other frames, or act on decode steps."""
    puts_back = pipeline.encode is not None and pipeline.encode.keeps_grid
    other_frames = pipeline.sample is not None and pipeline.sample.selects_frames()
    return not (puts_back or other_frames or pipeline.decode is not None)


def _asked(method: Method, modalities: set[str], tokens: float) -> str | None:
    """Why a method was right to keep everything, as far as its parameters say."""
    if modalities and not method.modalities & modalities:
        return f"{method.name} acts on {'s and '.join(sorted(method.modalities))}s only"
    ways = {way: fields for way, fields in budgets(type(method)).items() if len(fields) == 1}
    for (field,) in ways.values():
        value = getattr(method, field)
        whole = field == "retention_ratio" and value == 1
        enough = isinstance(value, int) and not isinstance(value, bool) and tokens and value >= tokens
        if value is not None and (whole or enough):
            return f"{method.name} has {field}={value:g}"
    return None
