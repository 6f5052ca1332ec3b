"""The leaderboard: what was measured, out of stored outcomes, grouped by model, setting and benchmark.

    python -m lmms_eval_accelerate.reproduce leaderboard [OUTCOME.json ...] --output docs/results/leaderboard.md

Only numbers of runs that somebody made and stored get in; published ones are not mixed with them.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from accelerate_methods.stages.errors import MethodError
from lmms_eval_accelerate import WORK
from lmms_eval_accelerate.reproduce.folders import read_json
from lmms_eval_accelerate.reproduce.outcome import KIND, SCHEMA
from lmms_eval_accelerate.runs.long_prompts import LongPrompts, explained, marked

STORE = WORK / "docs" / "results" / "reproduce"
OUTPUT = WORK / "docs" / "results" / "leaderboard.md"
_HEADERS = (
    *(
        "setting",
        "score",
        "vs dense",
        "95 % interval",
        "same answers",
        "visual tokens",
        "LLM FLOPs",
        "n",
        "date",
        "run",
    ),
)


def main(argv: Sequence[str], console: Console) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lmms_eval_accelerate.reproduce leaderboard", description=__doc__)
    parser.add_argument("outcomes", nargs="*", type=Path, help="default: docs/results/reproduce/*.json")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: docs/results/leaderboard.md")
    args = parser.parse_args(argv)
    paths = args.outcomes or sorted(STORE.glob("*.json"))
    if not paths:
        raise MethodError(f"no outcomes: {STORE} holds no JSON file and none was named.")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(make(paths, args.output.parent), encoding="utf-8")
    console.print(f"{len(paths)} outcomes: {args.output}", highlight=False, soft_wrap=True)
    return 0


def make(paths: Iterable[Path], folder: Path) -> str:
    """The leaderboard as Markdown, with links relative to ``folder``, best score first.

    Raises:
        MethodError: a file that is no outcome of this schema.
    """
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    about: list[str] = []
    for number, path in enumerate(sorted(paths), 1):
        content = _read(path)
        link = Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
        about.append(_run(number, link, content))
        for part in content["parts"]:
            for column in part["columns"]:
                key = (str(part["pretrained"]), _setting(part["model_args"]), _benchmark(column), _limit(content))
                entries = (_entry(row, column, content, number, link) for row in part["rows"])
                groups.setdefault(key, []).extend(entry for entry in entries if entry is not None)
    lines = [
        "# Leaderboard",
        "",
        "Only runs that were made with this code, each with its stored outcome; made by",
        "`python -m lmms_eval_accelerate.reproduce leaderboard` (see [reproduce.md](../reproduce.md)). Differences and",
        "intervals are to the dense run of the same outcome. Visual tokens: mean over the LLM's layers.",
    ]
    model = None
    for key in sorted(group for group, entries in groups.items() if entries):
        if key[:2] != model:
            model = key[:2]
            lines += ["", f"## {key[0]}", "", f"Model arguments: {key[1]}" if key[1] else "Model arguments: defaults"]
        lines += ["", f"### {key[2]}{key[3]}", "", _line(_HEADERS), "|---|" + "---:|" * (len(_HEADERS) - 1)]
        entries = sorted(groups[key], key=lambda entry: (-entry["score"], entry["cells"]))
        lines += [_line(entry["cells"]) for entry in entries]
        doubts = explained({entry["cells"][0]: entry["doubt"] for entry in entries})
        lines += ["", *(f"* {line}" for line in doubts)] if doubts else []
    return "\n".join([*lines, "", "## Runs", "", *about, ""])


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict) or content.get("kind") != KIND or content.get("schema") != SCHEMA:
        raise MethodError(f"{path} is no outcome of this command (kind {KIND!r}, schema {SCHEMA}).")
    return content


def _setting(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={json.dumps(v)}" for k, v in sorted(arguments.items()) if k != "pretrained")


def _benchmark(column: Mapping[str, Any]) -> str:
    unit = "" if column["unit"] == "%" else f", in {column['unit']}"
    return f"{column['benchmark']} ({column['dataset']}, {column['split']}; {column['metric']}{unit})"


def _limit(content: Mapping[str, Any]) -> str:
    return "" if content["limit"] is None else f", first {content['limit']} documents only"


def _entry(
    row: Mapping[str, Any], column: Mapping[str, Any], content: Mapping[str, Any], number: int, link: str
) -> dict[str, Any] | None:
    cell = row["cells"][column["title"]]
    if cell["measured"] is None:
        return None
    digits = 2 if column["unit"] == "of 5" else 1
    tokens, share = cell["costs"].get("visual_tokens_per_layer"), cell["visual_tokens_share"]
    prompts, doubt = LongPrompts(**(cell.get("long_prompts") or {})), cell.get("not_comparable")
    cells = (
        _name(row["methods"]),
        f"{cell['measured']:.{digits}f}" + (f" (prompts too long: {prompts.count})" if prompts.harmed else ""),
        marked("" if cell["change"] is None else f"{cell['change']:+.{digits}f}", doubt),
        marked("" if cell["low"] is None else f"{cell['low']:+.{digits}f} to {cell['high']:+.{digits}f}", doubt),
        marked("" if cell["agreement"] is None else f"{100 * cell['agreement']:.0f}%", doubt),
        "" if tokens is None or share is None else f"{tokens:.0f} ({100 * share:.0f}%)",
        marked("" if cell["flops_share"] is None else f"{100 * cell['flops_share']:.1f}%", doubt),
        str(cell["documents"]),
        content["created"][:10],
        f"[{number}]({link})",
    )
    return {"score": cell["measured"], "cells": cells, "doubt": doubt}


def _name(methods: Sequence[Mapping[str, Any]]) -> str:
    """A setting by its methods, their budget and the parameters that are no defaults (a row's name is its paper's)."""
    from accelerate_methods.registry import method_class

    names = []
    for method in methods:
        kind = method_class(method["method"])
        plain = {k: v for k, v in kind.parameters().items() if k not in kind.budget_fields()}
        own = {k: v for k, v in method.items() if k != "method" and v is not None and v != plain.get(k)}
        names.append(method["method"] + (f"({', '.join(f'{k}={v}' for k, v in own.items())})" if own else ""))
    return " + ".join(names) or "dense"


def _run(number: int, link: str, content: Mapping[str, Any]) -> str:
    versions, machine = content.get("versions") or {}, content.get("machine") or {}
    packages = ", ".join(f"{n} {versions[n]}" for n in ("torch", "transformers", "lmms-eval") if n in versions)
    count = content.get("processes", 1) * content.get("machines", 1)
    facts = [
        *(content["title"], content["created"], machine.get("name", "unknown machine")),
        *(f"{count} process{'es' if count > 1 else ''}", packages, f"code {content.get('code')}"),
        *(f"limit {content['limit'] or 'none'}", f"`{content['command']}`"),
    ]
    return f"{number}. [{Path(link).name}]({link}): {'; '.join(facts)}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
