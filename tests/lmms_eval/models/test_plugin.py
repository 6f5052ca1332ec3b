"""The lmms-eval plugin in one process: registration, arguments, families, batching, costs, errors, prompts."""

from __future__ import annotations

import os
import re
import subprocess
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest

pytest.importorskip("lmms_eval")
pytest.importorskip("lmms_eval_accelerate")

from lmms_eval_accelerate import cli
from lmms_eval_accelerate.manifest import FAMILIES, TRAINED, model_ids

from accelerate_methods import available
from accelerate_methods.stages.errors import MethodError, UnknownNameError
from tests.support.lmms_tasks import (
    answers,
    document,
    evaluate,
    lines,
    standard_tasks,
    write_tasks,
    write_video,
)
from tests.support.paths import CHECKPOINTS

CHECKPOINT = {"llava": "tiny-llava-1.6", "llava_onevision": "tiny-llava-onevision", "llava_video": "tiny-llava-video"}


def arguments(family: str, more: str = "") -> str:
    frames = "" if family == "llava" else ",max_frames_num=4"
    return f"pretrained={CHECKPOINTS / CHECKPOINT[family]}{frames}{more}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return standard_tasks(tmp_path_factory.mktemp("tasks"))


# -- registration and arguments ----------------------------------------------------------------------------------------


def test_manifest_imports_nothing_heavy() -> None:
    code = (
        "import sys, lmms_eval_accelerate.manifest as m; m.model_ids();"
        "print([x for x in ('torch', 'transformers', 'lmms_eval', 'llava', 'numpy') if x in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_method_has_a_model_per_family() -> None:
    from lmms_eval.models import get_model, list_available_models

    names = set(list_available_models(True))
    for family in set(FAMILIES) - TRAINED:
        for suffix in ("accelerated", *available()):
            assert f"{family}_{suffix}" in names
    model = get_model("llava_video_fastvid")
    assert (model.family, model.default_method, model.__name__) == ("llava_video", "fastvid", "llava_video_fastvid")
    assert get_model("llava_video_fastvid") is model


def test_lmms_eval_lists_them(capsys) -> None:
    """``lmms-eval models`` reads two dictionaries and not what is registered."""
    import argparse

    from lmms_eval.cli.models_cmd import run_models

    run_models(argparse.Namespace(aliases=False))
    listed = dict(re.findall(r"^(\S+) +(simple|chat|chat\+simple) *$", capsys.readouterr().out, re.MULTILINE))
    for name, (family, _) in model_ids().items():
        if len(name) < 28:  # longer names are cut in that list
            assert listed[name] == ("chat" if family == "hf" else "simple"), name
    assert listed["llava_onevision"] == listed["llava_vid"] == "simple"  # its own are as they were


def test_our_command_lists_them_in_full(capsys) -> None:
    cli.show_models()
    shown = capsys.readouterr().out
    names = set(re.findall(r"\b(?:llava|hf)_\w+", shown))
    assert names - {"llava_onevision", "llava_video"} <= set(model_ids())
    assert {"llava_onevision_random_prefill", "llava_video_fastvid", "hf_fastv", "llava_accelerated"} <= names
    assert "llava_fastvid" not in names, "what cannot run is not offered"


def test_a_method_registered_later_appears() -> None:
    import dataclasses

    from accelerate_methods.registry import names as registry
    from accelerate_methods.stages.compress import CompressMethod

    @registry.register("made_up_for_this_test")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class MadeUp(CompressMethod):
        strength: float = 0.5

    try:
        from lmms_eval_accelerate.models import model_class

        assert model_ids()["llava_made_up_for_this_test"] == ("llava", "made_up_for_this_test")
        parsed = model_class("llava_made_up_for_this_test").parse(pretrained="x", strength=0.25)
        assert parsed.pipeline.methods[0].strength == 0.25
    finally:
        del registry._registered["made_up_for_this_test"]


def parse(model_id: str, **given):
    from lmms_eval_accelerate.models import model_class

    return model_class(model_id).parse(**given)


def test_arguments_and_hyper_parameters() -> None:
    args = parse("llava_onevision_fastvid", pretrained="x", retention_ratio=0.2, batch_size="3", torch_dtype="bfloat16")
    assert args.pipeline.methods[0].retention_ratio == 0.2
    assert (args.batch_size, args.dtype, args.method, args.max_frames_num) == (3, "bfloat16", "fastvid", 32)
    assert parse("llava_onevision_accelerated", pretrained="x").pipeline.name == "dense"
    both = parse(
        "llava_accelerated", pretrained="x", method="uniform+random_prefill", **{"uniform.retention_ratio": 0.3}
    )
    assert both.pipeline.name == "uniform+random_prefill"
    as_json = '{"method": "uniform", "retention_ratio": 0.5}'
    assert parse("llava_accelerated", pretrained="x", method=as_json).method == "uniform"


def test_config_gives_defaults_for_arguments() -> None:
    args = parse("llava_onevision_accelerated", config="fastvid/llava_onevision")
    assert args.method == "fastvid" and args.pretrained and args.max_frames_num
    override = parse(
        "llava_onevision_fastvid", config="fastvid/llava_onevision", retention_ratio=0.33, max_frames_num=7
    )
    assert (override.pipeline.methods[0].retention_ratio, override.max_frames_num) == (0.33, 7)
    with pytest.raises(MethodError, match="llava_onevision"):
        parse("llava_video_accelerated", config="fastvid/llava_onevision")
    with pytest.raises(MethodError, match="is for fastvid"):
        parse("llava_onevision_uniform", config="fastvid/llava_onevision")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"retention_ration": 0.1}, "Did you mean 'retention_ratio'"),
        ({"max_frame_num": 8}, "Did you mean 'max_frames_num'"),
        ({"on_error": "stopp"}, "Did you mean 'stop'"),
        ({"video_decode_backend": "dekord"}, "Did you mean 'decord'"),
    ],
)
def test_wrong_names_are_named(given: dict, says: str) -> None:
    with pytest.raises(UnknownNameError, match=says):
        parse("llava_onevision_fastvid", pretrained="x", **given)


