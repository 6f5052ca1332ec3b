"""Trained architectures as models of lmms-eval: ids, run parameters, prompts, costs, methods, wrong checkpoints."""

from __future__ import annotations

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("lmms_eval")
pytest.importorskip("lmms_eval_accelerate")

from lmms_eval_accelerate.manifest import TRAINED, any_method, model_ids
from lmms_eval_accelerate.models import model_class

from accelerate_methods import record
from accelerate_methods.registry.architectures import ARCHITECTURES
from accelerate_methods.stages.errors import MethodError, UnknownNameError
from llava.conversation import conv_templates
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import CheckpointError
from tests.support.architectures import tiny_checkpoint
from tests.support.lmms_tasks import answers, evaluate, lines, standard_tasks
from tests.support.paths import CHECKPOINTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return standard_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def mqt(tmp_path_factory):
    return tiny_checkpoint("mqt", tmp_path_factory.mktemp("mqt"))


def parse(model_id: str, **given):
    return model_class(model_id).parse(pretrained="x", **given)


@pytest.mark.parametrize("entry", ARCHITECTURES, ids=lambda entry: entry.file)
def test_every_architecture_is_one_model_id(entry):
    from lmms_eval.models import get_model, list_available_models

    assert entry.key in list_available_models(True) and entry.key in TRAINED
    assert [name for name, (family, _) in model_ids().items() if family == entry.key] == [entry.key]
    assert any_method(entry.key) == entry.key
    model = get_model(entry.key)
    assert model.entry is entry and model.default_method is None and model.__module__ == "lmms_eval_accelerate.models"
    assert entry.template in conv_templates
    args = parse(entry.key)
    assert {a.name: a.default for a in entry.arguments}.items() <= args.values.items()
    assert ("max_frames_num" in args.values) == ("video" in entry.modalities)


def test_run_parameters_are_typed():
    assert parse("mqt_llava", num_visual_tokens="36").num_visual_tokens == 36
    for value in (0, 257, "many", 2.5, True):
        with pytest.raises(MethodError, match="num_visual_tokens"):
            parse("mqt_llava", num_visual_tokens=value)
    with pytest.raises(UnknownNameError, match="num_visual_tokens"):
        parse("mqt_llava", num_visual_token=3)
    with pytest.raises(MethodError, match="cannot run on MQT-LLaVA: needs cls_attention"):
        parse("mqt_llava", method="fastervlm")


def test_answers_and_costs_of_images_videos_and_text(mqt, folder):
    tasks = ["image", "images", "video", "text", "choice_image"]
    args = f"pretrained={mqt},num_visual_tokens=9,max_frames_num=4"
    single = evaluate("mqt_llava", tasks, folder, model_args=args)
    batched = evaluate("mqt_llava", tasks, folder, model_args=args, batch_size=3)
    assert [answers(single, task) for task in tasks[:4]] == [answers(batched, task) for task in tasks[:4]]
    for task, tokens in {"image": 9, "images": 18, "video": 36, "text": 0, "choice_image": 9}.items():
        for cost in lines(single, task):
            assert cost["visual_tokens_before"] == cost["visual_tokens_after"] == tokens
            assert (cost["architecture_tflops"] > 0) == (tokens > 0) and cost["prefill_ms"] > 0
            assert cost["vision_ms"] > 0 or not tokens, "the resampler's time is part of it"
    more = evaluate("mqt_llava", ["image"], folder, model_args=args.replace("=9", "=200"))
    assert lines(more, "image")[0]["llm_tflops"] > lines(single, "image")[0]["llm_tflops"]


@pytest.mark.parametrize(
    ("file", "more", "tokens"),
    [
        ("fastvlm", "", {"image": 16, "images": 32, "video": 64}),
        ("video_xl", ",beacon_ratio=8", {"image": 288, "images": 576, "video": 576}),
        ("llava_mini", "", {"image": 1, "images": 2}),
        ("voco_llama", ",num_voco=3", {"image": 576, "images": 1152, "video": 2304}),
        ("llama_vid", ",fps=1000", {"image": 2, "images": 4, "video": 8}),
        ("flashsloth", "", {"image": 81, "images": 162}),
        ("hicom", "", {"image": 113, "images": 226, "video": 113}),
        ("tg_llava", "", {"image": 640, "images": 1280}),
    ],
)
def test_other_architectures_answer_alike_in_batches(file, more, tokens, folder, tmp_path):
    args = f"pretrained={tiny_checkpoint(file, tmp_path)}{',max_frames_num=4' * ('video' in tokens)}{more}"
    tasks = [*tokens, "text"]
    single = evaluate(file, [*tasks, "choice_image"], folder, model_args=args)
    batched = evaluate(file, tasks, folder, model_args=args, batch_size=3)
    assert [answers(single, task) for task in tasks] == [answers(batched, task) for task in tasks]
    for task, count in {**tokens, "text": 0}.items():
        for cost in lines(single, task):
            assert cost["visual_tokens_before"] == count and cost["prefill_ms"] > 0 and cost["llm_tflops"] > 0


