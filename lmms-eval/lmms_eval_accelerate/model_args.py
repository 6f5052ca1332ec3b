"""The text of ``--model_args``: ``k=v,k=v`` as lmms-eval 0.7.3 splits and reads it, and back."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate_methods.stages.errors import MethodError


def split_arguments(text: str) -> list[str]:
    """``text`` at its commas, as lmms-eval splits --model_args: not inside quotes, braces and brackets."""
    pieces, depth, quote = [""], 0, None
    for before, char in zip(" " + text, text, strict=False):
        if char in "\"'" and before != "\\":
            quote = char if quote is None else None if quote == char else quote
        elif quote is None:
            depth += (char in "{[") - (char in "}]")
            if char == "," and depth == 0:
                pieces.append("")
                continue
        pieces[-1] += char
    return pieces


def pairs(text: str) -> dict[str, Any]:
    """``k=v,k=v`` as a mapping; values stay text but for numbers and true/false, as in lmms-eval.

    Raises:
        MethodError: a piece without a name or ``=``, an empty one, a name that is there twice, quotes that stay open.
    """
    found: dict[str, Any] = {}
    if not text.strip():
        return found
    if split_arguments(f"{text},next")[-1] != "next":
        raise MethodError(f"--model-args: a quote or bracket in {text!r} is not closed.")
    for pair in split_arguments(text):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not key:
            what = repr(pair) if pair.strip() else f"an empty piece in {text!r}"
            raise MethodError(f"--model-args: {what} is not of the form name=value.")
        if key in found:
            raise MethodError(f"--model-args: {key} is there twice.")
        found[key] = _number(absolute(value) if "/" in value or key == "model_base" else value)
    return found


def joined(arguments: Mapping[str, Any]) -> str:
    """A mapping as ``k=v,k=v``.

    Raises:
        MethodError: a value that lmms-eval could not read back.
    """
    return ",".join(f"{key}={written(key, value)}" for key, value in arguments.items())


def written(key: str, value: Any) -> str:
    """The value of argument ``key`` as it is written in ``--model_args``."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "none"
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(value)
    text = str(value)
    if split_arguments(f"{text},next") != [text, "next"]:
        raise MethodError(
            f"model argument {key}={text!r}: lmms-eval cannot read a comma outside brackets and quotes in a value, nor "
            "one of these that is left open."
        )
    return text


def meant(value: Any) -> Any:
    """What a value stands for that lmms-eval leaves as text: none, and JSON lists and mappings.

    Raises:
        MethodError: brackets around something that is not JSON.
    """
    if not isinstance(value, str):
        return value
    if value.lower() in ("none", "null"):
        return None
    if value and value[0] in "{[" and value[-1:] in "}]":
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise MethodError(f"model argument {value!r} looks like JSON but is not: {error}") from error
    return value


def absolute(text: str) -> str:
    """``text``, or the value of ``--option=value``, as an absolute path if it is an existing relative one that looks
    like one (a folder, or with a slash).

    With a data folder the runs have another working directory.
    """
    flag, equals, value = text.partition("=") if text.startswith("--") else ("", "", text)
    path = Path(value).expanduser()
    if not value or value.startswith("-") or not ("/" in value or path.is_dir()) or not path.exists():
        return text
    return f"{flag}{equals}{path.resolve()}"


def _number(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