@pytest.mark.parametrize(
    ("model_id", "given", "says"),
    [
        ("llava_video_accelerated", {"video_fps": 0}, "video_fps must be a number above 0"),
        ("llava_video_accelerated", {"force_sample": "off"}, "force_sample must be true or false"),
        ("llava_video_accelerated", {"add_time_instruction": "no"}, "add_time_instruction must be true or false"),
        ("llava_video_accelerated", {"overwrite": "none"}, "overwrite must be true or false"),
        ("hf_accelerated", {"fps": 0}, "fps must be a number above 0"),
        ("hf_accelerated", {"fps": "nan"}, "fps must be a number above 0"),
        ("hf_accelerated", {"max_num_frames": 0}, "max_num_frames must be a whole number from 1"),
        ("hf_accelerated", {"max_frames_num": 0}, "max_num_frames must be a whole number from 1"),
        ("hf_accelerated", {"min_pixels": 0}, "min_pixels must be a whole number from 1"),
    ],
)
def test_numbers_and_switches_are_what_they_say(model_id: str, given: dict, says: str) -> None:
    """0 would be taken for "not given", and any text for "true"."""
    with pytest.raises(MethodError, match=says):
        parse(model_id, pretrained="x", **given)


def test_numbers_and_switches_may_be_written_as_text(monkeypatch) -> None:
    args = parse("llava_video_accelerated", pretrained="x", max_frames_num="8", video_fps=0.5, force_sample=1)
    assert (args.max_frames_num, args.video_fps, args.force_sample) == (8, 0.5, True)
    monkeypatch.setenv("GPUS_PER_MODEL", "")
    assert parse("hf_accelerated", pretrained="x", fps="none", min_pixels=None).gpus_per_model == 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"pretrained": None}, "pretrained= is needed"),
        ({"batch_size": "auto"}, "batch_size"),
        ({"method": "uniform"}, "use llava_onevision_accelerated"),
        ({"dtype": "float32", "torch_dtype": "float16"}, "contradict"),
        ({"retention_ratio": 7}, "retention_ratio"),
        ({"retention_ratio": 0}, "retention_ratio=0 is outside"),
        ({"max_frames_num": 0}, "max_frames_num must be a whole number from 1, not 0"),
        ({"max_frames_num": -4}, "max_frames_num must be a whole number"),
        ({"max_frames_num": 2.5}, "max_frames_num must be a whole number"),
        ({"max_frames_num": "many"}, "max_frames_num must be a whole number"),
        ({"max_frames_num": "none"}, "max_frames_num must be a whole number"),
        ({"max_frames_num": True}, "max_frames_num must be a whole number"),
        ({"use_cache": "no"}, "use_cache must be true or false, not 'no'"),
        ({"use_cache": 2}, "use_cache must be true or false"),
        ({"conv_template": ""}, "conv_template= is empty"),
        ({"pretrained": " "}, "pretrained= is empty"),
        ({"batch_size": 0}, "batch_size must be a number from 1"),
        ({"gpus_per_model": 0}, "gpus_per_model must be a number of GPUs from 1"),
        ({"save_provenance": -1}, "save_provenance must be a number of documents"),
        ({"method": "none"}, "runs fastvid; without a method it is llava_onevision_accelerated"),
        ({"method": "dense"}, "use llava_onevision_accelerated"),
        ({"method": ""}, "method= is empty"),
    ],
)
def test_wrong_values_are_refused(given: dict, says: str) -> None:
    with pytest.raises(MethodError, match=says):
        parse("llava_onevision_fastvid", **{"pretrained": "x", **given})


