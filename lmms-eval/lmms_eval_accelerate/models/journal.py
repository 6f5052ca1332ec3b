"""The answers of a run as they come, so that a run that was killed goes on where it stopped.

Every process appends to a file of its own, ``answers/rank<r>.jsonl`` in the run's folder, and reads the files of all:
a run may go on with another number of processes. A line is found again by what the model was asked: task, split,
document, prompt, generation arguments. That model and method are the same is the business of the run's
folder (``runs/folder.py``). Several rounds per document (``generate_until_multi_round``) are not kept.
"""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance
from loguru import logger

from lmms_eval_accelerate.models.costs import Costs
from lmms_eval_accelerate.models.question import Likelihood

_COUNTS = ("input_tokens", "output_tokens", "reasoning_tokens")


class Journal:
    """Answers kept in ``folder``; None keeps and finds nothing."""

    def __init__(self, folder: Path | None, rank: int):
        self._folder = folder
        self._path = None if folder is None else folder / f"rank{rank}.jsonl"
        self._known: dict[str, dict[str, Any]] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob("rank*.jsonl")):
                self._read(path)
            if self._path.exists() and not self._path.read_bytes().endswith(b"\n"):
                with self._path.open("a", encoding="utf-8") as file:
                    file.write("\n")  # what was cut off must not spoil the next line

    def _read(self, path: Path) -> None:
        for line in path.read_bytes().split(b"\n"):
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the process was killed while it wrote this line: that answer is made again
            if not (entry["costs"] or {}).get("skipped"):  # the file may be there now
                self._known[entry["key"]] = entry

    def keys(self, requests: Sequence[Instance]) -> list[str | None]:
        """A name for each request; a request that is asked several times (``repeats``) gets several."""
        if self._folder is None:
            return [None] * len(requests)
        seen: collections.Counter[str] = collections.Counter()
        names: list[str | None] = []
        for request in requests:
            name = _name(request)
            names.append(f"{name}.{seen[name]}")
            seen[name] += 1
        return names

    def find(self, key: str | None) -> GenerationResult | None:
        """The answer that an earlier process gave, with its costs."""
        entry = self._known.get(key) if key is not None else None
        if entry is None:
            return None
        costs = _costs(entry["costs"])
        if "loss" in entry:
            return Likelihood(entry["loss"], entry["greedy"], costs)
        return GenerationResult(entry["text"], costs)

    def add(self, answered: Iterable[tuple[str | None, GenerationResult]]) -> None:
        """Write answers down before the next ones are made."""
        if self._path is None:
            return
        lines = []
        for key, answer in answered:
            costs = answer.token_counts.to_dict() if answer.token_counts is not None else None
            entry = {"key": key, "costs": costs}
            if isinstance(answer, Likelihood):
                entry["loss"], entry["greedy"] = answer.text
            else:
                entry["text"] = answer.text
            lines.append(json.dumps(entry) + "\n")
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def fill(self, keys: Sequence[str | None], asked: Sequence[int], answers: list[Any]) -> list[int]:
        """Put what is known into ``answers``; the indices of ``asked`` that are left."""
        left = []
        for index in asked:
            known = self.find(keys[index])
            if known is None:
                left.append(index)
            else:
                answers[index] = known
        if len(left) < len(asked):
            found = f"{len(asked) - len(left)} of {len(asked)}"
            logger.info(f"{found} answers were given before this run was interrupted; they are kept")
        return left


def _name(request: Instance) -> str:
    *_, document, task, split = request.args if len(request.args) > 2 else (None, request.task_name, None)
    asked = [part for part in request.args if isinstance(part, (str, int, float, dict))]
    content = [request.request_type, task, split, document, request.doc_id, request.idx, asked]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _costs(values: dict[str, Any] | None) -> Costs | None:
    if values is None:
        return None
    counts = {name: values.get(name) for name in _COUNTS}
    return Costs(**counts, extra={k: v for k, v in values.items() if k not in _COUNTS})
