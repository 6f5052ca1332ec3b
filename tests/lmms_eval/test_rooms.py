"""The rooms of the plugin: which may import which, and what stands in one place only."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "lmms-eval" / "lmms_eval_accelerate"
#: rooms from the commands down; a file imports rooms below its own only
FLOORS = (("__main__",), ("cli",), ("compare", "reproduce"), ("report",), ("runs",), ("models", "benchmarks"))
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
RUN_FILES = ("run.json", "failed.json", "summary.json", "efficiency.json", "comparison_plan.json", "outcome.json")


def files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if "tasks" not in path.parts]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):  # what only a type checker reads is no import
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE.name:
            _, _, below = node.module.partition(".")
            names |= {below.partition(".")[0]} if below else {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_downwards(path):
    own = room_of(path)
    if own not in FLOOR:
        upper = {room for room in imported_rooms(path) & FLOOR.keys()}
        assert not upper, f"{path.name} lies beside the rooms, which all use it; it must not import {upper}"
    for room in imported_rooms(path) & FLOOR.keys() - {own}:
        assert FLOOR[room] > FLOOR[own], f"{own} must not import {room}"


@pytest.mark.parametrize("name", RUN_FILES)
def test_names_of_run_files_stand_in_one_place(name):
    found = [str(p.relative_to(PACKAGE)) for p in files() if re.search(rf'"{re.escape(name)}"', p.read_text("utf-8"))]
    assert found == ["runs/files.py"]


def test_nothing_else_locks_writes_json_or_reads_the_command_line():
    only = {"fcntl": {"runs/files.py"}, "json.dump(": {"runs/folder.py"}}
    only["sys.argv"] = {"cli.py", "models/failing.py", "runs/evaluation.py"}  # lmms-eval reads nothing else
    mains = {"reproduce/__main__.py", "reproduce/cli.py", "report/__main__.py"}
    for word, places in only.items():
        found = {str(p.relative_to(PACKAGE)) for p in files() if word in p.read_text("utf-8")}
        assert found - mains <= places, word
