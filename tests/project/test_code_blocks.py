"""Every code block of README and docs: Python runs, shell is valid and names what exists with options that exist."""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import itertools
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlavaOnevisionForConditionalGeneration

import accelerate_methods
from accelerate_methods.registry import names as registry
from tests.support.native_models import native_model
from tests.support.paths import ROOT
from tests.support.qwen_inputs import QWEN25, qwen

DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "examples" / "README.md",
    ROOT / "lmms-eval" / "README.md",
]
#: a Python block that another test runs, by document and first line
RUN_ELSEWHERE = {
    ("README.md", "from accelerate_methods import accelerate, record"): "test_the_quick_start_runs_as_it_stands",
    ("adding_a_method.md", None): "test_example_method_of_the_docs_runs",
    ("adding_a_host.md", None): "test_the_docs_show_it",
    ("native_models.md", None): "test_code_of_the_docs_about_transformers_models_runs",
    ("architectures", None): "test_python_of_the_page_runs",  # all pages of this folder
}
#: how a block says that it cannot run here
NEEDS = re.compile(r"^# needs .+", re.MULTILINE)
PLAIN = {"cp", "export", "eval"}
ENVIRONMENT = {"PYTHON", "VENV", "ACCELERATE_METHODS_IMPORT"}


def blocks(language: str) -> list:
    found = []
    for path in DOCUMENTS:
        for match in re.finditer(rf"^```{language}\n(.*?)^```", path.read_text("utf-8"), re.DOTALL | re.MULTILINE):
            found.append(pytest.param(path, match[1], id=f"{path.relative_to(ROOT)}:{len(found)}"))
    return found


def commands(block: str) -> list[str]:
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#") and " ..." not in line]


SHELL = [
    pytest.param(command, id=f"{block.id}-{number}")
    for block in blocks("bash")
    for number, command in enumerate(commands(block.values[1]))
]


# -- shell -------------------------------------------------------------------------------------------------------------


class Parsed(BaseException):
    """The command line was understood; what it asks for is not done."""


@pytest.fixture
def understood(monkeypatch, capsys):
    """understood(module or file, words): its own parser takes the words."""
    inside = []

    def stopping(original):
        def parse(self, *args, **kwargs):
            if inside:
                return original(self, *args, **kwargs)
            inside.append(self)
            try:
                original(self, *args, **kwargs)
            finally:
                inside.clear()
            raise Parsed

        return parse

    def ask(target: str, words: list[str]) -> None:
        for name in ("parse_args", "parse_known_args"):
            monkeypatch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
        monkeypatch.setattr(sys, "argv", [target, *words])
        monkeypatch.setattr(sys, "path", list(sys.path))
        try:
            if target.endswith(".py") or (ROOT / target).is_dir():
                runpy.run_path(str(ROOT / target), run_name="__main__")
            else:
                runpy.run_module(target, run_name="__main__", alter_sys=False)
        except Parsed:
            return
        except SystemExit as stop:
            raise AssertionError(f"{target} {words}: {stop.code} {capsys.readouterr()}") from None
        raise AssertionError(f"{target} has not read its arguments")

    return ask


