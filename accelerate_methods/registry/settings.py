"""What a comparison or a benchmark runs: ``"dense fastvid@0.25 dycoke(k=0.3) levels"`` as a list of settings."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import yaml

from accelerate_methods.registry import compatibility
from accelerate_methods.registry.architectures import architecture_named
from accelerate_methods.registry.names import available, method_class
from accelerate_methods.registry.pipeline import resolve
from accelerate_methods.stages.errors import MethodError

DENSE = "dense"
_WORD = re.compile(r"([^\s,@()]+)(?:@([^\s,()]+))?(?:\(([^()]*)\))?")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One run: a method (None: dense) with the parameters that differ from those of its config.

    A trained architecture has dense runs with parameters: its own run parameters.
    """

    method: str | None = None
    params: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, method: str, /, **params: Any) -> Setting:
        """Checked: an unknown method, parameter or value fails here, before any run."""
        resolve(method, **params)
        return cls(method, tuple(params.items()))

    @property
    def label(self) -> str:
        """Name in tables."""
        if self.method is None:
            return f"{DENSE}({','.join(f'{name}={value}' for name, value in self.params)})" if self.params else DENSE
        if [name for name, _ in self.params] == ["retention_ratio"]:
            return f"{self.method}@{self.params[0][1]:g}"
        given = ",".join(f"{name}={value}" for name, value in self.params)
        return f"{self.method}({given})" if given else self.method

    @property
    def folder(self) -> str:
        """The label as the name of a folder or file: "dycoke(k=0.3,p=0.7)" -> "dycoke_k-0.3_p-0.7"."""
        return re.sub(r"[^\w@.+-]+", "_", self.label.replace("=", "-")).strip("_")


def has_budget(method: str) -> bool:
    """Whether a method can be asked to keep a share of the tokens; what others keep follows from their parameters."""
    return "+" not in method and "retention_ratio" in method_class(method).parameters()


def needs_a_scorer(method: str) -> bool:
    """Whether a method scores frames by a model of its own."""
    return getattr(method_class(method), "scorer", None) is not None


def settings_of(
    words: str, retention: float, config: Mapping[str, Any], family: str, asked: float | None = None
) -> list[Setting]:
    """Settings of a list of words, separated by spaces or commas. "all" leaves out what cannot run on ``family``, and
    methods that need weights beside the model's: a scorer of frames is named by who has it.

    ========================  ======================================================================================
    ``dense``                 no method
    ``dense(tokens=64)``      no method, with these run parameters of a trained architecture
    ``fastvid``               the method at ``retention``, or as its config says if it has no free budget
    ``fastvid@0.25``          at this retention ratio
    ``dycoke(k=0.3,p=0.7)``   with these parameters
    ``visionzip+fastv``       a combination, with the defaults of its methods or with ``(fastv.k=3)``
    ``levels``                the method of ``config`` at every level that the config lists; of a trained
                              architecture without one, its own run parameters at every level of its entry
    ``all``, ``all@0.1``      dense and every method, at ``retention`` or at this ratio
    ========================  ======================================================================================

    Args:
        asked: a retention ratio that the user gave for all words without one, in place of ``retention``.

    Raises:
        UnknownNameError, MethodError: words that cannot be read, or ask for what a method does not have; ``asked``
            where no word, or a method that is named, has a use for it.
    """
    rest = _WORD.sub("", words).replace(",", "").strip()
    if rest:
        raise MethodError(f"cannot read {rest!r} in the list of methods {words!r}; write e.g. {_EXAMPLE}.")
    pieces = _WORD.findall(words)
    found = [_Word(name, _ratio(ratio) if ratio else None, _params(given)) for name, ratio, given in pieces]
    if not found:
        raise MethodError(f"the list of methods {words!r} names none; write e.g. {_EXAMPLE}.")
    out: list[Setting] = []
    for word in found:
        out += word.settings(retention, config, family, asked)
    if asked is not None and not any(word.takes(asked) for word in found):
        raise MethodError(
            f"the retention ratio {asked:g} changes nothing: no method of {words!r} takes it. Leave it out, or name a "
            "method that has a retention_ratio, without one of its own."
        )
    return list(dict.fromkeys(out))


