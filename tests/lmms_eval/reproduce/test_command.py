"""The reproduce command: what is planned, reused, refused and printed; real runs on the embedded model, one killed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lmms_eval_accelerate import model_args as arguments
from lmms_eval_accelerate.reproduce import cli, folders, plan
from lmms_eval_accelerate.reproduce.choice import Choices, select
from lmms_eval_accelerate.reproduce.folders import FolderError
from lmms_eval_accelerate.reproduce.tables import available, load
from lmms_eval_accelerate.runs import launch
from lmms_eval_accelerate.runs.launch import LaunchError, Machines

from accelerate_methods.stages.errors import MethodError, UnknownNameError
from tests.support.paths import ROOT
from tests.support.reproduce_runs import documents, write_run, write_table


@pytest.fixture
def table(tmp_path):
    """Path of the made-up table, with a checkpoint folder."""
    checkpoint = tmp_path / "llava-qwen"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text('{"hidden_size": 3584}')
    return write_table(tmp_path / "tables", columns={"Video": "{benchmark: shapes_video}"}, pretrained=str(checkpoint))


def units_of(table, output, machines=None, **choices):
    chosen = Choices(table="made_up", **choices)
    return plan.plan(select(load(table), chosen), chosen, machines or Machines(), Path(output))


def hashes(table, output, machines=None, **choices):
    return {unit.row: unit.hash for unit in units_of(table, output, machines, **choices)}


def finish(unit, scores=(1.0, 0.0, 1.0), **changes):
    metrics = {unit.task: {"exact_match": sum(scores) / len(scores)}}
    return write_run(unit, {unit.task: documents(list(scores))}, metrics, **changes)


# -- plan --------------------------------------------------------------------------------------------------------------


def test_units_are_dense_first_and_carry_their_settings(table, tmp_path):
    dense, fastv, plain = units_of(table, tmp_path / "out", limit=7, batch_size=2)
    assert [u.row for u in (dense, fastv, plain)] == ["dense", "FastV 50 %", "Random"]  # "Lost" cannot be run
    command = fastv.run().command()
    assert command[1:3] == ["-m", "lmms_eval_accelerate"]
    option = dict(itertools.pairwise(command))
    assert option["--model"] == "llava_onevision_accelerated" and option["--tasks"] == "shapes_video"
    arguments = dict(pair.split("=") for pair in option["--model_args"].split(","))
    assert arguments.pop("pretrained") == str(tmp_path / "llava-qwen")
    assert arguments == {
        **{"max_frames_num": "8", "conv_template": "qwen_1_5"},
        **{"method": "fastv", "k": "2", "retention_ratio": "0.5"},
    }
    assert (option["--limit"], option["--batch_size"]) == ("7", "2")
    assert fastv.folder == tmp_path / "out" / "runs" / "shapes_video" / f"FastV_50_{fastv.hash}"
    assert dense.weights == fastv.weights == plain.weights


def test_the_same_choices_give_the_same_units(table, tmp_path):
    assert hashes(table, tmp_path) == hashes(table, tmp_path / "elsewhere")
    assert len(set(hashes(table, tmp_path).values())) == 3
    # which rows are asked for is no setting of a run
    few = hashes(table, tmp_path, rows=("Random",))
    assert few == {k: v for k, v in hashes(table, tmp_path).items() if k in ("dense", "Random")}


@pytest.mark.parametrize(
    "changes",
    [
        {"limit": 3},
        {"batch_size": 2},
        {"machines": Machines(processes=2)},
        {"machines": Machines(machines=2, main_ip="host")},
        {"machines": Machines(gpus_per_model=2)},
        {"pretrained": "org/other"},
        {"model_args": {"max_frames_num": 16}},
        {"extra": ("--gen_kwargs", "max_new_tokens=4")},
    ],
    ids=lambda changes: next(iter(changes)) + str(next(iter(changes.values())))[-22:],
)
def test_every_setting_changes_every_hash(table, tmp_path, changes):
    before, after = hashes(table, tmp_path), hashes(table, tmp_path, **changes)
    assert before.keys() == after.keys() and not set(before.values()) & set(after.values())


@pytest.mark.parametrize("name", ["code_hash", "versions", "device"])
def test_code_packages_and_device_change_every_hash(table, tmp_path, monkeypatch, name):
    before = hashes(table, tmp_path)
    monkeypatch.setattr(plan, name, lambda: "changed")
    assert not set(before.values()) & set(hashes(table, tmp_path).values())


def test_the_checkpoint_changes_every_hash(table, tmp_path):
    before = hashes(table, tmp_path)
    (tmp_path / "llava-qwen" / "config.json").write_text('{"hidden_size": 896}')
    after = hashes(table, tmp_path)
    (tmp_path / "llava-qwen" / "model.safetensors").write_bytes(b"0" * 5_000_000)
    third = hashes(table, tmp_path)
    os.utime(tmp_path / "llava-qwen" / "model.safetensors", (1, 1))  # as large, but written at another time
    values = [set(h.values()) for h in (before, after, third, hashes(table, tmp_path))]
    assert sum(map(len, values)) == len(set().union(*values)) == 12


def test_a_parameter_of_the_method_changes_its_hash_alone(table, tmp_path):
    before = hashes(table, tmp_path)
    table.write_text(table.read_text().replace("k: 2", "k: 3"))
    after = hashes(table, tmp_path)
    assert [row for row in before if before[row] != after[row]] == ["FastV 50 %"]


def test_data_and_judge_change_the_hash(tmp_path, monkeypatch):
    path = write_table(
        tmp_path / "t", columns={"VideoMME": "{benchmark: videomme}"}, published={"dense": {"VideoMME": 1}}
    )
    data = tmp_path / "data"
    (data / "lmms-eval" / "Video-MME").mkdir(parents=True)
    seen = [hashes(path, tmp_path)["dense"], hashes(path, tmp_path, data=data)["dense"]]
    (data / "lmms-eval" / "Video-MME" / "test.parquet").write_text("rows")
    seen.append(hashes(path, tmp_path, data=data)["dense"])
    (data / "home" / "videomme").mkdir(parents=True)
    (data / "home" / "videomme" / "a.mp4").write_text("frames")
    seen.append(hashes(path, tmp_path, data=data)["dense"])
    (data / "lmms-eval" / "other.parquet").write_text("of another set")
    assert len(set(seen)) == 4 and hashes(path, tmp_path, data=data)["dense"] == seen[3]
    (data / "lmms-eval" / "Video-MME" / "test.parquet").write_text("ROWS")  # as long as before
    seen.append(hashes(path, tmp_path, data=data)["dense"])
    (data / "home" / "videomme" / "a.mp4").write_text("FRAMES")
    os.utime(data / "home" / "videomme" / "a.mp4", (1, 1))
    seen.append(hashes(path, tmp_path, data=data)["dense"])
    assert len(set(seen)) == 6 and hashes(path, tmp_path, data=data)["dense"] == seen[5]
    path = write_table(tmp_path / "t", columns={"QA": "{benchmark: activitynetqa}"}, published={"dense": {"QA": 1}})
    before = hashes(path, tmp_path)["dense"]
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert hashes(path, tmp_path)["dense"] == before
    monkeypatch.setenv("MODEL_VERSION", "another-judge")
    assert hashes(path, tmp_path)["dense"] != before
    assert "secret" not in json.dumps([unit.identity for unit in units_of(path, tmp_path)])


def test_parts_of_one_model_share_units_and_models_stay_together(tmp_path):
    path = write_table(tmp_path / "t", columns={"Video": "{benchmark: shapes_video}"})
    head, part = path.read_text().split("parts:\n")
    other = part.replace("name: seven", "name: other").replace("org/llava-onevision-qwen2-7b-ov", "org/other")
    again = part.replace("name: seven", "name: again").replace("retention_ratio: 0.5", "retention_ratio: 0.1")
    path.write_text(f"{head}parts:\n{part}{other}{again}")
    chosen = Choices(table="made_up")
    selections = select(load(path), chosen)
    units = plan.plan(selections, chosen, Machines(), tmp_path)
    assert len(units) == 3 + 3 + 1
    assert selections[0].units["dense", "Video"] is selections[2].units["dense", "Video"]
    models = [unit.identity["model_args"]["pretrained"] for unit in units]
    assert models == sorted(models, key=models.index) and [u.dense for u in units] == [
        True,
        *[False] * 3,
        True,
        *[False] * 2,
    ]


@pytest.mark.parametrize("name", available())
def test_every_table_makes_units(name):
    """Each row's arguments give the row's method; nothing is planned twice; lmms-eval can read every folder's name."""
    chosen, parts = Choices(table=name), load(name).parts
    if all(part.not_run for part in parts):
        with pytest.raises(MethodError, match=f"nothing of table {name} can be run: .*{parts[0].not_run}"):
            select(load(name), chosen)
        return
    units = plan.plan(select(load(name), chosen), chosen, Machines(), Path("/out"))
    assert units and len({unit.folder for unit in units}) == len(units)
    assert not [unit for unit in units if re.search(r"[,=\s]", str(unit.folder))]