def script_words(script: str, words: list[str], variables: dict[str, str], tmp_path: Path) -> list[str]:
    """What a shell script starts Python with."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n', encoding="utf-8")
    fake.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "PYTHON": str(fake), **variables}
    done = subprocess.run(["bash", str(ROOT / script), *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    started = done.stdout.splitlines()
    return started[len(started) - started[::-1].index("-m") :]


@pytest.mark.parametrize(("path", "code"), blocks("bash"))
def test_shell_is_valid(path, code):
    done = subprocess.run(["bash", "-n", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", SHELL)
def test_commands_name_what_exists_and_options_that_exist(command, understood, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words, variables = shlex.split(command, comments=True), {}
    while words and re.match(r"[A-Z_]+=", words[0]):
        name, _, variables_value = words.pop(0).partition("=")
        variables[name] = variables_value
    known = (ROOT / "scripts" / "lib" / "run_eval.sh").read_text(encoding="utf-8").partition("\nsource ")[0]
    assert not [name for name in variables if name not in ENVIRONMENT and not re.search(rf"\b{name}\b", known)]
    program, *rest = words
    if program == "sbatch":
        program, *rest = "bash", *rest[next(i for i, word in enumerate(rest) if not word.startswith("-")) :]
        assert (ROOT / rest[0]).is_file()
        return
    if program == "bash":
        script, *rest = rest
        assert (ROOT / script).is_file()
        if script.startswith(("scripts/eval/", "scripts/data/")) or script == "scripts/reproduce.sh":
            module, *rest = script_words(script, rest, variables, tmp_path)
            understood(module, rest)
    elif program == "python" and rest[0] == "-m":
        if rest[1] == "pytest":
            assert (ROOT / rest[2]).is_file()
        elif rest[1:3] == ["tests.conformance", "tests/golden"]:
            assert importlib.util.find_spec(rest[1]) and (ROOT / rest[2]).is_dir()
        else:
            understood(rest[1], rest[2:])
    elif program == "python":
        assert (ROOT / rest[0]).exists()
        if "argparse" in (text := _source(ROOT / rest[0])) or "bench" in text:
            understood(rest[0], rest[1:])
    elif program == "lmms-eval-accelerate":
        pytest.importorskip("lmms_eval")
        from lmms_eval_accelerate.runs.command_line import own_options

        own_options(rest)
    elif program == "pip":
        for flag, value in itertools.pairwise(rest):
            if flag in ("-c", "-e"):
                assert (ROOT / value.partition("[")[0]).exists()
    else:
        assert program in PLAIN, f"{program}: say here how this is checked"


def _source(path: Path) -> str:
    return "".join(file.read_text("utf-8") for file in ([path] if path.is_file() else path.glob("*.py")))


# -- Python ------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _same_methods():
    """Examples that register a method do so for the length of a test."""
    known = {*registry._registered, *registry.built_in()}
    yield
    for name in {*registry._registered} - known:
        del registry._registered[name]


def deep():
    """A OneVision of as many layers as official ones have, in the tower, too."""
    config = copy.deepcopy(native_model("tiny-llava-onevision").config)
    config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers = 26, 28
    config.text_config.layer_types = 28 * ["full_attention"]
    return LlavaOnevisionForConditionalGeneration(config)


#: page -> the model that its blocks speak of, where it is not the tiny OneVision
MODELS = {"earlytom.md": deep, "pixelprune.md": functools.partial(qwen, QWEN25)}


@pytest.fixture
def names(tiny, loaded):
    """What the blocks take for granted."""
    # methods that act in a deep layer are only attached: as many layers as in a 7B model
    model = tiny("tiny-llava-onevision", num_hidden_layers=28)
    tokenizer = loaded("tiny-llava-onevision")[0]
    return {"accelerate_methods": accelerate_methods, "model": model, "tokenizer": tokenizer}


@pytest.mark.parametrize(("path", "code"), blocks("python"))
def test_python_runs(path, code, names, tmp_path, request):
    known = ((path.name, code.split("\n")[0]), (path.name, None), (path.parent.name, None))
    elsewhere = next((RUN_ELSEWHERE[place] for place in known if place in RUN_ELSEWHERE), None)
    if elsewhere:
        tests = "".join(file.read_text("utf-8") for file in (ROOT / "tests" / "project").glob("test_*.py"))
        assert f"def {elsewhere}(" in tests
        return
    if NEEDS.search(code):
        pytest.skip(NEEDS.search(code)[0])
    if path.name in MODELS:
        names["model"] = MODELS[path.name]()
        request.addfinalizer(functools.partial(accelerate_methods.detach, names["model"]))
    if path.name == "loyalty.md":
        pytest.importorskip("plotly")
        from tests.lmms_eval.report.test_report import write_run

        for name, methods, scores in (("DENSE", [], [1.0, 1.0]), ("OTHER", [{"method": "fastv"}], [1.0, 0.0])):
            names[name] = write_run(tmp_path / name, methods, scores)
        code = code.replace('"videomme", "videomme_perception_score"', '"quiz", "exact_match"')
    exec(compile(code, path.name, "exec"), names)
