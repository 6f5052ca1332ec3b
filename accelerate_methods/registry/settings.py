"""What a comparison or a benchmark runs: ``"dense fastvid@0.25 dycoke(k=0.3) levels"`` as a list of settings."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import yaml

from accelerate_methods.registry import compatibility
from accelerate_methods.registry.names import available, method_class
from accelerate_methods.registry.pipeline import resolve
from accelerate_methods.stages.errors import MethodError

DENSE = "dense"
_WORD = re.compile(r"([^\s,@()]+)(?:@([^\s,()]+))?(?:\(([^()]*)\))?")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One run: a method (None: dense) with the parameters that differ from those of its config."""

    method: str | None = None
    params: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, method: str, **params: Any) -> Setting:
        """Checked: an unknown method, parameter or value fails here, before any run."""
        resolve(method, **params)
        return cls(method, tuple(params.items()))

    @property
    def label(self) -> str:
        """Name in tables."""
        if self.method is None:
            return DENSE
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


def settings_of(words: str, retention: float, config: Mapping[str, Any], family: str) -> list[Setting]:
    """Settings of a list of words, separated by spaces or commas; "all" leaves out what cannot run on ``family``.

    ========================  ======================================================================================
    ``dense``                 no method
    ``fastvid``               the method at ``retention``, or as its config says if it has no free budget
    ``fastvid@0.25``          at this retention ratio
    ``dycoke(k=0.3,p=0.7)``   with these parameters
    ``visionzip+fastv``       a combination, with the defaults of its methods or with ``(fastv.k=3)``
    ``levels``                the method of ``config`` at every level that the config lists
    ``all``, ``all@0.1``      dense and every method, at ``retention`` or at this ratio
    ========================  ======================================================================================
    """
    rest = _WORD.sub("", words).replace(",", "").strip()
    if rest:
        raise MethodError(f"cannot read {rest!r} in the list of methods {words!r}; write e.g. {_EXAMPLE}.")
    out: list[Setting] = []
    for name, ratio, given in _WORD.findall(words):
        share = _ratio(ratio) if ratio else retention
        if name == DENSE:
            out.append(Setting())
        elif name == "all":
            fit = [m for m in available() if compatibility.runs_on(m, family)]
            out += [Setting(), *(_at(method, share) for method in fit)]
        elif name == "levels":
            if "method" not in config:
                raise MethodError("'levels' are those of a config, and none is given; name methods instead.")
            levels = config.get("levels") or [{}]
            out += [Setting(), *(Setting.of(config["method"], **level) for level in levels)]
        elif ratio or given:
            params = {"retention_ratio": share} if ratio else {}
            out.append(Setting.of(name, **params, **_params(given)))
        else:
            out.append(_at(name, share))
    return list(dict.fromkeys(out))


_EXAMPLE = '"dense fastvid@0.25 dycoke(k=0.3,p=0.7)"'


def _at(method: str, share: float) -> Setting:
    return Setting.of(method, **({"retention_ratio": share} if has_budget(method) else {}))


def _ratio(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise MethodError(f"{text!r} is not a retention ratio; write e.g. {_EXAMPLE}.") from None


def _params(text: str) -> dict[str, Any]:
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    for name, equals, _ in pairs:
        if not equals:
            raise MethodError(f"{name!r} is no parameter; write e.g. {_EXAMPLE}.")
    return {name.strip(): yaml.safe_load(value) for name, _, value in pairs}
