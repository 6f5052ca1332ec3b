"""How runs are started: the command for every kind of machine, what is followed, what a failure says."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
from lmms_eval_accelerate import progress
from lmms_eval_accelerate.runs import following, launch
from lmms_eval_accelerate.runs.launch import LaunchError, Machines, execute
from lmms_eval_accelerate.runs.request import Run
from rich.console import Console

from accelerate_methods.stages.errors import MethodError


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def runs_in(folder: Path) -> list[Run]:
    return [Run(name, folder / name, ("--tasks", "t")) for name in ("dense", "fastvid")]


def test_one_process_needs_no_launcher():
    assert Machines().command(["--runs", "x"]) == [sys.executable, "-m", "lmms_eval_accelerate", "--runs", "x"]


def test_several_gpus_and_machines_go_through_accelerate_launch(monkeypatch):
    monkeypatch.setattr(launch, "gpus", lambda: 8)
    machines = Machines(processes=8, machines=2, machine_rank=1, main_ip="10.0.0.1", main_port="29501")
    command = machines.command(["--runs", "x"])
    assert command[1:3] == ["-m", "accelerate.commands.launch"]
    assert option(command, "--num_processes") == "16" and option(command, "--machine_rank") == "1"
    assert option(command, "--main_process_ip") == "10.0.0.1" and option(command, "--main_process_port") == "29501"
    assert command[-4:] == ["-m", "lmms_eval_accelerate", "--runs", "x"]


def test_several_processes_without_gpus_go_through_torchrun(monkeypatch):
    monkeypatch.setattr(launch, "gpus", lambda: 0)
    command = Machines(processes=2, machines=2, machine_rank=1, main_ip="10.0.0.1").command([])
    assert command[1:3] == ["-m", "torch.distributed.run"]
    assert option(command, "--nproc_per_node") == "2" and option(command, "--nnodes") == "2"
    assert option(command, "--node_rank") == "1" and option(command, "--master_addr") == "10.0.0.1"


def test_processes_follow_from_gpus(monkeypatch):
    monkeypatch.setattr(launch, "gpus", lambda: 8)
    assert launch.default_processes() == 8 and launch.default_processes(4) == 2
    monkeypatch.setattr(launch, "gpus", lambda: 0)
    assert launch.default_processes() == 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"processes": 0}, "processes must be at least 1"),
        ({"machines": 2, "machine_rank": 2, "main_ip": "a"}, "it is 0 to 1"),
        ({"machines": 2}, "main_process_ip"),
    ],
)
def test_bad_machines_are_refused(given, says):
    with pytest.raises(MethodError, match=says):
        Machines(**given)


@pytest.fixture
def script(monkeypatch):
    """Let the started command be this Python code, which gets the command's arguments."""
    pytest.importorskip("lmms_eval_accelerate")

    def use(code: str) -> None:
        monkeypatch.setattr(Machines, "command", lambda self, arguments: [sys.executable, "-c", code, *arguments])

    return use


def test_the_plan_says_what_to_run_and_progress_follows_the_output(script, tmp_path, capsys):
    script(
        "import json, sys\n"
        "runs = json.load(open(sys.argv[2]))['runs']\n"
        "print('== run 1/2 is there:', runs[0]['name'])\n"
        "print('== run 2/2 begins:', runs[1]['name'])\n"
        "print('llava_onevision_fastvid: 3/6 answered, 1 s, 1 s left')\n"
        "print('something else')\n"
        "print('== run 2/2 done:', runs[1]['name'])\n"
    )
    execute(runs_in(tmp_path), Machines(), tmp_path / "out", Console(file=io.StringIO()))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "1/2 dense: there already" and printed[1].startswith("2/2 fastvid: ")
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())["runs"]
    assert plan[1] == {"name": "fastvid", "output_path": str(tmp_path / "fastvid"), "argv": ["--tasks", "t"]}
    printed = (tmp_path / "out" / "log.txt").read_text().splitlines()
    assert "something else" in printed
    assert not [line for line in printed if line.startswith("llava_onevision_fastvid:")], "one a second is too many"


def test_a_terminal_gets_bars_with_the_time_left(script, tmp_path):
    lines = ("== run 1/2 begins: dense", "m_fastvid: 3/6 answered, 1 s, 1 s left", "== run 1/2 done: dense")
    script(f"for line in {lines!r}: print(line)")
    shown = io.StringIO()
    execute(runs_in(tmp_path), Machines(), tmp_path, Console(file=shown, force_terminal=True, width=120))
    assert "all runs" in shown.getvalue() and "1/2" in shown.getvalue() and "left" in shown.getvalue()


def test_a_log_is_told_while_a_run_goes_on(script, tmp_path, capsys, monkeypatch):
    """Also where nothing comes from it: weights are loaded for minutes."""
    monkeypatch.setattr(following, "Pace", lambda: progress.Pace(0.05, 0.0))
    monkeypatch.setattr(following, "_TICK", 0.01)
    script(
        "import os, time\n"
        "assert os.environ['LMMS_EVAL_ACCELERATE_PROGRESS_SECONDS'] == '1'\n"
        "time.sleep(0.3); print('== run 1/2 begins: dense', flush=True); time.sleep(0.3)\n"
        "print('m: 3/6 answered, 9 s, 9 s left', flush=True); time.sleep(0.3)\n"
        "print('== run 1/2 done: dense', flush=True)\n"
    )
    execute(runs_in(tmp_path), Machines(), tmp_path / "out", Console(file=io.StringIO()))
    lines = capsys.readouterr().out.splitlines()
    for said in ("2 runs: starting; ", "1/2 dense: loading; ", "1/2 dense: 3/6 answered, 9 s left; "):
        assert any(line.startswith(said) and line.endswith("so far") for line in lines), (said, lines)
    assert re.fullmatch(r"1/2 dense: \d+ s; all runs: about \d+ s left", next(x for x in lines if "all runs" in x))


def test_a_failure_names_the_run_and_shows_the_end_of_the_log(script, tmp_path):
    script("print('== run 2/2 begins: fastvid'); print('Traceback: boom'); raise SystemExit(3)")
    with pytest.raises(LaunchError, match=r"fastvid failed \(exit code 3\)") as failed:
        execute(runs_in(tmp_path), Machines(), tmp_path, Console(file=io.StringIO()))
    assert failed.value.tail[-1] == "Traceback: boom"


def test_a_missing_plugin_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "MODULE", "no_such_plugin")
    with pytest.raises(MethodError, match="pip install"):
        execute(runs_in(tmp_path), Machines(), tmp_path, Console(file=io.StringIO()))
