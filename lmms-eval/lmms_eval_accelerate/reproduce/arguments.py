"""Words of the command line that go to lmms-eval: model arguments and paths."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from accelerate_methods.stages.errors import MethodError


def split_arguments(text: str) -> list[str]:
    """``text`` at its commas, as lmms-eval 0.7.3 splits --model_args: not inside quotes, braces and brackets."""
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
    """``k=v,k=v`` as a mapping; values stay text but for numbers and true/false, as in lmms-eval."""
    found: dict[str, Any] = {}
    for pair in filter(None, split_arguments(text)):
        key, equals, value = pair.partition("=")
        if not equals:
            raise MethodError(f"--model-args: {pair!r} is not of the form name=value.")
        found[key.strip()] = _value(absolute(value) if "/" in value or key.strip() == "model_base" else value)
    return found


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


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
