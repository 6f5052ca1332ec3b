"""Hyper-parameters declare on their field what they may be; :class:`~.method.Method` checks all of them in one place.

    retention_ratio: float | None = share(0.25, budget=True)
    k: int = integer(2, low=0)
    tau: float = real(0.9, low=-1, high=1)
    variant: str = choice("auto", "auto", "onevision")
    merging: bool = flag(True)
    pruning_layers: tuple[int, ...] = integers((2, 6, 15), low=0)

Fields with ``budget`` say how much is kept, each in its own way: exactly one way is given, and a caller who gives one
replaces the one that was there. Two fields that make up one way together have the same text as ``budget``. ``aliases``
are names that other code bases have for the same thing.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from typing import Any

from accelerate_methods.stages.errors import MethodError, UnknownNameError

_KEY = "accelerate_methods"
_KINDS = {"integer": "an integer", "number": "a number"}


@dataclasses.dataclass(frozen=True)
class Rule:
    """What one field may hold.

    Attributes:
        kind: "number", "integer", "flag", "text" or "choice".
        several: whether it holds several numbers, a tuple.
        low, high: bounds of a number; ``open_low``: whether ``low`` itself is outside.
        options: what a choice may be.
        budget: name of the way to say how much is kept that this field belongs to, None for other fields.
        aliases: names of the same thing in other code bases.
    """

    kind: str
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    options: tuple[str, ...] = ()
    budget: str | None = None
    aliases: tuple[str, ...] = ()
    several: bool = False

    @property
    def range(self) -> str:
        """The bounds as an interval: "(0, 1]"."""
        left = "(" if self.open_low or self.low == -math.inf else "["
        right = ")" if self.high == math.inf else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"

    @property
    def allowed(self) -> str:
        """What is allowed, for tables."""
        if self.kind == "flag":
            return "True, False"
        if self.kind == "choice":
            return ", ".join(self.options)
        return f"{self.range}, several" if self.several else self.range

    def checked(self, method: str, field: str, value: Any) -> Any:
        """``value`` as plain Python.

        Raises:
            MethodError: of the wrong kind, or out of range.
        """
        value = _plain(value)
        if self.several:
            return self._several(method, field, value)
        if self.kind == "flag":
            if not isinstance(value, bool):
                raise MethodError(f"{method}: {field} must be True or False, got {value!r}.")
        elif self.kind == "text":
            if not isinstance(value, str) or not value.strip():
                raise MethodError(f"{method}: {field} must be text, got {value!r}.")
        elif self.kind == "choice":
            if value not in self.options:
                raise UnknownNameError(f"value of {method}.{field}:", value, self.options)
        else:
            types = int if self.kind == "integer" else (int, float)
            if isinstance(value, bool) or not isinstance(value, types) or value != value:
                raise MethodError(f"{method}: {field} must be {_KINDS[self.kind]}, got {value!r}.")
            if value < self.low or value > self.high or (self.open_low and value == self.low):
                raise MethodError(f"{method}: {field}={value!r} is outside the allowed range {self.range}.")
        return value

    def _several(self, method: str, field: str, value: Any) -> tuple[Any, ...]:
        """A list, a tuple or a 1-d array of numbers as a tuple."""
        value = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(value, (list, tuple)) or not value:
            kinds = "integers" if self.kind == "integer" else "numbers"
            raise MethodError(f"{method}: {field} must be a list of {kinds}, got {value!r}.")
        single = dataclasses.replace(self, several=False)
        return tuple(single.checked(method, field, entry) for entry in value)


def real(
    default: float | None, *, low: float = -math.inf, high: float = math.inf, **more: Any
) -> Any:
    """A number in [low, high]; ``more``: ``budget`` and ``aliases``."""
    return _field(default, Rule("number", low, high), **more)


def share(default: float | None, **more: Any) -> Any:
    """A number in (0, 1]."""
    return _field(default, Rule("number", 0.0, 1.0, open_low=True), **more)


def integer(default: int | None, *, low: float = -math.inf, high: float = math.inf, **more: Any) -> Any:
    """A whole number in [low, high]."""
    return _field(default, Rule("integer", low, high), **more)


def integers(default: tuple[int, ...] | None, *, low: float = -math.inf, high: float = math.inf, **more: Any) -> Any:
    """Several whole numbers in [low, high], a tuple."""
    return _field(default, Rule("integer", low, high, several=True), **more)


def reals(default: tuple[float, ...] | None, *, low: float = -math.inf, high: float = math.inf, **more: Any) -> Any:
    """Several numbers in [low, high], a tuple."""
    return _field(default, Rule("number", low, high, several=True), **more)


def flag(default: bool, **more: Any) -> Any:
    """True or False."""
    return _field(default, Rule("flag"), **more)


def text(default: str | None, **more: Any) -> Any:
    """Any text: a name, or a path."""
    return _field(default, Rule("text"), **more)


def choice(default: str, *options: str, **more: Any) -> Any:
    """One of ``options``."""
    return _field(default, Rule("choice", options=options), **more)


def _field(default: Any, rule: Rule, *, budget: bool | str = False, aliases: tuple[str, ...] = ()) -> Any:
    """
    Args:
        budget: True, or the name of the way to say how much is kept that several fields make up together.
        aliases: names of the same thing in other code bases, accepted in its place.
    """
    return dataclasses.field(default=default, metadata={_KEY: (dataclasses.replace(rule, aliases=aliases), budget)})


def rules(cls: type) -> dict[str, Rule | None]:
    """Hyper-parameter -> its rule, None for a field that declares none."""
    found: dict[str, Rule | None] = {}
    for field in dataclasses.fields(cls):
        if field.init:
            rule, budget = field.metadata.get(_KEY, (None, False))
            # a budget of one field is named after it
            way = field.name if budget is True else budget or None
            found[field.name] = dataclasses.replace(rule, budget=way) if rule else None
    return found


def aliases(cls: type) -> dict[str, str]:
    """Name in other code bases -> the field that means the same."""
    return {alias: name for name, rule in rules(cls).items() if rule is not None for alias in rule.aliases}


def budgets(cls: type) -> dict[str, list[str]]:
    """Way to say how much is kept -> its fields."""
    found: dict[str, list[str]] = {}
    for name, rule in rules(cls).items():
        if rule is not None and rule.budget is not None:
            found.setdefault(rule.budget, []).append(name)
    return found


def check(method: Any) -> None:
    """Check every declared field of a method object, and that exactly one budget is given.

    A class with ``budget_required = False`` may be given none. Numbers of numpy and 0-d tensors become plain ones.

    Raises:
        MethodError: with what is allowed.
    """
    defaults = method.parameters()
    for name, rule in rules(type(method)).items():
        value = getattr(method, name)
        if rule is None or (value is None and (rule.budget is not None or defaults[name] is None)):
            continue
        object.__setattr__(method, name, rule.checked(method.name, name, value))  # the dataclass is frozen
    ways = budgets(type(method))
    given = {way: [n for n in names if getattr(method, n) is not None] for way, names in ways.items()}
    given = {way: names for way, names in given.items() if names}
    if len(given) > 1 or (ways and not given and method.budget_required):
        what = ", ".join(" and ".join(names) for names in ways.values())
        got = ", ".join(name for names in given.values() for name in names) or "none"
        raise MethodError(f"{method.name}: give exactly one budget out of {what} (got {got}).")
    for way, names in given.items():
        if len(names) < len(ways[way]):
            raise MethodError(f"{method.name}: {' and '.join(ways[way])} belong together; give both or neither.")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A hyper-parameter as pages and the command line show it.

    Attributes:
        kind: "number", "integer", "flag", "text", "choice", or "" where the field declares nothing.
        allowed: interval or options, "" where the field declares nothing.
        meaning: what the class's docstring says of it.
        budget: whether it says how much is kept.
        aliases: names of the same thing in other code bases.
    """

    name: str
    default: Any
    kind: str
    allowed: str
    meaning: str
    budget: bool
    aliases: tuple[str, ...] = ()