# -- choosing ----------------------------------------------------------------------------------------------------------


def test_rows_are_chosen_by_name_or_method(table):
    (selection,) = select(load(table), Choices("made_up", rows=("fastv", "LOST")))
    assert [row.name for row in selection.rows] == ["dense", "FastV 50 %", "Lost"]
    (selection,) = select(load(table), Choices("made_up", rows=("dense",)))
    assert [row.name for row in selection.rows] == ["dense"]


def test_parts_without_the_chosen_rows_are_left_out():
    selections = select(load("fastvid"), Choices("fastvid", rows=("FastVID 25 %",), columns=("VideoMME",)))
    assert [s.part.name for s in selections] == ["llava-onevision-7b"]
    assert [c.title for c in selections[0].columns] == ["VideoMME"]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"part": "sevn"}, "Did you mean 'seven'"),
        ({"rows": ("FastV 50",)}, "Did you mean 'FastV 50 %'"),
        ({"columns": ("Videos",)}, "Did you mean 'Video'"),
    ],
)
def test_unknown_names_get_the_nearest(table, choices, message):
    with pytest.raises(UnknownNameError, match=message):
        select(load(table), Choices("made_up", **choices))


def test_the_embedded_model_takes_the_place_of_its_family(table, tmp_path):
    dense, *_ = units_of(table, tmp_path, pretrained="embedded")
    assert dense.identity["model_args"]["pretrained"] == str(ROOT / "assets" / "tiny-llava-onevision")
    with pytest.raises(MethodError, match="runs as llava_onevision or llava_video"):
        select(load("fastv"), Choices("fastv", pretrained="embedded"))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"extra": ("--use_cache", "cache")}, "response cache: they have no"),
        ({"extra": ("-c", "cache")}, "response cache"),
        ({"extra": ("--allow_cache",)}, "response cache"),
        ({"extra": ("--use_ca=x",)}, "response cache"),
        ({"extra": ("--limit=3",)}, "use --limit"),
        ({"extra": ("--tasks", "mme")}, "use --columns"),
        ({"model_args": {"pretrained": "x"}}, "Use --pretrained"),
        ({"model_args": {"max_frame_num": 3}}, "Did you mean 'max_frames_num'"),
        ({"model_args": {"gpus_per_model": 2}}, "Use --gpus-per-model"),
        ({"model_args": {"method": "fastv"}}, "not an argument that all rows"),
        ({"model_args": {"conv_template": "a,b"}}, "cannot read a comma"),
        ({"model_args": {"until": "["}}, "left open"),
        ({"extra": ("-x",)}, "-x gives no scores"),
        ({"extra": ("--predict_only",)}, "gives no scores"),
        ({"extra": ("--offset", "5")}, "other documents than the table's"),
        ({"extra": ("-b4",)}, "use --batch-size"),
        ({"extra": ("-cfoo",)}, "response cache"),
        ({"extra": ("-wx",)}, "gives no scores"),
    ],
)
def test_arguments_that_would_spoil_the_table_are_refused(table, tmp_path, choices, message):
    with pytest.raises(MethodError, match=message):
        units_of(table, tmp_path, **choices)


