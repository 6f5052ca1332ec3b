"""``-h`` of the commands: it answers, and loads nothing that takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

pytest.importorskip("lmms_eval_accelerate")

HEAVY = ("torch", "transformers", "lmms_eval", "datasets", "matplotlib", "plotly")
COMMANDS = {
    "lmms_eval_accelerate": "--resume",
    "lmms_eval_accelerate.compare": "--dry-run",
    "lmms_eval_accelerate.reproduce": "Tables: ",
    "lmms_eval_accelerate.report": "--output",
    "lmms_eval_accelerate.benchmarks": "prepare",
}
RUN = """
import runpy, sys
sys.argv[1:] = ["-h"]
try:
    runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
except SystemExit as stop:
    assert not stop.code, stop.code
print("loaded:", [name for name in {heavy!r} if name in sys.modules])
"""


@pytest.mark.parametrize(("module", "says"), COMMANDS.items())
def test_help_loads_nothing_heavy(module, says):
    code = RUN.format(module=module, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout and done.stdout.splitlines()[-1] == "loaded: []"


def test_a_mistake_is_said_before_anything_is_loaded():
    command = [sys.executable, "-X", "importtime", "-m", "lmms_eval_accelerate.compare", "--confg", "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "--confg" in done.stderr and "lmms_eval_accelerate.compare.cli" not in done.stderr


@pytest.mark.parametrize("script", ["scripts/reproduce.sh", "scripts/report.sh"])
def test_scripts_hand_help_through(script):
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(["bash", str(ROOT / script), "-h"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: python -m lmms_eval_accelerate" in done.stdout, done.stderr


def test_scripts_without_arguments_do_not_run_on_help():
    script = str(ROOT / "scripts" / "bench" / "gpu_matrix.sh")
    environment = os.environ | {"PYTHON": "/nowhere/python"}  # nothing could be run
    done = subprocess.run(["bash", script, "--help"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "MODELS    shapes" in done.stdout and not done.stderr
    done = subprocess.run(["bash", script, "llava"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "takes no arguments (llava)" in done.stderr


def test_reproduce_says_which_variables_it_does_not_read():
    environment = os.environ | {"PYTHON": "/nowhere/python", "LIMIT": "5", "TASKS": "mme"}
    command = ["bash", str(ROOT / "scripts" / "reproduce.sh"), "--list"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "LIMIT=5 is ignored" in done.stderr and "write --limit" in done.stderr and "TASKS=mme is ign" in done.stderr
    assert "METHODS" not in done.stderr


def test_scripts_take_paths_from_where_they_are_started(tmp_path):
    script = ROOT / "scripts" / "eval" / "fastvid_llava_onevision.sh"
    environment = os.environ | {"PYTHON": sys.executable, "OUTPUT": "here", "DRY_RUN": "1"}
    done = subprocess.run(["bash", str(script)], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and f"--output_path {tmp_path / 'here'}/" in done.stdout, done.stderr
