"""The comparison behind scripts/eval/*.sh: which commands it runs, what it reads, what it shows, how it fails."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

pytest.importorskip("lmms_eval")

from lmms_eval_accelerate.compare import cli as compare
from lmms_eval_accelerate.compare import pictures
from lmms_eval_accelerate.compare import table as comparison
from lmms_eval_accelerate.compare.comparison import Comparison, comparison_of
from lmms_eval_accelerate.distributions import pack
from lmms_eval_accelerate.runs import launch
from lmms_eval_accelerate.runs.launch import FAILED_MARK

import accelerate_methods
from accelerate_methods.registry import compatibility
from accelerate_methods.registry.configs import config_names, read_config
from accelerate_methods.registry.pipeline import resolve
from accelerate_methods.registry.settings import Setting, has_budget
from accelerate_methods.registry.settings import settings_of as parse_settings


def plan_of(*argv: str) -> Comparison:
    return comparison_of(compare.wanted_of(compare.parser().parse_args(list(argv))))


def machines_of(*argv: str) -> launch.Machines:
    args = compare.parser().parse_args(list(argv))
    return compare.machines_of(args, tiny=args.pretrained is None)


def command_of(plan: Comparison, setting: Setting) -> list[str]:
    return plan.run(setting).command()


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def settings_of(words: str, retention: float = 0.1, config: str = "fastvid/llava_onevision") -> list[Setting]:
    content = read_config(config)
    return parse_settings(words, retention, content, content["model"]["family"])


def test_settings_take_their_own_ratio_or_the_common_one():
    settings = settings_of("dense fastvid random@0.25,fastvid, prunevid")
    assert [s.label for s in settings] == ["dense", "fastvid@0.1", "random@0.25", "prunevid"]


def test_settings_take_parameters():
    settings = settings_of("dycoke(k=0.3,p=0.5) dycoke(dp=false), fastvid@0.2(c=4)")
    assert [s.label for s in settings] == [
        "dycoke(k=0.3,p=0.5)",
        "dycoke(dp=False)",
        "fastvid(retention_ratio=0.2,c=4)",
    ]
    assert settings[1].params == (("dp", False),)
    command = command_of(plan_of(), settings[0])
    assert option(command, "--model_args").endswith("config=dycoke/llava_onevision,k=0.3,p=0.5")
    # lmms-eval reads its arguments as k=v pairs: neither sign may stand in a folder's name
    assert option(command, "--output_path").endswith("/dycoke_k-0.3_p-0.5") and settings[2].folder == (
        "fastvid_retention_ratio-0.2_c-4"
    )
    assert Setting.of("fastvid", retention_ratio=0.1).folder == "fastvid@0.1" and Setting().folder == "dense"


def test_levels_are_those_of_the_config():
    labels = [s.label for s in settings_of("levels")]
    assert labels == ["dense", "fastvid@0.25", "fastvid@0.2", "fastvid@0.15", "fastvid@0.1"]
    assert [s.label for s in settings_of("levels", config="dycoke/llava_onevision")] == [
        *("dense", "dycoke(k=0.3)", "dycoke(k=0.5)", "dycoke(k=0.7)")
    ]


def test_combinations_are_settings_too():
    plain, tuned = settings_of("visionzip+fastv visionzip+fastv(fastv.k=3,visionzip.retention_ratio=0.2)")
    assert (plain.label, plain.params) == ("visionzip+fastv", ())
    assert tuned.params == (("fastv.k", 3), ("visionzip.retention_ratio", 0.2))
    command = command_of(plan_of(), tuned)
    assert option(command, "--model_args").endswith("method=visionzip+fastv,fastv.k=3,visionzip.retention_ratio=0.2")


def test_all_leaves_out_what_the_family_cannot_run():
    names = [s.method for s in settings_of("all", config="fastv/llava_1_5")]
    assert {"fastv", "fastervlm", "visionzip"} <= set(names) and not {"fastvid", "dycoke", "prunevid"} & set(names)


def test_all_means_dense_and_every_method_that_the_family_can_run():
    settings = settings_of("all", 0.2)
    fit = [n for n in accelerate_methods.available() if compatibility.runs_on(n, "llava_onevision") and n != "aks"]
    assert len(fit) > 20  # AKS needs the weights of its scorer
    assert [s.label for s in settings_of("aks", 0.2)] == ["aks"]
    expected = [f"{n}@0.2" if has_budget(n) else n for n in fit]
    assert [s.label for s in settings] == ["dense", *expected]
    assert settings_of("all@0.2", 0.1) == settings


def test_methods_take_the_config_of_their_own_for_this_model():
    embedded, real = plan_of(), plan_of("--pretrained", "org/model", "--config", "fastvid/llava_video")
    assert embedded.config_of("fastvid") == "fastvid/llava_onevision" and embedded.config_of("random_prefill") is None
    assert real.config_of("random") == "random/llava_video"
    # the embedded model is a OneVision model, whatever model the config is for
    other = plan_of("--config", "fastv/llava_1_5")
    assert other.family == "llava_onevision" and other.config_of("fastv") == "fastv/llava_onevision"


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("fastvd", "Did you mean 'fastvid'"),
        ("fastvid@7", "outside the allowed"),
        ("fastvid@x", "not a retention ratio"),
        ("dycoke(kk=0.3)", "Did you mean 'k'"),
        ("dycoke(k", "cannot read"),
        ("dycoke(k)", "no parameter"),
    ],
)
def test_bad_methods_fail_before_any_run(methods, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        compare.main(["--methods", methods, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("dense@0.5", "@0.5 would be ignored"),
        ("dense(k=2)", "k=2 would be ignored"),
        ("levels@0.2", "@0.2 would be ignored"),
        ("all(k=2)", "k=2 would be ignored"),
        ("fastvid@0", r"outside the allowed range \(0, 1\]"),
        ("fastvid@nan", "must be a number"),
        ("fastvid@0.1(retention_ratio=0.3)", "there twice"),
        ("fastvid(c=4,c=5)", "there twice"),
        ("fastvid(method=3)", "unknown parameter of method 'fastvid': 'method'"),
        (" , ", "names none"),
    ],
)
def test_words_that_would_be_ignored_are_errors(methods, message):
    with pytest.raises(accelerate_methods.MethodError, match=message):
        settings_of(methods)


def asked(words: str, share: float, config: str = "fastvid/llava_onevision") -> list[str]:
    content = read_config(config)
    return [s.label for s in parse_settings(words, 0.1, content, content["model"]["family"], share)]


def test_a_common_ratio_goes_to_whom_it_means():
    assert asked("dense fastvid random@0.5 dycoke(k=0.3)", 0.2) == [
        "dense",
        "fastvid@0.2",
        "random@0.5",
        "dycoke(k=0.3)",
    ]
    assert asked("fastvid(c=4)", 0.2) == ["fastvid(retention_ratio=0.2,c=4)"]  # what is in brackets comes on top
    assert asked("fastvid(tokens_per_frame=9) random", 0.2) == ["fastvid(tokens_per_frame=9)", "random@0.2"]
    assert {"fastvid@0.2", "dycoke"} <= set(asked("all", 0.2))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("dycoke", "dycoke has no retention_ratio"),
        ("fastvid dycoke", "dycoke has no retention_ratio"),
        ("visionzip+fastv", "has no retention_ratio"),
        ("dense", "changes nothing"),
        ("levels", "changes nothing"),
        ("dense fastvid@0.1", "changes nothing"),
        ("fastvid(tokens_per_frame=9)", "changes nothing"),
    ],
)
def test_a_common_ratio_that_means_nothing_is_an_error(words, message):
    with pytest.raises(accelerate_methods.MethodError, match=message):
        asked(words, 0.2)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--retention-ratio", "0"], "'0' is not a number above 0 and up to 1"),
        (["--retention-ratio", "1.5"], "above 0 and up to 1"),
        (["--retention-ratio", "nan"], "above 0 and up to 1"),
        (["--num-processes", "0"], "'0' is not a whole number above 0"),
        (["--batch-size", "0"], "not a whole number above 0"),
        (["--batch-size", "auto"], "not a whole number above 0"),
        (["--limit", "0"], "not a number of documents"),
        (["--limit", "few"], "not a number of documents"),
        (["--methods", " "], "is empty"),
        (["--pretrained", ""], "is empty"),
        (["--tasks", ""], "is empty"),
        (["--output", ""], "is empty"),
        (["--machine-rank", "-1"], "machine_rank is -1"),
        (["--config", "dycoke/llava_onevision", "--retention-ratio", "0.2"], "dycoke has no retention_ratio"),
        (["--methods", "dense", "--retention-ratio", "0.2"], "changes nothing"),
        (["--methods", "dense@0.5"], "would be ignored"),
        (["--model-args", "max_frames_num=0"], "max_frames_num must be a whole number from 1, not 0"),
        (["--model-args", "use_cache=no"], "use_cache must be true or false, not 'no'"),
        (["--model-args", "conv_template="], "conv_template= is empty"),
        (["--model-args", "method=fastvid"], "Use --methods"),
        (["--model-args", "pretrained=x"], "Use --pretrained"),
        (["--model-args", "retention_ratio=0.2"], "parameters of methods stand in --methods"),
        (["--full", "--tasks", "shapes_video"], "with --tasks .* it means nothing"),
        (["--full", "--pretrained", "org/model"], "with --pretrained it means nothing"),
        (["--picture", "nowhere.mp4"], "no such file"),
        (["--picture", __file__], "neither a video nor a picture"),
        (["--main-process-port", "99999"], "not a port"),
        (["--tasks", "shapes_vidoe"], "unknown task 'shapes_vidoe'. Did you mean 'shapes_video'"),
        (["--tasks", "shapes_video,"], "an empty name"),
        (["--tasks", "shapes_video,shapes_video"], "is there twice"),
        (["--tasks", "'shapes_video'"], "Did you mean 'shapes_video'"),
        (["--model-args", "max_frames_num=8,,"], "an empty piece"),
        (["--model-args", "max_frames_num=8,max_frames_num=9"], "max_frames_num is there twice"),
        (["--model-args", "conv_template='a"], "is not closed"),
        (["--model-args", "=3"], "not of the form name=value"),
        (["--model-args", "conv_template=nosuch"], "unknown value of model argument conv_template"),
        (["--model-args", "dtype=half"], "unknown value of model argument dtype"),
        (["--model-args", "torch_dtype=half"], "unknown value of model argument dtype"),
        (["--model-args", "attn_implementation=fast"], "unknown value of model argument attn_implementation"),
        (["--model-args", "mm_spatial_pool_mode=median"], "unknown value of model argument mm_spatial_pool_mode"),
        (["--model-args", "mm_newline_position=end"], "unknown value of model argument mm_newline_position"),
        (["--methods", "fastvid(retention_ratio=[)"], "parameter 'retention_ratio': cannot read"),
        (["--data", "/nowhere"], "data folder /nowhere does not exist"),
        (["--data", str(ROOT / "docs"), "--tasks", "mme"], "data is missing: mme"),
        (["--pretrained", "/nowhere"], "cannot reach checkpoint '/nowhere': no such folder"),
        (["--pretrained", str(ROOT / "docs")], "not a checkpoint: it has no config.json"),
        (["--output", __file__], "is no folder"),
        (["--output", f"{__file__}/below"], "is no folder"),
        (["--output", "a,b"], "lmms-eval cannot read"),
        (["--output", "a=b"], "lmms-eval cannot read"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["start", "dry run"])
def test_arguments_that_would_be_ignored_start_nothing(argv, more, message, capsys, tmp_path, monkeypatch):
    """Nor does a dry run print commands that would fail."""
    monkeypatch.setattr(launch, "execute", lambda *args: pytest.fail("a run was started"))
    with pytest.raises(SystemExit) as stop:
        compare.main([*argv, *more, *([] if "--output" in argv else ["--output", str(tmp_path / "out")])])
    printed, said = capsys.readouterr()
    assert stop.value.code == 2 and re.search(message, said) and len(said.strip().splitlines()) == 1 and not printed
    assert said.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_hub_that_cannot_be_reached_is_told_before_anything_starts(tmp_path, monkeypatch, capsys):
    """Printed commands may be for another machine: a dry run does not ask."""
    monkeypatch.setattr(launch, "execute", lambda *args: pytest.fail("a run was started"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    compare.main(["--pretrained", "org/no-such-model", "--dry-run"])
    with pytest.raises(SystemExit, match="cannot reach checkpoint 'org/no-such-model'"):
        compare.main(["--pretrained", "org/no-such-model", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "out"))

    access = os.access
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path and access(place, mode))
        for more in ([], ["--dry-run"]):
            with pytest.raises(SystemExit, match="no permission to write"):
                compare.main(["--output", str(tmp_path / "out"), *more])
    monkeypatch.setattr("lmms_eval_accelerate.compare.comparison.write_json", full)
    with pytest.raises(SystemExit, match="No space left on device") as stop:
        compare.main(["--output", str(tmp_path / "out")])
    assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_names_with_spaces_and_of_relative_paths(tmp_path, monkeypatch, capsys):
    """What lmms-eval would not find is put right: spaces behind commas, folders of this working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "template.yaml").write_text("method: fastvid\nparams: {p: 2}\nmodel: llava_onevision\n")
    compare.main(["--tasks", "shapes_video, easy_vqa", "--output", "a b", "--config", "template.yaml", "--methods",
                  "fastvid", "--model-args", " max_frames_num = 8 ", "--dry-run"])  # fmt: skip
    command = shlex.split(capsys.readouterr().out.splitlines()[0])
    assert option(command, "--tasks") == "shapes_video,easy_vqa"
    assert option(command, "--output_path") == str(tmp_path / "a b" / "fastvid@0.1")
    assert f"config={tmp_path / 'template.yaml'}" in option(command, "--model_args")
    assert "max_frames_num=8," in option(command, "--model_args")


