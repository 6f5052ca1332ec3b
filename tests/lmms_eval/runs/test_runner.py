"""The runner behind the commands, the files it leaves, and the text of what a run is asked."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval_accelerate")

from lmms_eval_accelerate import model_args
from lmms_eval_accelerate.runs import files, launch
from lmms_eval_accelerate.runs.launch import Machines
from lmms_eval_accelerate.runs.request import Request, Run
from lmms_eval_accelerate.runs.runner import Runner, differing
from rich.console import Console

from accelerate_methods.stages.errors import MethodError

TWO = {"machines": 2, "main_ip": "host"}


@pytest.fixture
def started(monkeypatch) -> list[list[str]]:
    """Names of the runs of each call of the launcher."""
    calls: list[list[str]] = []
    monkeypatch.setattr(launch, "execute", lambda runs, *rest: calls.append([run.name for run in runs]))
    monkeypatch.setattr(launch, "gpus", lambda: 0)
    return calls


def runner_on(folder: Path, **machines) -> Runner:
    return Runner(Machines(**machines), folder, None, Console(file=io.StringIO()))


def runs_in(folder: Path) -> list[Run]:
    return [Run(name, folder / name, ("--tasks", "t")) for name in ("dense", "fastvid")]


def test_only_what_is_left_is_noted_and_started(started, tmp_path):
    noted = []
    runner_on(tmp_path).run(runs_in(tmp_path), lambda run: run.name == "dense", lambda run: noted.append(run.name))
    assert started == [["fastvid"]] and noted == ["fastvid"]
    runner_on(tmp_path).run(runs_in(tmp_path), lambda run: True, noted.append)
    assert started == [["fastvid"]] and noted == ["fastvid"]


@pytest.mark.parametrize("rank", [0, 1])
def test_all_machines_are_told_the_same_list_and_the_first_makes_the_table(started, tmp_path, rank):
    noted = []
    runner = runner_on(tmp_path, machine_rank=rank, **TWO)
    runner.run(runs_in(tmp_path), lambda run: run.name == "dense", lambda run: noted.append(run.name))
    assert started == [["dense", "fastvid"]] and noted == (["fastvid"] if rank == 0 else [])
    assert runner.evaluates == (rank == 0)


def test_printed_commands_are_those_that_are_started(started, tmp_path):
    runner = runner_on(tmp_path / "a b")
    words = shlex.split(runner.command(runs_in(tmp_path)[0]))
    assert words[1:] == ["-m", "lmms_eval_accelerate", *runs_in(tmp_path)[0].arguments()]
    assert shlex.split(runner.command_of_all())[-2:] == ["--runs", str(tmp_path / "a b" / "plan.json")]


def test_a_request_as_words():
    asked = Request("m", {"pretrained": "x", "flag": True, "none": None, "sizes": [1, 2]}, "a,b", 2, 5, ("--seed", "1"))
    assert asked.argv() == (
        *("--model", "m", "--model_args", "pretrained=x,flag=true,none=none,sizes=[1, 2]"),
        *("--tasks", "a,b", "--batch_size", "2", "--limit", "5", "--seed", "1"),
    )
    assert "--limit" not in Request("m", {}, "a").argv()
    with pytest.raises(MethodError, match="cannot read a comma"):
        Request("m", {"pretrained": "a,b"}, "t").argv()


def test_values_as_lmms_eval_leaves_them():
    assert [model_args.meant(value) for value in ("None", "null", "[1]", '{"a": 1}', "x", 3)] == [
        *(None, None, [1], {"a": 1}, "x", 3)
    ]
    with pytest.raises(MethodError, match="looks like JSON"):
        model_args.meant("[a]")


def test_differing_names_the_keys():
    assert differing({"a": 1, "c": 3}, {"a": 1, "b": 2}) == ["b", "c"] and differing({"a": 1}, {"a": 1}) == []


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": Path("b")})
    assert json.loads(path.read_text()) == {"a": "b"} and path.read_text().endswith("\n")

    def killed(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        files.write_json(path, {"a": "c"})
    assert json.loads(path.read_text()) == {"a": "b"}


def test_names_on_other_machines():
    assert [files.of_machine("plan.json", rank) for rank in (0, 2)] == ["plan.json", "plan_2.json"]


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(MethodError, match=r"cannot read .*x\.json"):
        files.read_json(tmp_path / "x.json")


def test_a_lock_is_held_until_the_file_is_closed(tmp_path):
    pytest.importorskip("fcntl")
    with open(tmp_path / "lock", "a") as second:
        with open(tmp_path / "lock", "a") as first:
            assert files.lock(first) == ""
            with pytest.raises(BlockingIOError):
                files.lock(second)
        assert files.lock(second) == ""
