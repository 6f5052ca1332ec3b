"""Short hashes of what a number depends on: settings, a checkpoint, this project's code, the installed packages."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate_methods.registry import plugins
from lmms_eval_accelerate.hashes import short_hash

#: packages whose version can change an answer or its price
PACKAGES = (
    *("lmms-eval", "lmms-eval-accelerate", "mllm-accelerate", "torch", "transformers", "accelerate", "datasets"),
    *("decord", "av", "pillow", "flash-attn"),
)
_SOURCES = ("accelerate_methods", "llava", "lmms_eval_accelerate")


@functools.cache
def code_hash() -> str:
    """Of every Python and task file of the installed packages ``accelerate_methods``, ``llava`` and the plugin, and of
    the files of methods from outside."""
    digest = hashlib.sha256()
    for package in _SOURCES:
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or () if spec is not None else ():
            _add_files(digest, package, Path(folder), (p for s in ("*.py", "*.yaml") for p in Path(folder).rglob(s)))
    for path in plugins.source_files():
        _add_files(digest, "plugins", path.parent, [path])
    return digest.hexdigest()[:8]


def _add_files(digest: Any, package: str, folder: Path, files: Iterable[Path]) -> None:
    for path in sorted(files):
        digest.update(f"{package}/{path.relative_to(folder)}\0".encode())
        digest.update(path.read_bytes())


def checkpoint_facts(pretrained: str | Path) -> dict[str, Any]:
    """What identifies a checkpoint: name, and for a folder the hash of its small files and of the names, sizes and
    times of its weight files (reading 15 GB before every run would be a bad bargain)."""
    folder = Path(pretrained).expanduser()
    if not folder.is_dir():
        return {"name": str(pretrained)}
    files = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        stat = path.stat()
        small = stat.st_size < 4_000_000
        content = hashlib.sha256(path.read_bytes()).hexdigest()[:16] if small else str(stat.st_mtime_ns)
        files.append([str(path.relative_to(folder)), stat.st_size, content])
    return {"name": folder.name, "hash": short_hash(files)}


def versions() -> dict[str, str]:
    """Versions of Python and of :data:`PACKAGES`."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
