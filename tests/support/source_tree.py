"""The source of the three packages as a graph of files: what the architecture rules look at. Nothing is imported."""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import ROOT

#: package -> the folder that holds it
PACKAGES = {
    "accelerate_methods": ROOT,
    "llava": ROOT,
    "lmms_eval_accelerate": ROOT / "lmms-eval",
}


@dataclasses.dataclass(frozen=True)
class Import:
    """``importer`` (a file) needs ``imported`` (a module, as far as it is known); in a function when ``lazy``."""

    importer: str
    imported: str
    line: int
    lazy: bool


@dataclasses.dataclass(frozen=True)
class Source:
    """One file of the packages."""

    module: str
    path: Path

    @functools.cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def shown(self) -> str:
        """The path as a failure message shows it."""
        return str(self.path.relative_to(ROOT))

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node

    def classes(self) -> Iterator[ast.ClassDef]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ClassDef):
                yield node


@functools.cache
def sources() -> dict[str, Source]:
    """Module name -> file, of all three packages."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((folder / package).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = Source(name, path)
    return found


def imports(source: Source) -> Iterator[Import]:
    """What a file imports, within functions too, but not what only type checkers read (``if TYPE_CHECKING:``)."""
    ignored = {
        id(child)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for child in ast.walk(statement)
    }
    lazy = {id(child) for function in source.functions() for child in ast.walk(function)}
    for node in ast.walk(source.tree):
        if id(node) in ignored:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(source, node)
            names = [f"{base}.{a.name}" if f"{base}.{a.name}" in sources() else base for a in node.names]
        else:
            continue
        for name in names:
            yield Import(source.module, name, node.lineno, id(node) in lazy)


def _absolute(source: Source, node: ast.ImportFrom) -> str:
    """The module that a ``from ... import`` names, without leading dots."""
    if not node.level:
        return node.module or ""
    parts = source.module.split(".")
    parts = parts[: len(parts) - node.level + source.is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def circles() -> list[list[str]]:
    """Groups of files that need each other, directly or through others (strongly connected, Tarjan 1972)."""
    graph = {name: sorted({i.imported for i in imports(s)} & set(sources()) - {name}) for name, s in sources().items()}
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            cut = stack.index(node)
            group = stack[cut:]
            del stack[cut:]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def words(source: Source) -> Iterator[tuple[int, str]]:
    """(line, text) of every identifier and every string that is no docstring. Comments are no code."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
        and isinstance(node.body[0].value, ast.Constant)
    }
    for node in ast.walk(source.tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str) and id(node) not in docstrings:
                yield line, node.value
        elif isinstance(node, ast.Name):
            yield line, node.id
        elif isinstance(node, ast.Attribute):
            yield line, node.attr
        elif isinstance(node, ast.arg | ast.keyword):
            yield line, node.arg or ""
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield line, node.name
        elif isinstance(node, ast.alias):
            yield line, f"{node.name} {node.asname or ''}"
