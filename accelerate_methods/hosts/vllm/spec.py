"""What a server is asked to do with visual tokens, and where it may be said.

A specification is the name of a method, or a mapping ``{"method": name, **parameters}``. Sources, later ones before
earlier: the environment variable :data:`VARIABLE` (JSON), the checkpoint's config (``--hf-overrides``), the engine's
``--mm-processor-kwargs``, a request's ``mm_processor_kwargs``; in the last three under the key :data:`KEY`. A source
that names no method, or the one named before, changes single parameters; one that names another method starts afresh.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate_methods.hosts.vllm.served import Served, served
from accelerate_methods.registry.names import method_class
from accelerate_methods.registry.pipeline import resolve
from accelerate_methods.stages.errors import MethodError

KEY = "visual_compression"
VARIABLE = "ACCELERATE_METHODS_VLLM"
#: bytes of a number of rows
_ROWS = 4
_NOTHING = ("", "none", "dense")
_EXAMPLE = '{"method": "uniform", "retention_ratio": 0.25}'


def from_environment() -> Any:
    """What :data:`VARIABLE` says, None if it is not set.

    Raises:
        MethodError: no JSON, and no plain name either.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    if text[0] not in '{["':
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise MethodError(f"{VARIABLE} is no JSON ({error}); for example: {_EXAMPLE}.") from error


def merged(sources: Sequence[Any]) -> dict[str, Any] | None:
    """One specification out of several; None where nothing is to be compressed.

    Args:
        sources: None, a name or a mapping each; later ones go before earlier ones.

    Raises:
        MethodError: something else, or parameters without a method.
        UnknownNameError: a parameter that the method does not have.
    """
    found: dict[str, Any] | None = None
    for source in sources:
        if source is None:
            continue
        part = {"method": source} if isinstance(source, str) else source
        if not isinstance(part, Mapping):
            raise MethodError(f"{KEY} must be a method's name or a mapping such as {_EXAMPLE}, got {source!r}.")
        name = part.get("method", None if found is None else found["method"])
        if name is None and "method" not in part and part:
            raise MethodError(f"{KEY} names no method: {dict(part)!r}. For example: {_EXAMPLE}.")
        if name is None or str(name).lower() in _NOTHING:
            if "method" in part and set(part) - {"method"}:
                raise MethodError(f"{KEY}: parameters {', '.join(sorted(set(part) - {'method'}))}, but no method.")
            found = None
            continue
        below = found if found is not None and found["method"] == name else {"method": name}
        found = _over(below, {key: value for key, value in part.items() if key != "method"})
    return found


def _over(below: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    """``parameters`` over those of ``below``; a budget takes the place of whatever budget, and cap, is there."""
    cls = method_class(below["method"])
    lower = cls.canonical({key: value for key, value in below.items() if key not in ("method", "cap")})
    upper = cls.canonical({key: value for key, value in parameters.items() if key != "cap"})
    replaced = {name for name in cls.budget_fields() if upper.get(name) is not None}
    caps = parameters if "cap" in parameters or replaced else below
    found = {"method": below["method"], **lower, **cls.without_replaced_budget(upper), **upper}
    return found if caps.get("cap") is None else {**found, "cap": caps["cap"]}


def method_of(specification: Mapping[str, Any] | None) -> Served | None:
    """The method that a specification asks for, None for none.

    Raises:
        MethodError: a bad parameter, or a method that cannot be served, with the reason.
    """
    return None if specification is None else _built(json.dumps(specification, sort_keys=True))


def written(method: Served) -> bytes:
    """A method as bytes: equal for equal specifications."""
    return json.dumps(method.specification, sort_keys=True).encode()


def sent(method: Served, dense: int) -> bytes:
    """What travels with an image or video: its rows without any method, and the method.

    The worker asks :func:`read` for the method, the scheduler :func:`dense_rows` for the work of encoding it.
    """
    return dense.to_bytes(_ROWS, "little") + written(method)


def read(text: bytes) -> Served:
    """The method of :func:`sent`."""
    return _built(text[_ROWS:].decode())


def dense_rows(text: bytes) -> int:
    """The rows of :func:`sent`."""
    return int.from_bytes(text[:_ROWS], "little")


@functools.lru_cache(maxsize=256)
def _built(text: str) -> Served:
    parameters = json.loads(text)
    cap = parameters.pop("cap", None)
    methods = resolve(parameters).methods
    if len(methods) != 1:
        raise MethodError(f"{KEY} takes one method, not {len(methods)}: {text}.")
    return served(methods[0], cap, specification=json.loads(text))