def test_values_are_split_as_lmms_eval_splits_them():
    utils = pytest.importorskip("lmms_eval.utils")
    for text in ("a=/x/b=c,d=1", 'a={"b": [1, 2]},c="x,y"', "a=[1,2],b=none", "a=1"):
        assert arguments.split_arguments(text) == utils._smart_comma_split(text)
    read = arguments.pairs("model_name=/x/b=c,max_frames_num=8,force_sample=True,until=[a,b],x=1e-3")
    assert read == {"model_name": "/x/b=c", "max_frames_num": 8, "force_sample": True, "until": "[a,b]", "x": 0.001}
    with pytest.raises(MethodError, match=r"bracket .* is not closed"):
        arguments.pairs("until=[,x=1e-3")  # lmms-eval takes all of "[,x=1e-3" for the value
    assert arguments.pairs("a=1e-3,b=none") == {"a": 0.001, "b": "none"}
    assert arguments.written("model_base", "/x/b=c") == "/x/b=c"


def checkpoint_folder(path: Path, **config) -> str:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def test_a_checkpoint_for_several_models_needs_a_part(tmp_path):
    rows = {"rows": ("FastVID 10 %",)}
    with pytest.raises(MethodError, match=r"--part: 'log-llava-onevision-7b', 'log-llava-video-7b'"):
        select(load("fastvid"), Choices("fastvid", pretrained="/data/mine", **rows))
    (chosen,) = select(load("fastvid"), Choices("fastvid", pretrained="mine", part="log-llava-video-7b", **rows))
    assert chosen.part.name == "log-llava-video-7b"
    # the two parts that are left have the same model
    choices = Choices("fastvid", pretrained="mine", rows=("FastVID 25 %", "FastV 10 %"))
    assert [s.part.name for s in select(load("fastvid"), choices)] == ["llava-onevision-7b"]
    assert select(load("visionzip"), Choices("visionzip", pretrained="mine", part="llava-1.5-7b"))