def test_an_interrupted_comparison_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "execute", interrupted)
    with pytest.raises(SystemExit) as stop:
        compare.main(["--output", str(tmp_path / "a b")])
    said = capsys.readouterr().err
    assert stop.value.code == 130 and said.count("\n") == 1 and f"--output '{tmp_path / 'a b'}'" in said
    monkeypatch.setattr(compare, "comparison_of", interrupted)
    with pytest.raises(SystemExit, match="130"):
        compare.main([])
    assert capsys.readouterr().err == "interrupted; nothing was started\n"


def test_expected_reasons_come_first_and_once(tmp_path, monkeypatch, capsys):
    """Of an error that says everything, the log's end is not shown; of any other it follows."""
    monkeypatch.setenv("COLUMNS", "40")
    long = "a reason " * 20
    for reason, more in ((f"cannot read x.mp4: {long}", False), (f"KeyError: {long}", True)):
        script = f"print('== run 1/2 begins: dense'); print('trace'); print({FAILED_MARK + reason!r}); exit(3)"
        command = [sys.executable, "-c", script]
        monkeypatch.setattr(launch.Machines, "command", lambda self, arguments, command=command: command)
        with pytest.raises(SystemExit) as stopped:
            compare.main(["--methods", "dense fastvid", "--output", str(tmp_path / "out")])
        first, *rest = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 1
        assert first.startswith(f"error: dense failed (exit code 3): {reason.strip()} ")
        assert ("trace" in rest) == bool(rest) == more


