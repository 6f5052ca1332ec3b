"""Which requests may share a batch, and what of a row of generated ids is the answer."""

from __future__ import annotations

import json
from typing import Any

from lmms_eval.api.instance import Instance


def grouped(requests: list[Instance], indices: list[int]) -> list[list[int]]:
    """Indices of requests that may share a batch: same task and generation arguments. Long contexts first."""
    groups: dict[tuple[str, str], list[int]] = {}
    for index in indices:
        *_, task, split = requests[index].args
        key = (f"{task}/{split}", json.dumps(generation_arguments(requests[index]), sort_keys=True, default=str))
        groups.setdefault(key, []).append(index)
    return [sorted(group, key=lambda i: -len(requests[i].args[0])) for group in groups.values()]


def generation_arguments(request: Instance) -> dict[str, Any]:
    """A request's generation arguments; simple and chat requests hold them in different places."""
    return next(argument for argument in request.args if isinstance(argument, dict))


def is_padding(request: Instance) -> bool:
    """Cloned by the harness so that all ranks have equally many requests; we need no such thing."""
    return bool((request.metadata or {}).get("__padding_only__"))


def until_end(ids: list[int], ends: set[int]) -> list[int]:
    """Generated ids up to and with the first end token (the rest is padding of the batch)."""
    for position, token in enumerate(ids):
        if token in ends:
            return ids[: position + 1]
    return ids


def cut(text: str, stops: list[str]) -> str:
    """Text before the first stop string; white space in front does not count as one."""
    text = text.strip()
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text.strip()
