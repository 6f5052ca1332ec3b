"""What identifies the data of a benchmark on disk: results of one state of it must not stand for those of another.

Annotations (and whatever else the harness reads) count by content: a corrected answer leaves a parquet file as long as
it was. Pictures, videos and archives count by size and time of the last change: reading terabytes before every command
would be a bad bargain.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava.media_kind import PICTURE_SUFFIXES, VIDEO_SUFFIXES
from lmms_eval_accelerate.benchmarks.catalog import BENCHMARKS, Benchmark
from lmms_eval_accelerate.embedded import CLIPS, QUESTIONS
from lmms_eval_accelerate.hashes import short_hash

_ARCHIVES = frozenset({".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"})
_MEDIA = PICTURE_SUFFIXES | VIDEO_SUFFIXES | _ARCHIVES
_BLOCK = 1 << 20


def facts(benchmark: Benchmark, data: Path | None) -> Any:
    """JSON-able; equal where a run would read the same.

    Args:
        data: data folder; None: the hub's, of which only that is said (before the first download there is nothing).
    """
    if benchmark.embedded:
        return _embedded(benchmark)
    if data is None:
        return "hub"
    folders = [data / benchmark.dataset, *((data / "home" / benchmark.media,) if benchmark.media else ())]
    files = [entry for folder in folders for entry in _entries(data, folder)]
    return {"folder": str(data), "files": len(files), "hash": short_hash(files)}


def task_facts(tasks: str, data: Path | None) -> dict[str, Any]:
    """:func:`facts` of the benchmarks among tasks as they are given to ``--tasks``; of others nothing is known."""
    names = {name.strip() for name in tasks.split(",")}
    named = (b for b in BENCHMARKS.values() if names & {b.name, b.task, *b.tasks})
    return {benchmark.name: facts(benchmark, data) for benchmark in named}


def _embedded(benchmark: Benchmark) -> Any:
    questions = QUESTIONS[benchmark.task]
    here = [path for path in (questions, *sorted(questions.parent.rglob("*.mp4"))) if path.is_file()]
    found = {"hash": short_hash([[path.name, _content(path)] for path in here])}
    if questions.parent != CLIPS.parent:  # the pictures are in a package of their own
        found["package"] = _version(benchmark.dataset)
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _entries(data: Path, folder: Path) -> Iterable[list[Any]]:
    """[name, size, content or time] of every file below a folder, without hidden ones."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(data)
        if any(part.startswith(".") for part in name.parts):
            continue
        stat = path.stat()
        yield [str(name), stat.st_size, stat.st_mtime_ns if path.suffix.lower() in _MEDIA else _content(path)]


def _content(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()[:16]