def test_a_config_without_parameters_method_or_model(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("method: fastvid\nmodel: llava_onevision\n", encoding="utf-8")
    compare.main(["--config", str(file), "--methods", "dense fastvid", "--dry-run"])
    assert "retention_ratio=0.1" in capsys.readouterr().out
    for text, key in (("method: fastvid\n", "model"), ("methods: [fastvid]\nmodel: llava_onevision\n", "method")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit, match=f"has no '{key}', and a comparison needs it"):
            compare.main(["--config", str(file), "--dry-run"])


def test_an_empty_variable_is_one_that_is_not_set(monkeypatch):
    monkeypatch.setenv("GPUS_PER_MODEL", "")
    assert machines_of().gpus_per_model == 1
    monkeypatch.setenv("GPUS_PER_MODEL", "0")
    with pytest.raises(SystemExit):
        machines_of()


def test_another_model_of_transformers_gets_the_values_of_a_config_not_its_name(tmp_path):
    """A run refuses a config of another model; a comparison says the values itself."""

    def arguments(pretrained: str, setting: Setting) -> dict[str, str]:
        plan = plan_of("--config", "fastvid/qwen2_5_vl", "--pretrained", pretrained)
        argv = plan.run(setting).argv
        return dict(pair.split("=") for pair in argv[argv.index("--model_args") + 1].split(","))

    setting = Setting.of("fastvid", tokens_per_frame=9)
    own = arguments("Qwen/Qwen2.5-VL-7B-Instruct", setting)
    assert own["config"] == "fastvid/qwen2_5_vl" and "method" not in own
    (tmp_path / "config.json").write_text('{"architectures": ["LlavaOnevisionForConditionalGeneration"]}')
    for pretrained in ("org/other", str(tmp_path)):
        other = arguments(pretrained, setting)
        assert (other["method"], other["tau"], other["tokens_per_frame"]) == ("fastvid", "0.84", "9")
        assert "config" not in other and "retention_ratio" not in other and other["fps"] == own["fps"] == "2"
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen2VLForConditionalGeneration"]}')
    assert "config" in arguments(str(tmp_path), setting)  # of the config's family


def test_embedded_run_needs_no_arguments():
    command = command_of(plan_of(), Setting.of("fastvid", retention_ratio=0.1))
    assert command[:3] == [sys.executable, "-m", "lmms_eval_accelerate"]
    arguments = dict(pair.split("=") for pair in option(command, "--model_args").split(","))
    assert arguments["pretrained"] == str(ROOT / "assets" / "tiny-llava-onevision")
    assert (arguments["config"], arguments["retention_ratio"]) == ("fastvid/llava_onevision", "0.1")
    assert option(command, "--tasks") == "shapes_video,easy_vqa"


def test_real_run_gives_every_method_the_setting_of_the_paper():
    plan = plan_of("--pretrained", "org/model", "--tasks", "videomme", "--config", "fastvid/llava_video")
    for setting in (Setting(), Setting.of("random", retention_ratio=0.1)):
        command = command_of(plan, setting)
        assert option(command, "--model") == "llava_video_accelerated"
        arguments = dict(pair.split("=") for pair in option(command, "--model_args").split(","))
        assert arguments["max_frames_num"] == "64" and arguments["mm_spatial_pool_mode"] == "average"
        assert arguments["force_sample"] == "true"
        assert bool({"method", "config"} & set(arguments)) == (setting.method is not None)


@pytest.mark.parametrize("config", [name for name in config_names() if "/llava" in name])
def test_every_config_makes_a_run(config):
    """The plan of each script with weights: its family, its tasks, and a method that fits the family."""
    plan = plan_of("--pretrained", "org/model", "--config", config)
    method = config.partition("/")[0]
    assert plan.config_of(method) == config
    command = command_of(plan, *settings_of(method))
    assert option(command, "--model") == f"{plan.family}_accelerated"
    assert option(command, "--tasks") == ("gqa,mme,pope" if plan.family == "llava" else "videomme")
    given = dict(pair.split("=") for pair in option(command, "--model_args").split(","))
    compatibility.check(resolve(given["config"]), plan.family)


def test_number_of_processes_defaults_to_the_gpus_but_for_the_embedded_model(monkeypatch):
    monkeypatch.setattr(launch, "gpus", lambda: 4)
    assert machines_of("--pretrained", "org/model").processes == 4 and machines_of().processes == 1
    assert machines_of("--pretrained", "org/model", "--gpus-per-model", "2").processes == 2


def test_dry_run_prints_commands_and_runs_nothing(tmp_path, capsys):
    compare.main(["--dry-run", "--methods", "dense fastvid@0.2", "--output", str(tmp_path / "out")])
    *commands, together = capsys.readouterr().out.strip().splitlines()
    assert len(commands) == 2 and "retention_ratio=0.2" in commands[1] and "--output_path" in commands[1]
    assert together.startswith("#") and "--runs" in together
    assert not (tmp_path / "out").exists()


def test_a_failing_run_stops_with_its_log_and_exit_code_1(tmp_path, monkeypatch, capsys):
    script = "import sys; print('== run 1/2 begins: dense'); print('the reason why'); sys.exit(3)"
    monkeypatch.setattr(launch.Machines, "command", lambda self, arguments: [sys.executable, "-c", script])
    with pytest.raises(SystemExit) as stopped:
        compare.main(["--methods", "dense fastvid", "--output", str(tmp_path / "out")])
    assert stopped.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: dense failed (exit code 3)") and "the reason why" in printed
    assert "the reason why" in (tmp_path / "out" / "log.txt").read_text()
    assert not (tmp_path / "out" / "comparison.json").exists()


def test_an_output_folder_is_of_one_comparison(tmp_path, monkeypatch):
    monkeypatch.setattr(launch.Machines, "command", lambda self, arguments: [sys.executable, "-c", "exit(3)"])
    for _ in range(2):  # the same comparison may be tried again
        with pytest.raises(SystemExit) as stopped:
            compare.main(["--methods", "dense fastvid", "--output", str(tmp_path / "out")])
        assert stopped.value.code == 1
    with pytest.raises(SystemExit, match="another comparison"):
        compare.main(["--methods", "dense fastvid@0.2", "--output", str(tmp_path / "out")])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("")
    with pytest.raises(SystemExit, match="not empty"):
        compare.main(["--methods", "dense fastvid", "--output", str(tmp_path / "notes")])


def write_summary(folder: Path, score: float, after: float, compress: float, prefill: float) -> Path:
    costs = {
        "samples": 50,
        "visual_tokens_before": 784.0,
        "visual_tokens_after": after,
        "visual_tokens_per_layer": after,
        "llm_tflops_dense": 2.0,
        "llm_tflops": 2.0 * after / 784,
        "vision_ms": 30.0,
        "compress_ms": compress,
        "prefill_ms": prefill,
    }
    folder.mkdir(parents=True)
    report = {"tasks": {"clips": {"exact_match": score, "other": 0.1}}, "costs": {"by_task": {"clips": costs}}}
    (folder / "summary.json").write_text(json.dumps(report), encoding="utf-8")
    return folder


@pytest.fixture
def found(tmp_path):
    folders = {
        "dense": write_summary(tmp_path / "dense", 0.95, 784, 0.0, 40.0),
        "fastvid@0.25": write_summary(tmp_path / "a", 0.94, 196, 4.0, 16.0),
        "fastvid@0.1": write_summary(tmp_path / "b", 0.90, 64, 3.0, 5.0),
    }
    return comparison.read(folders)


def test_rows_are_relative_to_dense_with_overhead_included(found):
    assert [row.setting for row in found] == ["dense", "fastvid@0.25", "fastvid@0.1"]
    assert found[1].speedup == pytest.approx(2.0) and found[2].speedup == pytest.approx(5.0)
    assert found[2].change == pytest.approx(-0.05) and found[2].kept == pytest.approx(64 / 784)


def test_without_samples_there_are_no_columns_of_loyalty(found):
    assert [row.same_answers for row in found] == [None] * 3
    assert "same" not in comparison.markdown(found) and "KL" not in comparison.markdown(found)


@pytest.fixture
def loyal(tmp_path):
    """Three runs with three answers; the one at 10 % differs in one of them, and logged no distribution of another."""
    sure, torn, other = (pack([1, 2], [math.log(p), math.log(1 - p)], -math.inf) for p in (0.9, 0.5, 0.2))
    answers = {
        "dense": [("yes", sure), ("no", torn), ("2", torn)],
        "fastvid@0.25": [("yes", sure), ("no", torn), ("2", torn)],
        "fastvid@0.1": [("yes", torn), ("yes", other), ("2", None)],
    }
    folders = {}
    for number, (setting, said) in enumerate(answers.items()):
        folder = write_summary(tmp_path / str(number), 0.9, 784 / (1 + number), 1.0, 9.0)
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8")) | {"date": "20260101_000000"}
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        counts = [{"generated_tokens": 2} | ({"first_token": first} if first else {}) for _, first in said]
        lines = [
            {"doc_id": n, "input": "?", "target": "yes", "filtered_resps": answer, "token_counts": [count]}
            for n, ((answer, _), count) in enumerate(zip(said, counts, strict=True))
        ]
        (folder / "model").mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "model" / "20260101_000000_samples_clips.jsonl").write_text(text, encoding="utf-8")
        folders[setting] = folder
    return folders


