"""Equal budgets for different methods: a method's own budget, solved so that what it keeps equals a target.

Methods count what they keep in ways of their own: before the LLM or inside it, in tokens of an image, a frame or the
whole prompt, as a share that a threshold may undercut. :func:`solve` tries values of the one parameter that says how
much a method keeps until a measurement of some prompts gives the target::

    found = solve(get("fastvid", retention_ratio=0.25), Target.of("layer_tokens=0.2"), measure)
    found.method, found.value, found.realised

``measure(method)`` is a share between 0 and 1 as :func:`shares` takes it from a recorded request. No answer is looked
at. A method that says its count from the shapes of the items (``count``) needs no measurement, see :func:`by_count`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accelerate_methods.engine.flops import prefill_macs
from accelerate_methods.engine.recording import RequestRecord
from accelerate_methods.stages.compress import CompressMethod, ViewCompressMethod
from accelerate_methods.stages.errors import MethodError, UnknownNameError
from accelerate_methods.stages.fields import Rule, rules
from accelerate_methods.stages.method import Method
from accelerate_methods.stages.shapes import ItemShape

#: what a target is a share of, and what each means
KINDS = {
    "tokens": "visual tokens that enter the language model",
    "layer_tokens": "visual tokens that its layers work on, mean over the layers",
    "flops": "work of its prefill, text included",
}
_PREFERRED = "retention_ratio"
_TRIALS = 12
_NEAR = 0.005  # share of the target that a realised budget may be off
_OFF = 0.05  # from which the target counts as missed: whole frames and grids come in steps
_APART = (0.3, 0.7)  # of a parameter's range, where its direction is found


@dataclasses.dataclass(frozen=True)
class Target:
    """``kind``: one of :data:`KINDS`; ``value``: the share, above 0 and up to 1."""

    kind: str
    value: float

    @classmethod
    def of(cls, text: str) -> Target:
        """Of ``"tokens=0.25"`` (or ``"tokens:0.25"``).

        Raises:
            UnknownNameError, MethodError: with what is allowed.
        """
        kind, _, number = str(text).replace(":", "=").partition("=")
        if kind not in KINDS:
            raise UnknownNameError("kind of budget to match:", kind, KINDS)
        with contextlib.suppress(ValueError):
            if 0 < float(number) <= 1:
                return cls(kind, float(number))
        raise MethodError(f"match={text}: {number!r} is not a share above 0 and up to 1; write e.g. {kind}=0.25.")

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"


@dataclasses.dataclass(frozen=True)
class Matched:
    """
    Attributes:
        method: with the solved budget; parameter, value: what was solved; realised: the share that was measured.
        trials: measurements that it took.
    """

    method: Method
    target: Target
    parameter: str
    value: float
    realised: float
    trials: int

    @property
    def reached(self) -> bool:
        return abs(self.realised - self.target.value) <= _OFF * self.target.value

    def to_dict(self) -> dict[str, Any]:
        facts = dataclasses.asdict(dataclasses.replace(self, method=None))
        return {**facts, "method": self.method.name, "target": str(self.target), "reached": self.reached}


def solution(found: Mapping[str, Any]) -> str:
    """:meth:`Matched.to_dict` in words."""
    text = f"{found['parameter']}={found['value']:g} realises {found['realised']:.1%}"
    return text if found["reached"] else f"{text}, the nearest to it"


def parameter_of(method: type[Method], kind: str) -> str:
    """The parameter that says how much ``method`` keeps.

    Raises:
        MethodError: it has none that is a number, or none that changes what ``kind`` counts.
    """
    stages = method.class_stages()
    found = [name for name, rule in rules(method).items() if _free(name, rule)]
    if not found:
        raise MethodError(
            f"{method.name} has no free budget to match: what it keeps follows from "
            f"{', '.join(method.parameters()) or 'the input alone'}."
        )
    if set(stages) <= {"decode"}:
        raise MethodError(f"{method.name} acts on decode steps only: no prompt gets shorter.")
    if kind == "tokens" and not {"sample", "encode", "compress"} & set(stages):
        raise MethodError(
            f"{method.name} drops inside the language model, which every visual token enters: match layer_tokens or "
            "flops."
        )
    return _PREFERRED if _PREFERRED in found else found[0]


def _free(name: str, rule: Rule | None) -> bool:
    """Whether a budget is one number between 0 and 1, so that one scale serves all methods."""
    return rule is not None and rule.budget == name and rule.kind == "number" and not rule.several and rule.high <= 1


def with_budget(method: Method, parameter: str, value: float) -> Method:
    """``method`` with another budget in place of its own."""
    kept = {name: v for name, v in method.to_dict().items() if name not in ("method", *method.budget_fields())}
    return type(method).create(**kept, **{parameter: value})


def solve(method: Method, target: Target, measure: Callable[[Method], float]) -> Matched:
    """The budget at which ``measure`` is nearest to the target.

    A share is assumed to rise or fall with the parameter throughout; where it does so in steps, or its range ends
    before the target, the nearest is taken, and :attr:`Matched.reached` says whether that is within 5 % of it.

    Raises:
        MethodError: as :func:`parameter_of`; or the parameter changes nothing.
    """
    parameter = parameter_of(type(method), target.kind)
    rule = rules(type(method))[parameter]
    low, high = max(rule.low, 0.0), min(rule.high, 1.0)
    seen: dict[float, float] = {}

    def share(value: float) -> float:
        value = float(f"{value:.5g}")
        if value not in seen:
            seen[value] = measure(with_budget(method, parameter, value))
        return seen[value]

    first, second = (low + part * (high - low) for part in _APART)
    rising = share(second) - share(first)
    if abs(rising) < 1e-9:
        raise MethodError(
            f"{method.name}: {parameter} changes nothing that {target.kind} counts ({KINDS[target.kind]}): "
            f"{share(first):.3f} at {first:g} and at {second:g}."
        )
    bracket = _Bracket(low, high, rising > 0)
    for value in (first, second):
        bracket.narrow(value, share(value), target.value)
    while len(seen) < _TRIALS and not any(abs(s - target.value) <= _NEAR * target.value for s in seen.values()):
        value = bracket.guess(target.value)
        if bracket.high - bracket.low < _NEAR * bracket.high or float(f"{value:.5g}") in seen:
            break  # it goes in steps, and there is none between
        bracket.narrow(value, share(value), target.value)
    best = min(seen, key=lambda value: abs(seen[value] - target.value))
    return Matched(with_budget(method, parameter, best), target, parameter, best, seen[best], len(seen))


@dataclasses.dataclass
class _Bracket:
    """Values between which the target lies; ``below``, ``above``: their shares where they were measured."""

    low: float
    high: float
    rising: bool
    below: float | None = None
    above: float | None = None

    def narrow(self, value: float, share: float, target: float) -> None:
        if (share < target) == self.rising:
            if value >= self.low:
                self.low, self.below = value, share
        elif value <= self.high:
            self.high, self.above = value, share

    def guess(self, target: float) -> float:
        """Where a line between the two ends meets the target, kept off the ends; the middle where one is unknown."""
        part = 0.5
        if None not in (self.below, self.above) and self.above != self.below:
            part = min(max((target - self.below) / (self.above - self.below), 0.1), 0.9)
        return self.low + part * (self.high - self.low)


def match(
    method: Method,
    target: Target,
    measure: Callable[[Method], float],
    predict: Callable[[Method], float | None],
) -> Matched:
    """:func:`solve`, with ``predict`` in place of all measurements but one where it knows, and is right."""
    parameter_of(type(method), target.kind)
    if predict(method) is not None:
        found = solve(method, target, predict)
        real = dataclasses.replace(found, realised=measure(found.method), trials=1)
        if real.reached or not found.reached:
            return real
    return solve(method, target, measure)


# -- what is measured --------------------------------------------------------------------------------------------------


def shares(record: RequestRecord, config: Any, kind: str) -> list[float]:
    """The realised share of every sample of a request that has visual tokens.

    Args:
        config: of the language model.
    """
    found = []
    for index, sample in enumerate(record.samples):
        layers = record.layer_lengths(index) or [sample.length] * config.num_hidden_layers
        by_layer = [sample.visual_tokens_after - sample.length + length for length in layers]
        dense = prefill_macs([sample.dense_length] * config.num_hidden_layers, config)
        if sample.visual_tokens_before:
            work = (prefill_macs(layers, config), dense)
            found.append(share_of(kind, sample.visual_tokens_before, by_layer, work))
    return found


def share_of(kind: str, before: int, by_layer: Sequence[int], work: tuple[float, float]) -> float:
    """Of one sample.

    Args:
        before: its uncompressed visual tokens; by_layer: those that each layer works on.
        work: of the prefill, and of that of the uncompressed prompt.
    """
    if kind == "flops":
        return work[0] / work[1]
    return (by_layer[0] if kind == "tokens" else sum(by_layer) / len(by_layer)) / before


def by_count(kind: str, shapes: Mapping[str, Sequence[ItemShape]]) -> Callable[[Method], float | None]:
    """What ``measure`` would give, from shapes alone; None where the method does not say its count.

    Args:
        shapes: "image" and "video" -> items as the compress stage gets them.
    """

    def share(method: Method) -> float | None:
        if kind == "flops" or method.stages != ("compress",) or not isinstance(method, CompressMethod):
            return None
        if isinstance(method, ViewCompressMethod) and shapes.get("image"):
            return None  # these see the views of an image before the projector
        own = [shape for modality in method.modalities for shape in shapes.get(modality, ())]
        counts = [method.count(shape) for shape in own]
        if not own or None in counts:
            return None
        return sum(count / shape.dense for count, shape in zip(counts, own, strict=True)) / len(own)

    return share