def test_a_method_that_can_do_nothing_on_a_family_is_refused() -> None:
    with pytest.raises(MethodError, match=r"video only.*runs on LLaVA-OneVision, LLaVA-Video"):
        parse("llava_dycoke", pretrained="x")
    with pytest.raises(MethodError, match="needs frame_features"):
        parse("llava_accelerated", pretrained="x", method="fastvid")
    assert parse("llava_fastervlm", pretrained="x").method == "fastervlm"


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "tasks", "method"),
    [
        ("llava", ["image", "text"], "uniform"),
        ("llava_onevision", ["mixed"], "fastvid"),
        ("llava_video", ["mixed"], "fastvid"),
    ],
)
def test_batched_answers_equal_single_ones(family: str, tasks: list[str], method: str, folder) -> None:
    model = f"{family}_{method}"
    single = evaluate(model, tasks, folder, model_args=arguments(family, ",retention_ratio=0.25"))
    batched = evaluate(model, tasks, folder, model_args=arguments(family, ",retention_ratio=0.25"), batch_size=3)
    for task in tasks:
        assert answers(single, task) == answers(batched, task)
    assert max(line["batch_size"] for line in lines(batched, tasks[0])) > 1


def test_log_lines_carry_costs(folder) -> None:
    from accelerate_methods.engine.flops import prefill_macs
    from llava.model.language_model.llava_qwen import LlavaQwenConfig

    tasks = ["video", "text"]
    results = evaluate(
        "llava_onevision_fastvid", tasks, folder, model_args=arguments("llava_onevision", ",retention_ratio=0.2")
    )
    config = LlavaQwenConfig.from_pretrained(CHECKPOINTS / CHECKPOINT["llava_onevision"])
    for line in lines(results, "video"):
        assert line["visual_tokens_before"] == 4 * 196
        assert 0 < line["visual_tokens_after"] <= 0.2 * 4 * 196
        dropped = line["visual_tokens_before"] - line["visual_tokens_after"]
        assert line["prompt_tokens_dense"] - line["prompt_tokens"] == dropped
        layers = config.num_hidden_layers
        for tokens, work in (("prompt_tokens_dense", "llm_tflops_dense"), ("prompt_tokens", "llm_tflops")):
            assert line[work] == prefill_macs([line[tokens]] * layers, config) / 1e12
        assert all(line[f"{stage}_ms"] > 0 for stage in ("vision", "compress", "prefill", "decode"))
        assert (line["method"], line["batch_size"], line["generated_tokens"]) == ("fastvid", 1, 6)
    text = lines(results, "text")
    assert all(line["visual_tokens_before"] == 0 and line["llm_tflops"] == line["llm_tflops_dense"] for line in text)
    everything = lines(results, "video") + text
    assert sum(line["warmup"] for line in everything) == 1
    summary = results["throughput"]
    measured = [line for line in everything if not line["warmup"]]
    assert summary["avg_samples"] == len(everything) and summary["avg_measured"] == len(measured)
    assert summary["avg_prompt_tokens"] == pytest.approx(sum(m["prompt_tokens"] for m in measured) / len(measured))


def test_prefill_method_reports_fewer_tokens_per_layer(folder) -> None:
    results = evaluate("llava_onevision_random_prefill", ["video"], folder, model_args=arguments("llava_onevision"))
    for line in lines(results, "video"):
        assert line["prompt_tokens"] == line["prompt_tokens_dense"]
        assert line["llm_tflops"] < line["llm_tflops_dense"]


def test_prompt_is_that_of_the_stock_model(folder) -> None:
    """Task ``video`` words its question differently for ``llava_vid``."""
    args = arguments("llava_video")
    for name, more, ending in (
        ("llava_video_accelerated", "", "best answer is:"),
        ("llava_video_accelerated", ",prompt_model=none", "?"),
        ("llava_onevision_accelerated", "", "?"),
        ("llava_onevision_accelerated", ",prompt_model=llava_vid", "best answer is:"),
    ):
        results = evaluate(name, ["video"], folder, model_args=args + more, limit=1)
        assert results["samples"]["video"][0]["arguments"][0].endswith(ending)