def test_loyalty_to_the_dense_run_is_read_from_the_samples(loyal, tmp_path):
    found = comparison.read(loyal)
    assert [row.same_answers for row in found] == [None, 1.0, pytest.approx(2 / 3)]
    expected = (0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)) / 2
    expected += (0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8)) / 2
    assert [row.first_token_kl for row in found] == [None, 0.0, pytest.approx(expected, abs=1e-6)]
    # of the two documents with distributions, the second one's ties in dense (1 and 2 alike) go to the lower id
    assert [row.top1_same for row in found] == [None, 1.0, 0.5]
    comparison.write(found, tmp_path)
    markdown = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert "| setting | accuracy | vs dense | same answers | KL | visual tokens |" in markdown
    assert (
        f"| fastvid@0.1 | 90.0 | +0.0 | 67% | {expected:.3f} |" in markdown and "| dense | 90.0 |  |  |  |" in markdown
    )
    saved = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert saved[2]["first_token_kl"] == pytest.approx(expected, abs=1e-6) and saved[0]["same_answers"] is None


def test_a_run_without_samples_has_empty_cells_of_loyalty(loyal):
    next(loyal["fastvid@0.25"].rglob("*.jsonl")).unlink()
    found = comparison.read(loyal)
    assert (found[1].same_answers, found[1].first_token_kl) == (None, None) and found[2].same_answers
    assert "| fastvid@0.25 | 90.0 | +0.0 |  |  |" in comparison.markdown(found)