def test_commits_of_the_hubs_cache_are_written_down(tmp_path, monkeypatch):
    from huggingface_hub import constants

    table = write_table(tmp_path / "t")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    before = hashes(table, tmp_path)
    assert plan.hub_commits(units_of(table, tmp_path)) == {}
    refs = tmp_path / "models--org--llava-onevision-qwen2-7b-ov" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("0123abcd\n")
    assert plan.hub_commits(units_of(table, tmp_path)) == {"org/llava-onevision-qwen2-7b-ov": "0123abcd"}
    assert hashes(table, tmp_path) == before  # or a killed first command would not find its own units again


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("llava-v1.5-7b", {}, "is a llava model by its name; part seven is llava_onevision"),
        ("LLaVA-Video-7B-Qwen2", {}, "is a llava_video model by its name"),
        ("mine", {"model_type": "qwen2_5_vl"}, "is a qwen2_5_vl model; part seven"),
        ("llava-onevision-qwen2-7b-ov", {"hidden_size": 896}, "has the name of .* hidden_size 896, not 3584"),
        ("llava-onevision-qwen2-0.5b-ov", {"hidden_size": 896, "num_hidden_layers": 24}, None),
        ("my-overfit-model", {"model_type": "llava", "hidden_size": 64}, None),
    ],
)
def test_checkpoints_of_other_families_and_shapes_are_refused(tmp_path, name, config, message):
    table = load(write_table(tmp_path / "t"))
    given = Choices("made_up", pretrained=checkpoint_folder(tmp_path / "w" / name, **config))
    if message is None:
        assert select(table, given)
        return
    with pytest.raises(MethodError, match=message):
        select(table, given)


def test_rows_that_need_more_layers_are_left_out():
    (selection,) = select(load("prunevid"), Choices("prunevid", part="llava-onevision-7b", pretrained="embedded"))
    reasons = {row.name: row.not_run for row in selection.rows}
    assert "too shallow: prunevid: selected_layer=10" in reasons["PruneVid 17 %"] and not reasons["FastV 30 %"]
    chosen = {"part": "llava-onevision-7b", "pretrained": "embedded"}
    with pytest.raises(MethodError, match=r"no row but the dense one .* k=10 is outside"):
        select(load("fastvid"), Choices("fastvid", rows=("FastVID+FastV 9.7 / 3.6 %",), **chosen))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("/c/models--lmms-lab--LLaVA-OneVision/snapshots/0123", "llava-onevision"),
        ("/data/LLaVA-OneVision/", "llava-onevision"),
        ("lmms-lab/llava-onevision", "llava-onevision"),
    ],
)
def test_names_of_checkpoints(given, name):
    from lmms_eval_accelerate.reproduce.choice import model_name

    assert model_name(given) == name


# -- folders -----------------------------------------------------------------------------------------------------------


def test_only_the_units_own_results_are_used(table, tmp_path):
    unit, other, _ = units_of(table, tmp_path)
    assert not folders.is_done(unit)
    finish(unit)
    assert folders.is_done(unit) and not folders.is_done(other)
    folders.note(unit)
    assert folders.is_done(unit) and folders.read_json(unit.folder / "unit.json")["identity"] == unit.identity


