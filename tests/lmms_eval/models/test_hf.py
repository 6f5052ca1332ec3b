"""The family ``hf`` of the lmms-eval plugin: models of transformers in their own classes, asked in chats."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

from tests.support.paths import CHECKPOINTS, ROOT

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import numpy as np
import pytest
import torch

pytest.importorskip("lmms_eval")
pytest.importorskip("lmms_eval_accelerate")

from lmms_eval_accelerate import session
from lmms_eval_accelerate.compare import cli as compare
from lmms_eval_accelerate.compare.comparison import comparison_of
from lmms_eval_accelerate.compare.options import parser
from lmms_eval_accelerate.models.visuals import VisualError
from lmms_eval_accelerate.runs.folder import RunFolder

from accelerate_methods import resolve
from accelerate_methods.engine.flops import prefill_macs
from accelerate_methods.hosts.native.host import class_names, family_class
from accelerate_methods.registry import compatibility, families
from accelerate_methods.stages.errors import MethodError, UnknownNameError
from accelerate_methods.stages.signals import IMAGE_TEXT
from tests.support import native_processors
from tests.support.lmms_tasks import (
    answers,
    document,
    evaluate,
    lines,
    standard_tasks,
    write_image,
    write_tasks,
    write_video,
)

QWEN, QWEN3, ONEVISION, INTERN = "tiny-qwen2.5-vl", "tiny-qwen3-vl", "tiny-llava-onevision-hf", "tiny-internvl"
LLAVA, NEXT = "tiny-llava-1.5", "tiny-llava-1.6"
LIMITS = ",min_pixels=256,max_pixels=1024"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return standard_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """name -> folder, made when it is asked for."""
    made: dict[str, Path] = {}
    base = tmp_path_factory.mktemp("checkpoints")

    def checkpoint(name: str) -> Path:
        if name not in made:
            if name in (ONEVISION, INTERN):
                made[name] = {ONEVISION: native_processors.onevision, INTERN: native_processors.internvl}[name](base)
            else:
                made[name] = (native_processors.qwen if "qwen" in name else native_processors.llava)(base, name)
        return made[name]

    return checkpoint


def arguments(checkpoint: Path, more: str = "") -> str:
    limits = LIMITS if "qwen" in checkpoint.name else ""
    limits = "" if "min_pixels" in more else limits
    return f"pretrained={checkpoint},max_num_frames=4{limits}{more}"


def model_of(checkpoint: Path, more: str = "", model_id: str = "hf_accelerated"):
    from lmms_eval.models import get_model

    return get_model(model_id).create_from_arg_string(arguments(checkpoint, more), {"device": "cpu", "batch_size": 1})


# -- runs --------------------------------------------------------------------------------------------------------------

_EVERYTHING = ["image", "images", "video", "text", "mixed"]


@pytest.mark.parametrize(
    ("name", "tasks", "method"),
    [
        (QWEN, _EVERYTHING, ""),
        (QWEN, _EVERYTHING, "method=fastvid,variant=qwen2_5_vl,retention_ratio=0.25,c=2"),
        (QWEN, ["mixed"], "method=visionzip+fastv"),
        (QWEN3, ["mixed"], "method=visionzip,retention_ratio=0.3"),
        (ONEVISION, ["images", "video"], "method=fastv,retention_ratio=0.25"),
        (ONEVISION, ["image"], ""),
        (LLAVA, ["image", "text"], "method=fastervlm,retention_ratio=0.25"),
        (NEXT, ["image", "text"], "method=visionzip,retention_ratio=0.25"),
        (INTERN, ["mixed"], ""),
        (INTERN, ["mixed"], "method=visionzip+fastv"),
    ],
)
def test_batched_answers_equal_single_ones(name, tasks, method, folder, checkpoints) -> None:
    more = f",{method}" if method else ""
    single = evaluate("hf_accelerated", tasks, folder, model_args=arguments(checkpoints(name), more))
    batched = evaluate("hf_accelerated", tasks, folder, model_args=arguments(checkpoints(name), more), batch_size=2)
    for task in tasks:
        assert answers(single, task) == answers(batched, task)
        assert [line["prompt_tokens"] for line in lines(single, task)] == [
            line["prompt_tokens"] for line in lines(batched, task)
        ]
    assert max(line["batch_size"] for line in lines(batched, tasks[0])) == 2


@pytest.mark.parametrize(
    ("stock", "name", "tasks", "limits"),
    [
        ("qwen2_5_vl", QWEN, ["image", "images", "video", "text"], LIMITS),
        ("qwen3_vl", QWEN3, ["video", "text"], LIMITS),
        ("qwen3_vl", QWEN3, ["image", "images"], ""),  # its limits do not reach images
        ("llava_hf", ONEVISION, ["image"], None),  # it cannot read documents without images
        ("llava_hf", LLAVA, ["image"], None),
        ("llava_hf", NEXT, ["image"], None),
    ],
)
def test_same_answers_as_the_stock_class(stock, name, tasks, limits, folder, checkpoints, monkeypatch) -> None:
    pytest.importorskip("decord")
    from lmms_eval.models import get_model
    from qwen_vl_utils import process_vision_info

    if limits is not None:  # the patches of these checkpoints are smaller than those that the stock classes count on
        module = importlib.import_module(f"lmms_eval.models.chat.{stock}")
        monkeypatch.setattr(
            module, "process_vision_info", lambda *a, **k: process_vision_info(*a, **{**k, "image_patch_size": 4})
        )

    checkpoint = checkpoints(name)
    if limits is None:
        theirs, ours = f"pretrained={checkpoint},dtype=float32,device_map=auto", f"pretrained={checkpoint}"
    else:
        theirs = f"pretrained={checkpoint},device_map=cpu,max_num_frames=4{limits}"
        ours = f"pretrained={checkpoint},dtype=bfloat16,max_num_frames=4{limits}"
    model = get_model(stock).create_from_arg_string(theirs, {"device": "cpu", "batch_size": 1})
    their = evaluate(model, tasks, folder, model_name=stock)
    our = evaluate("hf_accelerated", tasks, folder, model_args=ours)
    for task in tasks:
        assert answers(our, task) == answers(their, task)


def test_fewer_frames_keep_their_size_and_come_in_pairs(folder, checkpoints) -> None:
    """The limit of a whole video is shared by the frames that were left out, too."""
    checkpoint = checkpoints(QWEN)
    runs = {}
    for name, more in (("dense", ""), ("fewer", ",method=fewer_frames,retention_ratio=0.6")):
        found = evaluate("hf_accelerated", ["video"], folder, model_args=arguments(checkpoint, more))
        runs[name] = lines(found, "video")
    for dense, fewer in zip(runs["dense"], runs["fewer"], strict=True):
        # 2 of 4 frames, one pair of two
        assert fewer["kept"] == 0.5 and fewer["visual_tokens_after"] == dense["visual_tokens_after"] / 2
        assert fewer["visual_tokens_before"] == dense["visual_tokens_before"]


def test_log_lines_carry_costs(folder, checkpoints) -> None:
    checkpoint = checkpoints(QWEN)
    args = arguments(checkpoint, ",retention_ratio=0.25")
    found = {m: evaluate(f"hf_{m}", ["video", "text"], folder, model_args=args) for m in ("visionzip", "fastv")}
    dense = evaluate("hf_accelerated", ["video", "text"], folder, model_args=arguments(checkpoint))
    text = SimpleNamespace(**json.loads((checkpoint / "config.json").read_text())["text_config"])
    text.head_dim = None
    layers = text.num_hidden_layers
    for line in lines(dense, "video"):
        # 4 frames are 2 pairs; 1024 pixels of 4 x 4 patches, 4 to a token
        assert line["visual_tokens_before"] == line["visual_tokens_after"] == 2 * 1024 // 64
        assert line["llm_tflops"] == prefill_macs([line["prompt_tokens"]] * layers, text) / 1e12
        assert all(line[f"{stage}_ms"] > 0 for stage in ("vision", "compress", "prefill", "decode"))
        assert line["method"] == "dense" and line["generated_tokens"] == 6 and line["first_token"]
    for line in lines(found["visionzip"], "video"):
        dropped = line["visual_tokens_before"] - line["visual_tokens_after"]
        assert line["visual_tokens_before"] == 32 and dropped == 32 - round(0.25 * 32)
        assert line["prompt_tokens_dense"] - line["prompt_tokens"] == dropped
        assert line["llm_tflops"] == prefill_macs([line["prompt_tokens"]] * layers, text) / 1e12
    for line in lines(found["fastv"], "video"):
        assert line["prompt_tokens"] == line["prompt_tokens_dense"] and line["visual_tokens_per_layer"] < 32
        assert line["llm_tflops"] < line["llm_tflops_dense"]
    for results in (dense, *found.values()):
        assert all(line["visual_tokens_before"] == 0 and line["first_token"] for line in lines(results, "text"))
        assert answers(results, "text") == answers(dense, "text")
        assert sum(line["warmup"] for task in ("video", "text") for line in lines(results, task)) == 1
    assert answers(found["visionzip"], "video") != answers(dense, "video")


def test_costs_of_a_beam_search_are_those_of_its_samples(folder, checkpoints) -> None:
    asked = {"gen_kwargs": "num_beams=3", "batch_size": 2, "limit": 2}
    args = arguments(checkpoints(QWEN), ",method=visionzip,retention_ratio=0.25")
    beams = evaluate("hf_accelerated", ["image"], folder, model_args=args, **asked)
    single = evaluate("hf_accelerated", ["image"], folder, model_args=args, limit=2)
    for key in ("visual_tokens_after", "prompt_tokens", "llm_tflops"):
        assert [x[key] for x in lines(beams, "image")] == [x[key] for x in lines(single, "image")]


def test_weights_are_loaded_once_and_methods_come_off(folder, checkpoints, monkeypatch) -> None:
    from lmms_eval_accelerate.models import native

    loaded = []
    load = native.HfAccelerated._load_weights
    monkeypatch.setattr(native.HfAccelerated, "_load_weights", lambda *a: loaded.append(1) or load(*a))
    args = arguments(checkpoints(QWEN))
    with session.session(share=True):
        results = [
            evaluate("hf_accelerated", ["image"], folder, model_args=args + more)
            for more in ("", ",method=visionzip,retention_ratio=0.25", "")
        ]
    assert len(loaded) == 1
    first, zipped, last = (answers(r, "image") for r in results)
    assert first == last != zipped


def test_kept_answers_are_not_generated_again(folder, checkpoints, monkeypatch, tmp_path) -> None:
    from lmms_eval_accelerate.models.engine import Accelerated

    args = arguments(checkpoints(QWEN))
    with session.session() as here:
        here.journal = tmp_path / "answers"
        first = evaluate("hf_accelerated", ["image", "text"], folder, model_args=args)
        monkeypatch.setattr(Accelerated, "_generate", lambda *_: pytest.fail("generated again"))
        again = evaluate("hf_accelerated", ["image", "text"], folder, model_args=args)
    for task in ("image", "text"):
        assert answers(first, task) == answers(again, task)
        assert lines(first, task) == lines(again, task)


def test_kept_tokens_are_saved_for_the_report(folder, checkpoints, tmp_path) -> None:
    (tmp_path / "run.json").write_text('{"started": "now"}')
    more = ",method=visionzip,retention_ratio=0.25,save_provenance=1"
    with session.session() as here:
        here.begin(RunFolder(tmp_path, rank=0), journal=None)
        evaluate("hf_accelerated", ["video", "image"], folder, model_args=arguments(checkpoints(QWEN), more))
    with np.load(tmp_path / "provenance" / "video" / "0.npz") as saved:
        assert saved["kept_0"].shape[0] == 2 and saved["kept_0"].sum() == 8  # pairs of frames
        assert saved["frames_0"].tolist() == [0, 1]
    assert (tmp_path / "provenance" / "video" / "0_0.jpg").exists()
    with np.load(tmp_path / "provenance" / "image" / "0.npz") as saved:
        assert saved["kept_0"].shape[0] == 1 and saved["frames_0"].tolist() == [0]


# -- prompts -----------------------------------------------------------------------------------------------------------


def asked(monkeypatch, run) -> list[str]:
    """The rendered prompts of a run."""
    from lmms_eval_accelerate.models.native import HfAccelerated

    texts, question = [], HfAccelerated._question

    def watched(*args):
        made = question(*args)
        texts.append(made.text)
        return made

    monkeypatch.setattr(HfAccelerated, "_question", watched)
    run()
    return texts


def test_prompt_is_that_of_the_stock_model(folder, checkpoints, monkeypatch) -> None:
    args = arguments(checkpoints(QWEN))
    for more, ending in ((",prompt_model=llava_vid", "best answer is:"), ("", "?"), (",prompt_model=none", "?")):
        run = lambda more=more: evaluate("hf_accelerated", ["video"], folder, model_args=args + more, limit=1)  # noqa: E731
        (text,) = asked(monkeypatch, run)
        assert text.startswith("<user><|vision_start|><|video_pad|>") and f"{ending}<assistant>" in text
        monkeypatch.undo()
    assert model_of(checkpoints(QWEN)).prompt_model == "qwen2_5_vl"


def test_system_prompt_and_template(folder, checkpoints, monkeypatch, tmp_path) -> None:
    message = [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]

    def text(name: str, more: str = "") -> str:
        model = model_of(checkpoints(name), more)
        model.task_dict = {"t": {"test": [{}]}}
        return model._question(message, ("t", 0, "test"), "here").text

    assert text(QWEN).startswith("<user>Why?")
    assert text(QWEN, ",system_prompt=Be brief.").startswith("<system>Be brief.<user>Why?")
    assert text(QWEN3).startswith("<system>You are a helpful assistant.<user>")
    assert text(QWEN3, ",system_prompt=none").startswith("<user>Why?")
    (tmp_path / "own.jinja").write_text("{{ messages[0]['content'][0]['text'] }} Answer:")
    assert text(QWEN, f",chat_template={tmp_path / 'own.jinja'}") == "Why? Answer:"
    with pytest.raises(MethodError, match=r"chat_template=.*missing"):
        model_of(checkpoints(QWEN), ",chat_template=missing.jinja")


def test_rounds_go_on_until_the_task_ends_them(folder, checkpoints) -> None:
    from lmms_eval.api.instance import Instance

    model = model_of(checkpoints(QWEN))
    model.task_dict["made_up"] = {"test": [{"question": "What?"}]}
    seen = []

    def messages(document, round_idx=None, previous_output=None, previous_round_info=None):
        turn = [{"role": "user", "content": [{"type": "text", "text": document["question"]}]}]
        if round_idx is None:
            return turn
        seen.append((round_idx, previous_round_info))
        return turn, round_idx == 2, previous_output, {"round": round_idx}

    request = Instance(
        "generate_until_multi_round",
        ("What?", messages, {"max_new_tokens": 3}, 0, "made_up", "test"),
        0,
        {"task": "made_up", "doc_id": 0, "repeats": 1},
    )
    (rounds,) = model.generate_until_multi_round([request])
    assert len(rounds) == 2 and seen == [(1, None), (2, {"round": 1})]


# -- images and videos -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {"nframes": 4, "min_pixels": 256, "max_pixels": 1024},
        {"fps": 4.0, "min_pixels": 256, "total_pixels": 20000},
        {"fps": 2.0},
        {"nframes": 6, "video_start": 0.5, "video_end": 2.0},
    ],
)
def test_clips_are_those_of_qwen_vl_utils(how, tmp_path) -> None:
    pytest.importorskip("decord")
    from lmms_eval_accelerate.models.clips import Sampling, read_clip
    from qwen_vl_utils.vision_process import fetch_video

    path = str(write_video(tmp_path / "a.mp4", frames=24, side=80))
    theirs, about = fetch_video({"video": path, **how}, image_patch_size=4, return_video_metadata=True)
    span = {k: v for k, v in how.items() if k.startswith("video")}
    limits = {k: v for k, v in how.items() if k.endswith("pixels")}
    sampling = Sampling(how.get("nframes"), how.get("fps"), patch=4, backend="decord", **limits)
    clip = read_clip({"path": path, **span} if span else path, sampling, "here")
    assert torch.equal(clip.frames, theirs)
    assert clip.metadata == about


def test_frames_for_internvl_are_those_of_its_processor(tmp_path) -> None:
    from lmms_eval_accelerate.models.clips import Sampling, read_clip
    from transformers import InternVLVideoProcessor
    from transformers.video_utils import VideoMetadata

    path = str(write_video(tmp_path / "a.mp4", frames=23))
    for count in (1, 5, 8, 23):
        about = VideoMetadata(total_num_frames=23, fps=8.0)
        theirs = InternVLVideoProcessor().sample_frames(about, num_frames=count).tolist()
        assert read_clip(path, Sampling(count, middles=True), "here").metadata["frames_indices"] == theirs
    assert len(read_clip(path, Sampling(40, middles=True), "here").frames) == 23


def test_frames_and_other_sources(tmp_path) -> None:
    from lmms_eval_accelerate.models.clips import Sampling, read_clip
    from lmms_eval_accelerate.models.visuals import read_image
    from PIL import Image

    (tmp_path / "frames").mkdir()
    for number in range(5):
        write_image(tmp_path / "frames" / f"{number}.png", (40, 24), number)
    for sampling, count in ((Sampling(4, patch=4), 4), (Sampling(7, patch=4), 4), (Sampling(3), 3)):
        clip = read_clip(str(tmp_path / "frames"), sampling, "here")
        assert len(clip.frames) == len(clip.metadata["frames_indices"]) == count
        assert clip.metadata["total_num_frames"] == 5 and clip.metadata["fps"] == 3
    path = write_video(tmp_path / "one.mp4", frames=1)
    assert len(read_clip(str(path), Sampling(4, patch=4), "here").frames) == 2
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert read_image(clear, "here").getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(VisualError, match=r"here: .*none\.png"):
        read_image(str(tmp_path / "none.png"), "here")
    with pytest.raises(VisualError, match="here: a video is a int"):
        read_clip(7, Sampling(4), "here")


# -- errors ------------------------------------------------------------------------------------------------------------


def parse(model_id: str = "hf_accelerated", **given):
    from lmms_eval_accelerate.models import model_class

    return model_class(model_id).parse(pretrained="x", **given)


def test_arguments() -> None:
    assert parse(max_frames_num=8).max_num_frames == 8 and parse().until == "ignore"
    assert parse(config="fastvid/qwen2_5_vl").pipeline.name == "fastvid"
    with pytest.raises(MethodError, match="one argument"):
        parse(max_frames_num=8, max_num_frames=9)
    with pytest.raises(UnknownNameError, match="max_num_frames"):
        parse(max_num_frame=8)
    with pytest.raises(UnknownNameError, match="conv_template"):
        parse(conv_template="qwen_1_5")
    with pytest.raises(MethodError, match="sample stage"):
        parse("hf_downsample")
    with pytest.raises(MethodError, match="is for the family"):
        parse(config="fastvid/llava_onevision")


def test_a_class_without_a_host_is_named(tmp_path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(MethodError, match=r"is a LlamaForCausalLM; no host.*Qwen2_5_VLForConditionalGeneration"):
        model_of(tmp_path)
    with pytest.raises(MethodError, match=r"LlavaQwenForCausalLM.*run as llava, llava_onevision or llava_video"):
        model_of(CHECKPOINTS / "tiny-llava-onevision")


def test_what_a_checkpoint_lacks_is_named(checkpoints, tmp_path) -> None:
    with pytest.raises(MethodError, match="processor"):
        model_of(CHECKPOINTS / QWEN)
    bare = tmp_path / QWEN
    shutil.copytree(checkpoints(QWEN), bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(MethodError, match="no chat template; give one with chat_template=FILE"):
        model_of(bare)
    with pytest.raises(MethodError, match="only models of the Qwen-VL family"):
        model_of(checkpoints(LLAVA), ",min_pixels=9")
    with pytest.raises(MethodError, match="min_pixels=2000000 is more"):
        model_of(checkpoints(QWEN), ",min_pixels=2000000")


def test_a_method_that_can_do_nothing_on_the_class_is_refused_before_loading(checkpoints, monkeypatch) -> None:
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(MethodError, match=r"dycoke cannot run on LLaVA-1\.5-HF: acts on video only"):
        model_of(checkpoints(LLAVA), model_id="hf_dycoke")


def test_videos_for_a_model_of_images_are_an_error(folder, checkpoints) -> None:
    with pytest.raises(TypeError, match=r"task video, .*LlavaForConditionalGeneration reads images"):
        evaluate("hf_accelerated", ["video"], folder, model_args=arguments(checkpoints(LLAVA)))


def test_likelihoods_are_refused(checkpoints) -> None:
    with pytest.raises(MethodError, match="generate_until"):
        model_of(checkpoints(QWEN)).loglikelihood([])


@pytest.mark.parametrize("kind", ["video", "image"])
def test_unreadable_files_are_named_or_skipped(kind, checkpoints, tmp_path) -> None:
    good = write_video(tmp_path / "good.mp4") if kind == "video" else write_image(tmp_path / "good.png", (64, 64))
    bad = good.with_stem("damaged")
    bad.write_bytes(good.read_bytes()[:20])
    paths = [good, bad, good]
    documents = [document(n, video=p) if kind == "video" else document(n, (p,)) for n, p in enumerate(paths)]
    tasks = write_tasks(tmp_path / "tasks", broken=documents)
    with pytest.raises(VisualError, match=rf"task broken, .*doc 1.*damaged\.{good.suffix[1:]}"):
        evaluate("hf_accelerated", ["broken"], tasks, model_args=arguments(checkpoints(QWEN)))
    args = arguments(checkpoints(QWEN), ",on_error=skip")
    results = evaluate("hf_accelerated", ["broken"], tasks, model_args=args, batch_size=2)
    assert [bool(line.get("skipped")) for line in lines(results, "broken")] == [False, True, False]
    assert answers(results, "broken")[1] == ""


# -- tables and scripts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [QWEN, QWEN3, ONEVISION, LLAVA, NEXT, INTERN])
def test_the_table_says_what_the_hosts_give(name, checkpoints) -> None:
    model = model_of(checkpoints(name)).model
    (row,) = [f for f in compatibility.FAMILIES if type(model).__name__ in f.classes]
    family = family_class(model)(model)
    assert row.signals - IMAGE_TEXT == family.signals - IMAGE_TEXT and row.key == "hf"  # a text tower is a checkpoint's


def test_every_class_with_a_host_is_in_the_table(monkeypatch) -> None:
    monkeypatch.setattr(families, "_added", [])  # those of examples
    assert sorted(name for f in compatibility.FAMILIES for name in f.classes) == class_names()


def test_scripts_need_a_checkpoint_and_say_so() -> None:
    scripts = sorted((ROOT / "scripts" / "eval").glob("*_qwen2_5_vl.sh"))
    assert len(scripts) > 20
    environment = {k: v for k, v in os.environ.items() if k != "PRETRAINED"}
    for script in scripts:
        done = subprocess.run(["bash", script], capture_output=True, text=True, env=environment)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert "needs a checkpoint, e.g. PRETRAINED=Qwen/Qwen2.5-VL-7B-Instruct" in done.stderr
        config = f"{script.stem.removesuffix('_qwen2_5_vl')}/qwen2_5_vl"
        assert f" --config {config} " in script.read_text()
        with pytest.raises(SystemExit) as stop:
            compare.main(["--config", config])
        assert stop.value.code == 2


def test_all_runs_of_a_comparison_share_one_setting() -> None:
    given_words = ["--config", "visionzip/qwen2_5_vl", "--pretrained", "some/model"]
    argv = [*given_words, "--methods", "dense fastvid@0.25"]
    plan = comparison_of(compare.wanted_of(parser().parse_args(argv)))
    from accelerate_methods.registry.settings import Setting

    settings = [Setting(), Setting.of("visionzip"), Setting.of("fastvid", retention_ratio=0.25)]
    values = []
    for setting in settings:
        argv = plan.run(setting).argv
        assert argv[argv.index("--model") + 1] == "hf_accelerated"
        from lmms_eval.utils import simple_parse_args_string

        given = simple_parse_args_string(argv[argv.index("--model_args") + 1])
        parsed = parse(**{k: v for k, v in given.items() if k != "pretrained"})
        values.append({k: str(v) for k, v in parsed.values.items() if k not in ("method", "config", "pretrained")})
    assert values[0] == values[1] == values[2]
    assert resolve("fastvid/qwen2_5_vl").name == "fastvid"
    with pytest.raises(SystemExit, match="--picture draws models of the llava package only"):
        compare.main([*given_words, "--picture", "a.mp4"])
