"""Wheels carry what the packages read, work away from the checkout, and show type checkers the public names."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import accelerate_methods
import llava.model
from accelerate_methods.registry.names import built_in
from tests.support.paths import ROOT

PACKAGES = {
    "accelerate_methods": ROOT / "accelerate_methods",
    "llava": ROOT / "llava",
    "lmms_eval_accelerate": ROOT / "lmms-eval" / "lmms_eval_accelerate",
}
NEEDED = (
    *("accelerate_methods", "llava", "configs", "assets", "lmms-eval", "setup.py", "pyproject.toml", "README.md"),
    *("LICENSE", "MANIFEST.in"),
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy to build in: a build leaves folders behind, and older ones must not get in."""
    folder = tmp_path_factory.mktemp("checkout")
    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "quickstart")
    for name in NEEDED:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=left_out)
        else:
            shutil.copy(source, target)
    return folder


@pytest.fixture(scope="module")
def installed(checkout, tmp_path_factory) -> Path:
    """A folder that holds the content of both wheels and nothing else: what pip makes of them with --target."""
    wheels, folder = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(wheels))
    command = [sys.executable, "-m", "pip", "wheel", *options, str(checkout), str(checkout / "lmms-eval")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    made = sorted(wheels.glob("*.whl"))
    assert [wheel.name.partition("-")[0] for wheel in made] == ["lmms_eval_accelerate", "mllm_accelerate"]
    for wheel in made:
        zipfile.ZipFile(wheel).extractall(folder)
    return folder


def run(installed: Path, folder: Path, *argv: str) -> str:
    """What a command prints that finds the installed packages, and not those of the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1", "COLUMNS": "200"}
    done = subprocess.run([sys.executable, *argv], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def data_files(folder: Path) -> set[str]:
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in files}


def test_every_file_is_there(checkout, installed):
    for name, folder in PACKAGES.items():
        carried = data_files(installed / name)
        assert data_files(checkout / folder.relative_to(ROOT)) <= carried, name
        assert "py.typed" in carried
    assert data_files(installed / "accelerate_methods" / "configs") == data_files(checkout / "configs")
    for name in ("tiny-llava-onevision", "shapes_video", "easy_vqa"):
        carried = data_files(installed / "lmms_eval_accelerate" / "assets" / name)
        assert carried == data_files(checkout / "assets" / name)


def test_the_tasks_find_their_questions(installed):
    tasks = installed / "lmms_eval_accelerate" / "tasks"
    named = [(path, line) for path in tasks.rglob("*.yaml") for line in path.read_text("utf-8").splitlines()]
    files = [path.parent / line.split()[-1] for path, line in named if line.endswith(".jsonl")]
    assert len(files) == 4 and all(file.is_file() for file in files)


def test_methods_and_their_configs_are_shown(installed, tmp_path):
    code = (
        "from accelerate_methods.__main__ import main; import accelerate_methods, llava\n"
        "print(main(['list']) or main(['show', 'fastvid']) or accelerate_methods.__file__, llava.__file__)"
    )
    shown = run(installed, tmp_path, "-c", code)
    assert {line.split()[0] for line in shown.splitlines() if line} >= set(built_in())
    assert "fastvid/llava_onevision" in shown and "fastvid/qwen2_5_vl" in shown
    assert all(Path(file).is_relative_to(installed) for file in shown.splitlines()[-1].split())


def test_a_table_is_planned_on_the_embedded_model(installed, tmp_path):
    pytest.importorskip("lmms_eval")
    asked = ("-m", "lmms_eval_accelerate.reproduce", "embedded", "--limit", "2", "--rows", "random", "--dry-run")
    planned = run(installed, tmp_path, *asked)
    model = installed / "lmms_eval_accelerate" / "assets" / "tiny-llava-onevision"
    assert f"pretrained={model}" in planned and "shapes_video" in planned
    assert not list(tmp_path.iterdir())


# -- types -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKAGES)
def test_no_module_accepts_any_name(name):
    """A ``__getattr__`` that a type checker sees makes every name an attribute of the module."""
    for path in PACKAGES[name].rglob("*.py"):
        seen = [node for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)]
        assert "__getattr__" not in {node.name for node in seen}, f"{path}: put it where `TYPE_CHECKING` is False"


@pytest.mark.parametrize("module", [accelerate_methods, llava.model])
def test_type_checkers_see_the_exports(module):
    body = ast.parse(Path(module.__file__).read_text("utf-8")).body
    (names,) = (n.value for n in body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__")
    public = ast.literal_eval(names)  # an error if it is computed: type checkers read it as text
    imported = {
        alias.name: node.module
        for block in body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        for alias in node.names
    }
    assert set(module._EXPORTS) == set(imported) == set(public) - {"__version__"} and public == list(module.__all__)
    for name, source in imported.items():  # that they resolve is tested in test_imports.py
        assert source.endswith(f".{module._EXPORTS[name]}"), name
