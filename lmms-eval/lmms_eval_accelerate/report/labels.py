"""Short names of settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from lmms_eval_accelerate.report.results import DENSE


def labels_of(settings: list[list[Mapping[str, Any]]]) -> list[str]:
    """A short name per setting: ``fastvid@0.25``; parameters or a number where that alone is ambiguous."""
    short = [_label(methods) for methods in settings]
    labels = []
    for methods, name in zip(settings, short, strict=True):
        rivals = [other for other, n in zip(settings, short, strict=True) if n == name and other != methods]
        flat = _flat(methods)
        differing = [key for key in flat if any(_flat(other).get(key) != flat[key] for other in rivals)]
        if differing:
            name += "(" + ",".join(f"{key}={flat[key]}" for key in differing) + ")"
        labels.append(name)
    seen: Counter[str] = Counter()
    for index, name in enumerate(labels):
        seen[name] += 1
        if seen[name] > 1:
            labels[index] = f"{name} #{seen[name]}"
    return labels


def _label(methods: list[Mapping[str, Any]]) -> str:
    if not methods:
        return DENSE
    if len(methods) == 1 and methods[0].get("retention_ratio") is not None:
        return f"{methods[0]['method']}@{methods[0]['retention_ratio']:g}"
    return "+".join(m["method"] for m in methods)


def _flat(methods: list[Mapping[str, Any]]) -> dict[str, Any]:
    prefix = len(methods) > 1
    return {
        f"{m['method']}.{key}" if prefix else key: value for m in methods for key, value in m.items() if key != "method"
    }