def tampered(unit, change):
    path = finish(unit)
    summary = json.loads(path.read_text())
    change(summary)
    path.write_text(json.dumps(summary))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["settings"].update(max_frames_num=16), "max_frames_num is 16 there, not 8"),
        (lambda s: s["settings"].update(pretrained="org/other"), "pretrained is 'org/other' there"),
        (lambda s: s["settings"].update(conv_template="v1"), "conv_template is 'v1' there"),
        (lambda s: s["settings"].update(methods=[]), "methods is "),
        (lambda s: s["settings"]["methods"][0].update(retention_ratio=0.1), "methods is "),
        (lambda s: s["settings"].update(batch_size=4), "batch_size is 4 there, not 1"),
        (lambda s: s["settings"].update(gpus_per_model=2), "gpus_per_model is 2 there, not 1"),
        (lambda s: s["settings"].update(world_size=2), "number of processes is 2 there, not 1"),
        (lambda s: s.update(limit=5.0), "limit is 5.0 there, not None"),
        (lambda s: s.update(tasks={"mme": {}}), "task shapes_video is not among mme"),
        (lambda s: s.update(model="llava_accelerated"), "model is 'llava_accelerated' there"),
        (lambda s: s["versions"].update(torch="1.0"), "version of torch is '1.0' there"),
        (lambda s: s.update(code="other"), "hash of the code .* is 'other' there"),
    ],
)
def test_results_of_other_settings_are_refused(table, tmp_path, change, message):
    unit = units_of(table, tmp_path)[1]
    tampered(unit, change)
    with pytest.raises(FolderError, match=message):
        folders.is_done(unit)


def test_a_folder_of_another_unit_is_refused(table, tmp_path):
    dense, fastv, _ = units_of(table, tmp_path)
    folders.note(dataclasses.replace(dense, folder=fastv.folder))
    with pytest.raises(FolderError, match=r"belongs to another unit .*methods"):
        folders.is_done(fastv)


def test_damaged_files_are_named(table, tmp_path):
    unit, *_ = units_of(table, tmp_path)
    path = finish(unit)
    path.write_text("{")
    with pytest.raises(FolderError, match=f"cannot read {re.escape(str(path))}"):
        folders.is_done(unit)


def test_one_command_per_output_folder(tmp_path):
    holder = (
        "import sys, time; from pathlib import Path; from lmms_eval_accelerate.reproduce.folders import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        message = f"another reproduce command is at work .*process {process.pid}"
        with pytest.raises(FolderError, match=message), folders.locked(tmp_path):
            pass
        with folders.locked(tmp_path, rank=1):  # the other machines of the same command
            pass
    finally:
        process.kill()
        process.wait()
    with folders.locked(tmp_path):  # a killed command holds nothing
        pass


def test_a_file_system_without_locks_is_no_other_command(tmp_path, monkeypatch):
    import errno
    import fcntl

    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    said = []
    with folders.locked(tmp_path, say=said.append):
        assert len(said) == 1 and "No locks available" in said[0]
    assert "process" in (tmp_path / "lock").read_text()


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(table, tmp_path, monkeypatch):
    """command(*arguments): the exit code; runs are made up, ``command.started`` lists them per call of the launcher."""

    def started(runs, machines, folder, console, data=None):
        command.started.append([run.name for run in runs])
        units = {unit.folder: unit for unit in command.units}
        for run in runs:
            if command.fail == run.name:
                raise LaunchError(f"{run.name} failed (exit code 1)", "log.txt", ["the reason why"])
            finish(units[run.output])

    planned = plan.plan

    def remembered(*args):
        command.units = planned(*args)
        return command.units

    def command(*arguments):
        return cli.main([str(table), *arguments])

    command.started, command.units, command.fail = [], [], None
    monkeypatch.setattr(launch, "execute", started)
    monkeypatch.setattr(cli, "plan", remembered)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return command


ALL = ["dense, shapes_video", "FastV 50 %, shapes_video", "Random, shapes_video"]


def test_a_table_is_run_printed_and_stored(command, capsys, tmp_path):
    assert command("--output", "out", "--model-args", "dtype=float32") == 0
    text = capsys.readouterr().out
    assert command.started == [ALL]
    assert "3 runs of table made_up, 0 of them there already" in text and "66.7" in text
    made = json.loads((tmp_path / "out" / "outcome.json").read_text())
    assert made["kind"] == "reproduction" and len(made["runs"]) == 3 and made["code"] and made["versions"]["torch"]
    assert made["choices"]["model_args"] == {"dtype": "float32"}
    assert "A made-up table" in (tmp_path / "out" / "outcome.md").read_text()
    notes = sorted((tmp_path / "out").rglob("unit.json"))
    assert len(notes) == 3 and all("lmms_eval_accelerate" in json.loads(n.read_text())["command"] for n in notes)


def test_a_failure_ends_it_and_the_same_command_goes_on(command, capsys):
    command.fail = ALL[1]
    assert command("--limit", "3") == 1
    text = capsys.readouterr().out
    assert "the reason why" in text and "FastV 50 %, shapes_video failed" in text and "start the same command" in text
    command.fail = None
    assert command("--limit", "3") == 0  # the default output is the same for the same command
    assert command.started == [ALL, ALL[1:]]
    assert "First 3 documents of every task" in capsys.readouterr().out
    assert command("--limit", "3") == 0 and len(command.started) == 2  # nothing left to run
    assert command("--limit", "2") == 0 and command.started[-1] == ALL  # other settings share nothing


def test_settings_do_not_mix_in_one_output_folder(command):
    assert command("--output", "out") == 0
    assert command("--output", "out", "--limit", "3") == 0
    assert command("--output", "out", "--rows", "fastv") == 0
    assert command.started == [ALL, ALL]  # the third needs nothing new


def test_dry_run_prints_commands_that_can_be_pasted(command, capsys, tmp_path):
    assert command("--limit", "3", "--dry-run", "--output", "my out") == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line and line[0] != "#"]
    assert command.started == [] and not (tmp_path / "my out").exists()
    assert len(lines) == 4 and all("lmms_eval_accelerate" in words for words in lines)
    option = dict(itertools.pairwise(lines[1]))
    assert option["--output_path"] == str(command.units[1].folder) and option["--limit"] == "3"
    assert "method=fastv" in option["--model_args"]
    assert lines[3][-2:] == ["--runs", str(tmp_path / "my out" / "launch" / "plan.json")]
    finish(command.units[0])
    command("--limit", "3", "--dry-run", "--output", "my out")
    text = capsys.readouterr().out
    assert "3 runs, 1 of them there already" in text and "dense, shapes_video (there already, is used)" in text
    assert "FastV 50 %, shapes_video (is run)" in text