def test_likelihood_of_what_greedy_decoding_says(folder) -> None:
    """The model's own greedy continuation is greedy, with and without a method; another one is not."""
    from lmms_eval.api.instance import Instance
    from lmms_eval.models import get_model

    for model_id in ("llava_onevision_accelerated", "llava_onevision_fastvid", "llava_onevision_random_prefill"):
        model = get_model(model_id).create_from_arg_string(arguments("llava_onevision"))
        clip = document(1, video=folder / "1.mp4")
        model.task_dict["made_up"] = {"test": [clip]}
        meta = {"task": "made_up", "doc_id": 0, "repeats": 1}
        question = (clip["question"], lambda doc: [doc["video"]], 0, "made_up", "test")
        asked = Instance("generate_until", (question[0], {"max_new_tokens": 4}, *question[1:]), 0, dict(meta))
        spoken = model.generate_until([asked])[0].text
        assert spoken
        # The template closes the turn, which a random model does not; compare up to there.
        model.prompt = closing_nothing(model.prompt)
        losses = {}
        for target in (spoken, "left"):
            request = Instance("loglikelihood", (question[0], target, *question[1:]), 0, dict(meta))
            loss, greedy = model.loglikelihood([request])[0]
            losses[target] = loss
            if target == "left":
                assert not greedy
        assert losses[spoken] < losses["left"]


def closing_nothing(prompt):
    def without_end(text, answer=None):
        full = prompt(text, answer)
        return full if answer is None else full[: full.rindex(answer) + len(answer)]

    return without_end


def test_multiple_choice_runs_through_the_harness(folder) -> None:
    results = evaluate(
        "llava_onevision_uniform",
        ["choice_image"],
        folder,
        model_args=arguments("llava_onevision", ",retention_ratio=0.5"),
    )
    assert 0 <= results["results"]["choice_image"]["acc,none"] <= 1
    assert lines(results, "choice_image")[0]["visual_tokens_before"] > 0


def test_stop_strings_cut_answers() -> None:
    from lmms_eval_accelerate.models.batching import cut

    assert cut("\n\nred\n\nand blue", ["\n\n"]) == "red"
    assert cut("red. Blue", ["", ". ", "B"]) == "red"
    assert cut(" red ", []) == "red"


def test_rounds_go_on_until_the_task_ends_them(folder) -> None:
    from lmms_eval.api.instance import Instance
    from lmms_eval.models import get_model

    model = get_model("llava_onevision_accelerated").create_from_arg_string(arguments("llava_onevision"))
    clip = document(0, video=folder / "0.mp4")
    model.task_dict["made_up"] = {"test": [clip]}
    seen = []

    def doc_to_text(doc, previous_output, round_idx, previous_round_info):
        seen.append((round_idx, list(previous_output), previous_round_info))
        return [doc["video"]], "And now?", round_idx == 2, previous_output, {"round": round_idx}

    request = Instance(
        "generate_until_multi_round",
        (clip["question"], {"max_new_tokens": 3}, lambda doc: [doc["video"]], doc_to_text, 0, "made_up", "test"),
        0,
        {"task": "made_up", "doc_id": 0, "repeats": 1},
    )
    rounds = model.generate_until_multi_round([request])[0]
    assert len(rounds) == 2 and all(isinstance(r, str) for r in rounds)
    assert [s[0] for s in seen] == [1, 2] and seen[1][2] == {"round": 1}


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.fixture()
def broken(tmp_path):
    good = write_video(tmp_path / "good.mp4")
    bad = tmp_path / "damaged.mp4"
    bad.write_bytes(good.read_bytes()[:200])
    picture = tmp_path / "damaged.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\nno")
    return write_tasks(
        tmp_path / "tasks",
        bad_video=[document(0, video=good), document(1, video=bad), document(2, video=good)],
        no_video=[document(0, video=tmp_path / "missing.mp4")],
        bad_image=[document(0, (picture,))],
    )


@pytest.mark.parametrize(
    ("task", "file"), [("bad_video", "damaged.mp4"), ("no_video", "missing.mp4"), ("bad_image", "damaged.png")]
)
@pytest.mark.parametrize("family", ["llava_onevision", "llava_video"])
def test_unreadable_file_stops_the_run_and_is_named(family: str, task: str, file: str, broken) -> None:
    from lmms_eval_accelerate.models.visuals import VisualError

    with pytest.raises(VisualError, match=rf"task {task}, .*doc \d.*{file}"):
        evaluate(f"{family}_accelerated", [task], broken, model_args=arguments(family))


def test_unreadable_file_can_be_skipped_and_is_counted(broken) -> None:
    args = arguments("llava_onevision", ",on_error=skip")
    results = evaluate("llava_onevision_fastvid", ["bad_video"], broken, model_args=args, batch_size=3)
    found = lines(results, "bad_video")
    assert [bool(line.get("skipped")) for line in found] == [False, True, False]
    assert "damaged.mp4" in found[1]["error"]
    assert answers(results, "bad_video")[1] == ""
    assert results["throughput"]["avg_skipped"] == 1
    assert results["throughput"]["avg_samples"] == 3


def test_llava_refuses_videos(folder) -> None:
    with pytest.raises(TypeError, match="reads images, not videos"):
        evaluate("llava_accelerated", ["video"], folder, model_args=arguments("llava"), limit=1)