def parameters_of(cls: type) -> list[Parameter]:
    """All hyper-parameters of a method class, in the order of its fields."""
    said = _meanings(cls)
    found = []
    for name, rule in rules(cls).items():
        kind, allowed, names = (rule.kind, rule.allowed, rule.aliases) if rule else ("", "", ())
        is_budget = rule is not None and rule.budget is not None
        found.append(Parameter(name, cls.parameters()[name], kind, allowed, said.get(name, ""), is_budget, names))
    return found


_ENTRY = re.compile(r"^    (\w+(?:, \w+)*): (.*)$")


def _meanings(cls: type) -> dict[str, str]:
    """Parameter -> text out of the "Attributes" sections of the class and its bases; the class's own come first."""
    found: dict[str, str] = {}
    for base in cls.__mro__:
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Attributes:\n")[2]
        names: list[str] = []
        own: dict[str, str] = {}
        for line in text.split("\n"):
            if match := _ENTRY.match(line):
                names = match[1].split(", ")
                own |= dict.fromkeys(names, match[2])
            elif line.startswith("        ") and names:
                own |= {name: f"{own[name]} {line.strip()}" for name in names}
            elif line.strip():
                break
        found = own | found
    return found


def _plain(value: Any) -> Any:
    """A number of numpy or a tensor of one element as a Python number."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return value