def test_dry_run_of_many_gpus_and_local_data(command, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "gpus", lambda: 8)
    (tmp_path / "data").mkdir()
    assert command("--dry-run", "--nproc", "8", "--num-machines", "2", "--main-process-ip", "h", "--data", "data") == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith(f"cd {tmp_path / 'data'} && HF_HOME=")
    assert "accelerate.commands.launch" in last and "--num_processes 16 --num_machines 2 --machine_rank 0" in last


def test_another_machine_runs_and_does_not_evaluate(command, capsys, tmp_path):
    machines = ["--num-machines", "2", "--main-process-ip", "host", "--output", "out"]
    assert command(*machines, "--machine-rank", "1") == 0
    assert "rank 0 evaluates" in capsys.readouterr().out and not (tmp_path / "out" / "outcome.json").exists()
    # what is there is named to the launcher all the same: all machines must agree on the list
    command.units = []
    with pytest.raises(FileExistsError):  # the made-up launcher writes each run anew
        command(*machines)
    assert command.started == [ALL, ALL]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "FastVV"], "Did you mean"),
        (["--part", "eight"], "unknown part"),
        (["--num-machines", "2"], "need main_process_ip"),
        (["--machine-rank", "1"], "machine_rank is 1"),
        (["--model-args", "x"], "not of the form name=value"),
        (["--data", "nowhere", "--dry-run"], "does not exist"),
        (["--", "--use_cache", "here"], "response cache"),
    ],
)
def test_errors_come_before_any_run(command, capsys, arguments, message):
    assert command("--output", "out", *arguments) == 2
    assert message in capsys.readouterr().err and command.started == []


def test_missing_data_is_named_before_any_run(tmp_path, capsys, monkeypatch):
    path = write_table(tmp_path / "t", columns={"VideoMME": "{benchmark: videomme}"})
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(launch, "execute", lambda *args: pytest.fail("a run was started"))
    words = [str(path), "--output", str(tmp_path / "out"), "--data", str(tmp_path / "data")]
    assert cli.main(words) == 2
    assert "data is missing: videomme" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert cli.main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("# warning: data is missing: videomme")


def test_a_failure_after_the_runs_is_no_failure_to_start(command, capsys, monkeypatch):
    def fail(*args):
        raise MethodError("no metric exact_match")

    monkeypatch.setattr(cli.outcome, "evaluate", fail)
    assert command("--output", "out") == 1
    text = capsys.readouterr().out
    assert "no metric exact_match" in text and "The runs are done and kept in" in text