def test_a_rule_of_its_own_chooses_the_frames(folder, tmp_path):
    args = f"pretrained={tiny_checkpoint('llava_mini', tmp_path)}"
    asked = [evaluate("llava_mini", ["video"], folder, model_args=args + more) for more in ("", ",max_frames_num=1")]
    tokens, single = ([cost["visual_tokens_before"] for cost in lines(results, "video")] for results in asked)
    assert len(set(tokens)) > 1 and max(tokens) < 10, "one frame for each of the few seconds of these clips"
    assert single == [1] * len(tokens)


def test_methods_act_on_it(mqt, folder):
    args = f"pretrained={mqt},num_visual_tokens=40,method=fastv,k=1,r=0.5"
    (cost, *_) = lines(evaluate("mqt_llava", ["image"], folder, model_args=args, limit=1), "image")
    assert cost["visual_tokens_by_layer"] == [40, 20, 20, 20] and cost["method"] == "fastv"


def test_the_work_of_the_resampler_is_what_torch_counts(mqt):
    _, model, _, _ = load_pretrained_model(str(mqt), device_map="cpu", torch_dtype="float32")
    with record() as requests, torch.no_grad():
        model.generate(torch.tensor([[1, -200, 5, -200]]), images=torch.randn(2, 3, 336, 336), num_visual_tokens=12,
                       max_new_tokens=1, pad_token_id=0)  # fmt: skip
    features = model.get_vision_tower()(torch.randn(2, 3, 336, 336))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.get_model().mm_projector(features, 12)
    assert model.own_macs(requests[0].samples[0], num_visual_tokens=12) == counter.get_total_flops() // 2


def test_wrong_checkpoints_are_one_clear_error(mqt):
    def load(model_id, path):
        return model_class(model_id).create_from_arg_string(f"pretrained={path}", {"batch_size": 1})

    with pytest.raises(CheckpointError, match=r"no checkpoint of MQT-LLaVA; .*gordonhu/MQT-LLaVA-7b"):
        load("mqt_llava", CHECKPOINTS / "tiny-llava-1.5")
    with pytest.raises(CheckpointError, match=r"is a checkpoint of MQT-LLaVA, .*run it as model mqt_llava"):
        load("llava_fastv", mqt)


def test_compare_runs_an_architecture_at_levels_and_with_methods(mqt, folder, tmp_path):
    from lmms_eval_accelerate.compare.cli import _settings
    from lmms_eval_accelerate.compare.comparison import NoCheckpointError, Wanted, comparison_of

    wanted = Wanted("models/mqt_llava", pretrained=str(mqt), tasks="gqa", output=tmp_path / "out")
    comparison = comparison_of(wanted)

    class Asked:
        config, pretrained, retention_ratio, methods = "models/mqt_llava", str(mqt), None, None

    labels = [setting.label for setting in _settings(Asked, comparison)]
    assert labels[:3] == ["dense", "dense(num_visual_tokens=2)", "dense(num_visual_tokens=16)"]
    Asked.methods = "dense(num_visual_tokens=36) random@0.5"
    runs = [comparison.run(setting).argv for setting in _settings(Asked, comparison)]
    assert all(argv[argv.index("--model") + 1] == "mqt_llava" for argv in runs)
    typed = [argv[argv.index("--model_args") + 1] for argv in runs]
    assert "num_visual_tokens=36" in typed[0] and "method=random" in typed[1] and "max_frames_num=8" in typed[0]
    Asked.methods = "dense(num_visual_tokens=300)"
    with pytest.raises(MethodError, match=r"num_visual_tokens=300 is outside the allowed range \[1, 256\]"):
        _settings(Asked, comparison)
    with pytest.raises(NoCheckpointError, match=r"needs a checkpoint, e\.g\. PRETRAINED=gordonhu/MQT-LLaVA-7b"):
        comparison_of(Wanted("models/mqt_llava"))


def test_a_comparison_of_run_parameters_is_relative_to_the_dense_run(tmp_path):
    from lmms_eval_accelerate.compare import table

    from tests.lmms_eval.report.test_report import write_run

    folders = {}
    for name, tokens, count in (("dense", 100.0, 256), ("dense(num_visual_tokens=36)", 20.0, 36)):
        settings = {"family": "mqt_llava", "num_visual_tokens": count}
        folders[name] = write_run(tmp_path / str(count), [], [1.0, 0.0], tokens=tokens, settings=settings)
    summary = folders["dense(num_visual_tokens=36)"] / "summary.json"
    content = json.loads(summary.read_text())
    content["costs"]["by_task"]["quiz"] |= {"visual_tokens_before": 20.0, "llm_tflops_dense": 0.4}
    summary.write_text(json.dumps(content))
    _, few = table.read(folders)
    assert few.kept == 0.2 and few.flops_share == pytest.approx(0.2)


def test_a_picture_of_a_comparison_is_refused_before_anything_is_loaded(mqt, capsys):
    from lmms_eval_accelerate.compare.cli import main

    words = ["--config", "models/mqt_llava", "--pretrained", str(mqt), "--tasks", "gqa", "--picture", "clip.mp4"]
    with pytest.raises(SystemExit) as end:
        main([*words, "--dry-run"])
    assert end.value.code != 0 and "scripts/visualize.py draws trained architectures" in capsys.readouterr().err