@dataclasses.dataclass(frozen=True)
class _Word:
    """``name@ratio(params)``."""

    name: str
    ratio: float | None
    params: dict[str, Any]

    def settings(self, retention: float, config: Mapping[str, Any], family: str, asked: float | None) -> list[Setting]:
        entry = architecture_named(family)
        if self.name == DENSE and entry is not None and self.ratio is None:
            given = {name: entry.argument(name).checked(entry.name, value) for name, value in self.params.items()}
            return [Setting(None, tuple(given.items()))]
        if self.name in (DENSE, "levels", "all"):
            self._refuse_what_means_nothing()
        share = retention if asked is None else asked
        if self.name == DENSE:
            return [Setting()]
        if self.name == "all":
            share = share if self.ratio is None else self.ratio
            fit = [m for m in available() if compatibility.runs_on(m, family) and not needs_a_scorer(m)]
            return [Setting(), *(_at(method, share) for method in fit)]
        if self.name == "levels":
            if entry is not None and config.get("method") is None:
                return [Setting(), *(Setting(None, tuple(level.items())) for level in entry.levels)]
            if "method" not in config:
                raise MethodError("'levels' are those of a config, and none is given; name methods instead.")
            return [Setting(), *(Setting.of(config["method"], **level) for level in config.get("levels") or [{}])]
        for name in self.name.split("+"):
            method_class(name)  # an unknown method is told before its parameters are
        return [self._of_method(share, asked)]

    def _of_method(self, share: float, asked: float | None) -> Setting:
        if self.ratio is not None:
            if "retention_ratio" in self.params:
                raise MethodError(f"{self.name}: retention_ratio is there twice, behind @ and in brackets.")
            return Setting.of(self.name, retention_ratio=self.ratio, **self.params)
        if asked is not None and not self._has_own_budget() and not has_budget(self.name):
            raise MethodError(
                f"{self.name} has no retention_ratio: what it keeps follows from its own parameters. Leave the "
                f"retention ratio {asked:g} out, or give parameters in brackets, e.g. {_EXAMPLE}."
            )
        if self.takes(asked):
            return Setting.of(self.name, retention_ratio=asked, **self.params)
        return Setting.of(self.name, **self.params) if self.params else _at(self.name, share)

    def takes(self, asked: float | None) -> bool:
        """Whether the common retention ratio that the user asked for is this word's."""
        if asked is None or self.ratio is not None or self.name in (DENSE, "levels"):
            return False
        return self.name == "all" or (has_budget(self.name) and not self._has_own_budget())

    def _has_own_budget(self) -> bool:
        """Whether the brackets say how much is kept; of a method without a budget, whether they say anything."""
        if not has_budget(self.name):
            return bool(self.params)
        return any(name in method_class(self.name).budget_fields() for name in self.params)

    def _refuse_what_means_nothing(self) -> None:
        given = [] if self.ratio is None or self.name == "all" else [f"@{self.ratio:g}"]
        given += [f"{name}={value}" for name, value in self.params.items()]
        if given:
            about = {
                DENSE: "the dense model keeps all tokens and has no parameters",
                "levels": "'levels' are those that the config lists",
                "all": "'all' takes a retention ratio, and no parameters",
            }
            raise MethodError(f"{self.name}: {about[self.name]}, {', '.join(given)} would be ignored.")


_EXAMPLE = '"dense fastvid@0.25 dycoke(k=0.3,p=0.7)"'


def _at(method: str, share: float) -> Setting:
    return Setting.of(method, **({"retention_ratio": share} if has_budget(method) else {}))


def _ratio(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise MethodError(f"{text!r} is not a retention ratio; write e.g. {_EXAMPLE}.") from None


def _params(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, equals, value in (pair.partition("=") for pair in text.split(",") if pair.strip()):
        if not equals:
            raise MethodError(f"{name!r} is no parameter; write e.g. {_EXAMPLE}.")
        if name.strip() in found:
            raise MethodError(f"parameter {name.strip()!r} is there twice in ({text}).")
        try:
            found[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise MethodError(f"parameter {name.strip()!r}: cannot read {value!r}; write e.g. {_EXAMPLE}.") from None
    return found