def test_relative_paths_hold_in_another_working_directory(command, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "my" / "tasks").mkdir(parents=True)
    given = ["--model-args", "model_base=base,conv_template=v1", "--dry-run"]
    assert command(*given, "--", "--include_path", "my/tasks", "--include_path=my", "--gen_kwargs", "a=my") == 0
    unit = command.units[0]
    assert unit.identity["model_args"]["model_base"] == str(tmp_path / "base")
    assert unit.identity["model_args"]["conv_template"] == "v1"
    wanted = ["--include_path", str(tmp_path / "my" / "tasks"), f"--include_path={tmp_path / 'my'}"]
    assert unit.identity["extra"] == [*wanted, "--gen_kwargs", "a=my"]


def test_relative_caches_hold_in_another_working_directory(tmp_path, monkeypatch):
    from lmms_eval_accelerate.benchmarks.catalog import offline_environment

    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("HF_HOME", "hf")
    for name in ("HF_HUB_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.delenv(name, raising=False)
    assert offline_environment(Path("data"))[1]["HF_HUB_CACHE"] == str(tmp_path / "hf" / "hub")
    monkeypatch.setenv("HF_HUB_CACHE", "weights")
    assert offline_environment(Path("data"))[1]["HF_HUB_CACHE"] == str(tmp_path / "weights")


def test_the_tiny_model_gets_one_process(monkeypatch):
    """Its table names it by an absolute path."""
    monkeypatch.setattr(launch, "default_processes", lambda gpus: 8)

    def processes(**choices):
        chosen = Choices(**choices)
        args = cli.parser().parse_args(["x"])
        return cli._machines(args, chosen, select(load(chosen.table), chosen)).processes

    assert processes(table="embedded") == processes(table="fastvid", pretrained="embedded") == 1
    assert processes(table="fastvid") == 8


def test_bad_numbers_and_tables(capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        cli.main(["fastvid", "--limit", "0"])
    assert stop.value.code == 2 and "whole number above 0" in capsys.readouterr().err
    assert cli.main(["fastvd"]) == 2 and "Did you mean 'fastvid'" in capsys.readouterr().err


def test_judged_columns_are_refused_without_a_key(tmp_path, capsys, monkeypatch):
    columns = {"Video": "{benchmark: shapes_video}", "QA": "{benchmark: activitynetqa}"}
    path = write_table(tmp_path / "t", columns=columns, published={"dense": {"QA": 1}})
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert cli.main([str(path), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "OPENAI_API_KEY" in error and "--columns Video" in error and not (tmp_path / "out").exists()


def test_tables_rows_and_columns_are_listed(capsys, monkeypatch):
    assert cli.main(["--list"]) == 0
    assert all(name in capsys.readouterr().out for name in ["fastvid"]) and cli.main(["fastvid", "--list"]) == 0
    text = capsys.readouterr().out
    assert "--part llava-onevision-7b" in text and "row    FastVID 25 %" in text and "column VideoMME" in text


def test_leaderboard_command(command, capsys, tmp_path):
    command("--output", "out")
    assert cli.main(["leaderboard", str(tmp_path / "out" / "outcome.json"), "--output", "boards/board.md"]) == 0
    assert "[1](../out/outcome.json)" in (tmp_path / "boards" / "board.md").read_text()


def test_script_prints_its_commands():
    environment = {"PYTHON": sys.executable, "NUM_PROCESSES": "2"}
    words = ["bash", str(ROOT / "scripts" / "reproduce.sh"), "embedded", "--rows", "fastv", "--limit", "4", "--dry-run"]
    done = subprocess.run(words, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--nproc_per_node 2" in done.stdout and "method=fastv" in done.stdout and "--limit 4" in done.stdout
    # an option before the table, and arguments for lmms-eval behind it
    words = [*words[:2], "--part", "tiny-llava-onevision", "embedded", "--rows", "fastv", "--dry-run"]
    words += ["--", "--seed", "1"]
    done = subprocess.run(words, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--nproc_per_node 2" in done.stdout and "--seed 1" in done.stdout


# -- real runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what runs: an edit of the working tree while the tests run would (rightly) make results unusable."""
    pytest.importorskip("lmms_eval")
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("accelerate_methods", "llava", "configs", "assets"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    plugin = Path("lmms-eval", "lmms_eval_accelerate")  # which finds the assets two folders above
    shutil.copytree(ROOT / plugin, copy / plugin)
    return copy


def reproduce(checkout: Path, output: Path, table: str, *arguments: str, **options) -> subprocess.Popen:
    words = [sys.executable, "-m", "lmms_eval_accelerate.reproduce", table, "--output", str(output), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    environment["PYTHONPATH"] = os.pathsep.join([str(checkout), str(checkout / "lmms-eval")])
    return subprocess.Popen(
        words, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def numbers(output: Path) -> list:
    """What must not depend on whether a run was interrupted. Times are measured anew, and the first answer of every
    process is left out of the mean costs as its warm-up, so that means over other questions remain."""
    made = json.loads((output / "outcome.json").read_text())
    kept = []
    for row in made["parts"][0]["rows"]:
        for title, cell in row["cells"].items():
            cell = {k: v for k, v in cell.items() if k not in ("folder", "hash", "speedup")}
            cell["costs"] = {k: round(v) for k, v in cell["costs"].items() if k.startswith("visual_tokens")}
            cell |= {share: round(cell[share], 2) for share in ("flops_share", "visual_tokens_share")}
            kept.append((row["name"], title, cell))
    return kept


def answers(output: Path) -> dict[str, list[str]]:
    """Lines of the journals of unfinished runs."""
    found = {}
    for path in output.rglob("answers/rank*.jsonl"):
        found[path.parent.parent.name] = path.read_text().splitlines()
    return found


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_stopped(checkout, tmp_path):
    few = ("embedded", "--rows", "fastvid@0.1", "fastv@0.1", "--columns", "shapes_video", "--limit", "32")
    whole = reproduce(checkout, tmp_path / "whole", *few)
    text, _ = whole.communicate(timeout=600)
    assert whole.returncode == 0, text
    assert "First 32 documents of every task: not the paper's numbers." in text and "fastvid@0.1" in text

    killed = reproduce(checkout, tmp_path / "killed", *few, start_new_session=True)
    try:
        deadline = time.time() + 300
        while time.time() < deadline and killed.poll() is None:
            done = list((tmp_path / "killed").rglob("summary.json"))
            if done and any(len(lines) >= 2 for lines in answers(tmp_path / "killed").values()):
                break
            time.sleep(0.005)
        assert killed.poll() is None, killed.stdout.read()
    finally:
        os.killpg(killed.pid, signal.SIGKILL)  # the launcher's children end with it
        killed.communicate()
    wait_for_end(tmp_path / "killed")
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("summary.json")}
    journals = answers(tmp_path / "killed")
    assert 1 <= len(finished) < 3 and not (tmp_path / "killed" / "outcome.json").exists()
    ((interrupted, kept),) = journals.items()
    assert 2 <= len(kept) < 32, "killed too late"

    again = reproduce(checkout, tmp_path / "killed", *few)
    text, _ = again.communicate(timeout=600)
    assert again.returncode == 0, text
    assert f"3 runs of table embedded, {len(finished)} of them there already" in text
    assert {path: path.stat().st_mtime_ns for path in finished} == finished  # not run again
    log = (tmp_path / "killed" / "launch" / "log.txt").read_text()
    whole_lines = sum(line.startswith("{") and line.endswith("}") for line in kept)
    assert f"{whole_lines} of 32 answers were given before" in log  # so only the others were generated
    assert interrupted in {p.parent.name for p in (tmp_path / "killed").rglob("summary.json")}
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")


@pytest.mark.slow
def test_a_papers_table_runs_on_made_up_documents(checkout, tmp_path):
    """Stock tasks, offline, with the tiny model in the place of the paper's; and what is then said of the numbers."""
    made_up = ("--pretrained", "embedded", "--data", str(ROOT / "tests" / "fixtures"))
    part = ("--part", "llava-onevision-7b", "--rows", "FastVID 25 %", "--columns", "VideoMME", "MLVU")
    process = reproduce(checkout, tmp_path / "out", "fastvid", *part, *made_up)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    made = json.loads((tmp_path / "out" / "outcome.json").read_text())
    dense, fastvid = made["parts"][0]["rows"]
    for title in ("VideoMME", "MLVU"):
        cell = fastvid["cells"][title]
        assert cell["documents"] == dense["cells"][title]["documents"] == cell["members"] == cell["kl_documents"] > 0
        assert cell["visual_tokens_share"] < 0.3 and cell["low"] <= cell["change"] <= cell["high"]
        assert cell["published"] is not None and cell["difference"] is None
    assert any(w.startswith("VideoMME: the data has") for w in made["warnings"])


def wait_for_end(output: Path) -> None:
    """Until no process works in ``output``: the lock of a run is free when its process has ended."""
    import fcntl

    for _ in range(600):
        held = False
        for claim in output.rglob("run.json"):
            with claim.open("r+") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    held = True
        if not held:
            return
        time.sleep(0.05)
    raise AssertionError("a process of the killed command is still there")