def test_table_with_loyalty_fits_eighty_columns(loyal):
    from rich.console import Console

    console = Console(width=80, file=io.StringIO())
    console.print(comparison.tables(comparison.read(loyal)))
    text = console.file.getvalue()
    row = next(line for line in text.splitlines() if line.startswith(" fastvid@0.25 "))  # not folded
    assert "…" not in text and {"90.0", "+0.0", "100%", "0.000", "392", "(50%)", "1.0", "9.0"} <= set(row.split())
    assert "KL: of the first token's distribution" in " ".join(text.split())


def test_table_fits_eighty_columns(found):
    from rich.console import Console

    console = Console(width=80, file=io.StringIO())
    console.print(comparison.tables(found))
    text = console.file.getvalue()
    assert "…" not in text and "5.00x" in text and "64 (8%)" in text and "-5.0" in text


def test_long_names_do_not_squeeze_the_numbers(found):
    from rich.console import Console

    found[2].setting = "a_method_with_a_long_name@0.25"
    console = Console(width=80, file=io.StringIO())
    console.print(comparison.tables(found))
    assert "…" not in console.file.getvalue() and "5.00x" in console.file.getvalue()


ODD = "[/b] [INST] $x$ <script> |:warning:"


def test_names_are_shown_as_they_are(found, tmp_path):
    """In the table, in Markdown and in the picture, where a dollar sign begins no formula."""
    for row in found:
        row.task, row.setting = ODD, row.setting if row.setting == "dense" else f"odd {ODD}"
    from rich.console import Console

    console = Console(file=io.StringIO(), width=200)  # one that reads markup
    console.print(comparison.tables(found))
    text = console.file.getvalue()
    assert f"{ODD}: " in text and f"odd {ODD}" in text
    assert "odd [/b] [INST] $x$ <script> \\|:warning:" in comparison.markdown(found)
    found[1].not_comparable = "why"
    found[1].task = found[0].task = "$\\nonsense{ $x$"
    assert pictures.draw_curve(found, tmp_path / "c.png").is_file()


def test_markdown_json_and_curve(found, tmp_path):
    comparison.write(found, tmp_path)
    assert "| fastvid@0.1 | 90.0 | -5.0 | 64 (8%) |" in (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))[2]["tokens_after"] == 64
    from PIL import Image

    picture = Image.open(pictures.draw_curve(found, tmp_path / "curve.png")).convert("RGB")
    colours = {c for n, c in picture.getcolors(1 << 20) if n > 50 and len(set(c)) > 1}
    assert colours, "the method's line is drawn in colour"


def test_script_prints_its_commands():
    environment = os.environ | {"PYTHON": sys.executable, "DRY_RUN": "1", "RETENTION_RATIO": "0.2", "LIMIT": "3"}
    script = ROOT / "scripts" / "eval" / "fastvid_llava_ov.sh"
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "retention_ratio=0.2" in done.stdout and "--limit 3" in done.stdout
