"""The efficiency bench, end to end on tiny shapes. What it measures is not looked at, only what it says about it."""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import accelerate_methods
from accelerate_methods.bench import against_transformers, cli, measure, plots, results, shapes, steadiness, table
from accelerate_methods.bench import run as bench_run
from accelerate_methods.bench.inputs import fed, make_inputs
from accelerate_methods.bench.run import chosen
from accelerate_methods.engine import flops
from accelerate_methods.registry.settings import Setting, settings_of
from accelerate_methods.stages.errors import MethodError, UnknownNameError
from tests.support.paths import ROOT

CPU = torch.device("cpu")

_CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
    "num_hidden_layers": 3, "image_size": 56, "patch_size": 14, "num_channels": 3, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5, "projection_dim": 32,
}  # fmt: skip
_VICUNA = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, vocab_size=256,
    max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
_PINPOINTS = {"image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]]}


def tiny_clip(name: str) -> shapes.Shape:
    """An official shape with small dimensions."""
    shape = shapes.SHAPES[name]
    llava = {**shape.llava, **(_PINPOINTS if shape.llava else {})}
    return dataclasses.replace(shape, decoder=_VICUNA, tower=_CLIP, llava=llava, image_size=(112, 112))


def built(shape: shapes.Shape, folder: Path, dtype=torch.float32, **inputs):
    model = shapes.build(shape, CPU, dtype, "sdpa", folder)
    kind = {"modality": "video" if shape.frames else "image", "frames": shape.frames, "image_size": shape.image_size}
    return model, make_inputs(model, **{"text_tokens": 20, "batch": 1, **kind, **inputs})


def rows_of(model, inputs, words: str, family: str = "llava_onevision", samples: int = 1) -> dict[str, measure.Row]:
    bench = measure.Bench(model, inputs, 2, family)
    rows = [measure.Row(setting) for setting in settings_of(words, 0.25, {}, family)]
    for row in rows:
        bench.prepare(row)
        if row.ok:
            bench.find_facts(row)
        for _ in range(samples):
            if row.ok:
                bench.sample(row)
    return {row.setting.label: row for row in rows}


def run(tmp_path: Path, *argv: str) -> tuple[int, dict]:
    before = set(tmp_path.glob("*.json"))
    code = cli.main([
        "--model", "tiny", "--device", "cpu", "--repeats", "2", "--warmup", "0", "--new-tokens", "2", "--frames", "4",
        "--output", str(tmp_path), *argv,
    ])  # fmt: skip
    (new,) = set(tmp_path.glob("*.json")) - before
    return code, results.read(new)


def test_result_file(tmp_path, capsys):
    code, content = run(tmp_path, "--methods", "all@0.25 visionzip+fastv", "--plots", "--compare-transformers")
    assert code == 0
    assert {"kind", "schema", "created", "command", "machine", "versions", "model", "input", "rows"} <= content.keys()
    assert set(content["machine"]) == {"name", "device", "cpu", "threads", "gpu", "memory_bytes"}
    assert content["machine"]["gpu"] is None
    assert set(content["versions"]) == {"python", "torch", "transformers", "accelerate_methods"}
    expected = {"shape": "tiny", "weights": "random", "dtype": "float32", "device": "cpu", "attention": "sdpa"}
    assert content["model"] == expected
    assert content["input"] | {"features": ""} == {
        "kind": "video", "frames": 4, "source": "made up", "features": "", "text_tokens": 50, "batch": 1,
        "new_tokens": 2,
    }  # fmt: skip
    rows = {row["label"]: row for row in content["rows"]}
    assert next(iter(rows)) == "dense"
    # which need weights of a scorer, the words of a question, and pixels
    every = set(accelerate_methods.available()) - {"aks", "mmtok", "pixelprune"}
    assert {name.split("@")[0] for name in rows} >= every
    for row in rows.values():
        assert row["status"] == "ok", row
        assert set(row["samples"]) == set(measure.SAMPLES)
        assert all(len(values) == 2 and min(values) > 0 for values in row["samples"].values()), row["label"]
        assert row["kv_cache_bytes"] > 0 and len(row["prompt_tokens"]["layers"]) == 12
        assert {"tower", "llm_prefill", "method", "llm_prefill_papers"} <= row["tflops"].keys()
        assert row["tflops"]["llm_prefill"] <= row["tflops"]["llm_prefill_dense"]
        if "@" in row["label"] and row["label"] != "tome@0.25":  # a share was asked for; two blocks merge less
            assert row["tflops"]["llm_prefill"] < row["tflops"]["llm_prefill_dense"], row["label"]
            assert row["visual_tokens"]["per_layer"] < row["visual_tokens"]["before"]
    assert rows["fastvid@0.25"]["params"] == {"retention_ratio": 0.25}
    # 4 frames of 8 x 8 patches pooled to 16 tokens, a newline, the text
    assert rows["dense"]["prompt_tokens"]["dense"] == 4 * 16 + 1 + 50
    shown = capsys.readouterr().out
    for text in ("visual", "decode", "KV", "made-up", "random weights", "LlavaOnevisionForConditional", "written:"):
        assert text in shown
    assert sorted(p.name.rsplit("_", 1)[1] for p in tmp_path.glob("*.png")) == [
        "retention.png", "speedup.png", "stages.png",
    ]  # fmt: skip
    assert content["transformers"]["status"] == "ok"
    assert content["transformers"]["max_logit_difference"] < 1e-4
    assert content["transformers"]["prompt_tokens"] == 115


def test_nothing_is_left_on_the_model_and_settings_do_not_disturb_each_other(tmp_path):
    model, inputs = built(shapes.SHAPES["tiny"], tmp_path, frames=4)
    arguments = {**inputs.arguments(), "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    before = model.generate(inputs.ids, **arguments)
    rows = rows_of(model, inputs, "dense fastvid fastv fastervlm", samples=2)
    assert all(row.ok for row in rows.values())
    assert "acceleration" not in model.__dict__
    assert not {"look", "encode"} & set(model.get_vision_tower().__dict__)
    assert torch.equal(before, model.generate(inputs.ids, **arguments))
    again = rows_of(model, inputs, "fastervlm dense")
    assert again["dense"].facts == rows["dense"].facts
    assert again["fastervlm@0.25"].facts == rows["fastervlm@0.25"].facts


def test_counted_runs_give_the_method_the_signals_that_it_always_gets(tmp_path):
    model, inputs = built(shapes.SHAPES["tiny"], tmp_path, frames=2)
    for method in ("visionzip", "fastvid"):
        with accelerate_methods.accelerate(model, method):
            (plain,) = model.encode(inputs.pixels, ["video"])
            counter = flops.MacCounter()
            with measure.counted_work(model, counter):
                (counted,) = model.encode(inputs.pixels, ["video"])
        assert plain.signals.keys() == counted.signals.keys() and plain.signals and counter.macs > 0
        for name, value in plain.signals.items():
            assert torch.equal(value, counted.signals[name])


def test_facts_of_the_stages(tmp_path):
    model, inputs = built(shapes.SHAPES["tiny"], tmp_path, frames=4)
    rows = rows_of(model, inputs, "dense fastvid fastv dycoke", samples=0)
    dense, fastvid, fastv, dycoke = (row.facts for row in rows.values())
    assert dense["tflops"]["method"] == 0
    assert fastvid["tflops"]["method"] > 0 and fastv["tflops"]["method"] > 0
    # the cache holds keys and values of two heads of 16 in float32 for every token of every layer
    for facts in (dense, fastvid, fastv):
        assert facts["kv_cache_bytes"] == 4 * flops.kv_cache_values(facts["prompt_tokens"]["layers"], model.config)
    assert fastv["prompt_tokens"]["layers"][:2] == [85, 85] and fastv["prompt_tokens"]["layers"][2] < 85
    assert dycoke["tflops"]["llm_decode"] is None and dense["tflops"]["llm_decode"] > 0


def test_made_up_features_look_like_a_video_to_the_methods(tmp_path):
    model, inputs = built(shapes.SHAPES["tiny"], tmp_path, frames=32)
    with fed(model, inputs), torch.no_grad():
        (item,) = model.encode(inputs.pixels, ["video"])
    tokens = torch.nn.functional.normalize(item.features, dim=-1)
    along = (tokens[1:] * tokens[:-1]).sum(-1)  # the same place in the next frame
    elsewhere = (tokens[:, 1:] * tokens[:, :-1]).sum(-1)
    assert along.median() > 0.9 > elsewhere.median()
    with torch.no_grad():
        (plain,) = model.encode(inputs.pixels, ["video"])
    assert not torch.allclose(plain.features, item.features)


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-next-7b"])
def test_images(tmp_path, name):
    model, inputs = built(tiny_clip(name), tmp_path, batch=2)
    rows = rows_of(model, inputs, "dense all visionzip+fastv fastvid prunevid", family="llava")
    tokens = {"llava-1.5-7b": 16, "llava-next-7b": 16 + 64}[name]
    assert rows["dense"].facts["visual_tokens"]["before"] == tokens
    assert rows["fastvid@0.25"].status.startswith("error: fastvid leaves images alone")
    good = [row for label, row in rows.items() if label not in ("fastvid@0.25", "prunevid", "mmtok@0.25")]
    assert all(row.ok for row in good), {row.setting.label: row.status for row in good if not row.ok}
    # a method that acts on views projects only what stays
    assert rows["visionzip@0.25"].facts["tflops"]["projector"] < rows["dense"].facts["tflops"]["projector"] / 2
    compared = against_transformers.compare(model, inputs, 1, 0)
    if name == "llava-1.5-7b":
        assert compared["status"] == "ok" and compared["max_logit_difference"] < 1e-4
    else:
        assert "llava-1.5 shapes only" in compared["status"]


def test_out_of_memory_is_a_row(tmp_path, monkeypatch, capsys):
    fastv = accelerate_methods.registry.method_class("fastv")

    def full(self, step):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")

    monkeypatch.setattr(fastv, "prefill", full)
    code, content = run(tmp_path, "--methods", "fastv random@0.5", "--plots")
    assert code == 0
    status = {row["label"]: row["status"] for row in content["rows"]}
    assert status == {"dense": "ok", "fastv@0.1": "out of memory", "random@0.5": "ok"}
    assert "out of memory" in capsys.readouterr().out


def test_an_error_is_a_row_and_an_exit_code(tmp_path, capsys):
    code, content = run(tmp_path, "--methods", "prunevid(selected_layer=40) random")
    assert code == 1
    (row,) = [r for r in content["rows"] if r["method"] == "prunevid"]
    assert row["status"].startswith("error: prunevid: selected_layer=40") and row["tflops"] is None
    assert "selected_layer=40" in capsys.readouterr().out


def test_results_are_never_overwritten(tmp_path):
    content = {"created": "2026-01-02T03:04:05+00:00", "model": {"shape": "a/b c"}, "kind": "efficiency", "schema": 1}
    paths = [results.write({**content, "number": n}, tmp_path) for n in range(3)]
    assert [p.name for p in paths] == [f"20260102-030405_a-b-c{end}.json" for end in ("", "_2", "_3")]
    assert [json.loads(p.read_text())["number"] for p in paths] == [0, 1, 2]


def _row(label: str, compress: list[float], prefill: list[float], layers: float, work: float) -> dict:
    return {
        "label": label, "method": None if label == "dense" else label, "params": {}, "status": "ok",
        "visual_tokens": {"before": 100, "after": 100, "per_layer": layers},
        "tflops": {"llm_prefill": work, "llm_prefill_dense": 10.0},
        "samples": {
            "vision_ms": [1.0] * 3, "compress_ms": compress, "prefill_ms": prefill, "first_token_ms": [50.0] * 3,
            "decode_tokens_per_s": [9.0] * 3,
        },
        "peak_memory_bytes": 3 * 2**30, "kv_cache_bytes": 2**20,
    }  # fmt: skip


def test_numbers_of_a_row():
    dense = _row("dense", [0.0] * 3, [40.0, 44.0, 20.0], 100, 10.0)
    row = _row("some@0.5", [2.0, 3.0, 4.0], [6.0, 7.0, 7.0], 50, 2.0)
    assert results.speed_up(row, dense) == 40.0 / 10.0  # medians of the sums
    assert results.compress_share(row, dense) == 3.0 / 40.0
    assert results.flops_share(row) == 0.2 and results.kept_share(row) == 0.5
    assert results.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == 1.0 and results.spread([1.0]) == 0.0
    assert table._cells(row, dense)[8] == "4.00x (5.00x)"
    assert table._cells(row, None)[8] == ""


STEADY = ([0.0] * 5, [40.0, 40.5, 41.0, 39.0, 39.5])


@pytest.mark.parametrize(
    ("dense", "row", "says"),
    [
        (STEADY, ([1.0] * 5, [8.0, 8.1, 7.9, 8.0, 8.2]), None),
        (STEADY, ([1.0] * 5, [8.0, 8.1, 7.9, 8.0, 99.0]), None),  # one slow call moves no median
        (STEADY, ([1.0] * 5, [8.0, 14.0, 7.9, 15.0, 99.0]), "its times spread by ±23%"),
        (([0.0] * 5, [40.0, 90.0, 41.0, 95.0, 99.0]), ([1.0] * 5, [8.0] * 5), "the dense run spread by ±30%"),
        (([0.0] * 5, [290.0] * 5), ([1.0] * 5, [8.0] * 5), "speed-up of 32.2x where LLM FLOPs allow 10.0x"),
        (([0.0], [40.0]), ([1.0], [8.0]), None),  # of one sample nothing is known
    ],
)
def test_times_of_a_busy_machine_are_marked_and_not_ranked(dense, row, says, tmp_path):
    dense, row = _row("dense", *dense, 100, 10.0), _row("some@0.1", *row, 50, 1.0)
    why = steadiness.busy(row, dense)
    assert (says in why) if says else why is None
    cells = table._cells(row, dense)
    assert cells[0].startswith("~ ") == cells[8].startswith("~ ") == bool(says)
    told = steadiness.told([dense, row], dense)
    assert any(line.startswith("~ some@0.1: ") for line in told) == bool(says)
    assert bool(told) == ("busy" in " ".join(told))
    assert steadiness.busy({**row, "status": "out of memory"}, dense) is None
    assert steadiness.busy(dense, dense) is None or "spread" in says


@pytest.mark.parametrize(("first", "repeats"), [([], 3), ([100.0], 5), ([10.0, 100.0, 55.0] * 9, 9)])
def test_repeats_go_on_until_the_spread_is_small_or_it_is_said_that_it_could_not(first, repeats):
    """At most three times --repeats; ``first``: times of the first calls."""
    times = itertools.chain(first, itertools.repeat(10.0))

    class Bench:
        def prepare(self, row) -> None:
            row.facts = {}

        find_facts = prepare

        def sample(self, row, keep: bool) -> None:
            row.samples["compress_ms"].append(0.0)
            row.samples["prefill_ms"].append(next(times))

    rows, shown = [measure.Row(Setting())], Console(file=io.StringIO(), width=200)
    asked = {"warmup": 0, "repeats": 3, "time_limit": None, "check_sync": False, "compare_transformers": False}
    bench_run.measure(Bench(), rows, argparse.Namespace(**asked), shown)
    assert len(rows[0].samples["prefill_ms"]) == repeats
    assert ("after 9 repeats the times still spread too much: dense" in shown.file.getvalue()) == (repeats == 9)


def test_markdown_and_plots_without_a_dense_row(tmp_path):
    failed = {**_row("dense", [], [], 100, 10.0), "status": "out of memory"}
    content = {
        "model": {"shape": "x", "weights": "random", "dtype": "float32", "attention": "sdpa"},
        "input": {"kind": "video", "frames": 4, "source": "made up", "features": "made up", "batch": 1},
        "machine": {"name": "machine", "threads": 1, "gpu": None},
        "rows": [failed, _row("some@0.5", [2.0] * 3, [6.0] * 3, 50, 2.0)],
    }
    text = table.markdown(content)
    assert "| dense | out of memory |" in text and "| some@0.5 | 50 (50.0%) | 20.0% |" in text
    assert [p.name for p in plots.draw(content, tmp_path / "r.json")] == ["r_retention.png", "r_stages.png"]


def test_show_reads_results_and_refuses_other_files(tmp_path, capsys):
    run(tmp_path, "--methods", "dense")
    (path,) = tmp_path.glob("*.json")
    capsys.readouterr()
    assert cli.main(["--show", str(path), "--markdown"]) == 0
    assert "| dense |" in capsys.readouterr().out
    other = tmp_path / "other.json"
    other.write_text('{"kind": "something"}')
    with pytest.raises(SystemExit):
        cli.main(["--show", str(other)])
    assert "is not a result of" in capsys.readouterr().err
    content = json.loads(path.read_text())
    for change, reason in (
        ({"rows": {}}, "'rows' is not a list"),
        ({"rows": [{"label": "dense", "status": "ok", "samples": {}}]}, "has no 'tflops'"),
        ({"machine": 3}, "'machine' is not a mapping"),
    ):
        other.write_text(json.dumps({**content, **change}))
        with pytest.raises(SystemExit):
            cli.main(["--show", str(other)])
        said = capsys.readouterr().err
        assert f"error: cannot read {other}: " in said and reason in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--model", "tinny"), "Did you mean 'tiny'"),
        (("--model", "tiny", "--methods", "fastvidd"), "Did you mean 'fastvid'"),
        (("--model", "tiny", "--device", "cpu", "--check-sync"), "--check-sync needs CUDA"),
        (("--model", "tiny", "--methods", "levels"), "'levels' are those of a config"),
        (("--model", "tiny", "--repeats", "0"), "at least 1"),
        (("--model", "tiny", "--image-size", "12"), "not a size"),
        (("--model", "tiny", "--video", "nowhere.mp4"), "nowhere.mp4"),
        (("--model", "tiny", "--device", "gpu"), "unknown device 'gpu'"),
        (("--model", "tiny", "--device", "cuda:99"), "device cuda:99: torch sees"),
        (("--model", "tiny", "--output", f"{__file__}/below"), "is no folder"),
        (("--pretrained", "/nowhere"), "cannot reach checkpoint '/nowhere'"),
    ],
)
def test_bad_arguments_are_one_message(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(list(argv))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", ["fastvidd", "fastv@2", "fastv(kk=1)", "dense@0.5", "dense(tokens=3)"])
@pytest.mark.parametrize(
    "model", [("--model", "llava-onevision-7b"), ("--pretrained", str(ROOT / "assets/tiny-llava-onevision"))]
)
def test_methods_are_read_before_a_model_is_made(words, model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_run, "_model_and_inputs", lambda *_: pytest.fail("a model was made first"))
    with pytest.raises(SystemExit) as stop:
        cli.main([*model, "--methods", words, "--output", str(tmp_path)])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: ")


def test_all_leaves_out_what_does_nothing_with_the_input():
    labels = [s.label for s in chosen("all@0.2", 0.1, "llava_onevision", "image")]
    assert labels[0] == "dense" and "fastv@0.2" in labels and "fastvid@0.2" not in labels
    assert "fastvid@0.2" in [s.label for s in chosen("all@0.2", 0.1, "llava_onevision", "video")]
    named = chosen("all@0.2, fastvid", 0.1, "llava_onevision", "image")
    assert Setting.of("fastvid", retention_ratio=0.1) in named  # whoever names it is told


@pytest.mark.parametrize("name", [name for name in shapes.SHAPES if name != "tiny"])
def test_official_shapes(tmp_path, name):
    """Built without memory: parameter counts of the LLMs, and the tokens that the official code would have."""
    model = shapes.build(shapes.SHAPES[name], torch.device("meta"), torch.bfloat16, "sdpa", tmp_path)
    tower = model.get_model().vision_tower
    counted = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in tower.parameters())
    counted -= sum(p.numel() for p in model.get_model().mm_projector.parameters())
    counted -= getattr(model.get_model(), "image_newline", torch.empty(0)).numel()
    # Qwen2-7B 7,615,616,512; Qwen2-0.5B 494,032,768; Vicuna (LLaMA) 6,738,415,616 and 13,015,864,320
    expected = {
        "llava-onevision-7b": 7_615_616_512, "llava-video-7b": 7_615_616_512, "llava-onevision-0.5b": 494_032_768,
        "llava-1.5-7b": 6_738_415_616, "llava-next-7b": 6_738_415_616, "llava-1.5-13b": 13_015_864_320,
        "llava-next-13b": 13_015_864_320,
    }  # fmt: skip
    assert counted == expected[name]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_unknown_shape():
    with pytest.raises(UnknownNameError):
        shapes.shape_of("llava-onevision-8b")


def test_half_precision_does_not_overflow(tmp_path):
    model, inputs = built(shapes.SHAPES["tiny"], tmp_path, dtype=torch.bfloat16, frames=2)
    with torch.no_grad():
        out = model(input_ids=inputs.ids, logits_to_keep=1, **inputs.arguments())
    assert out.logits.dtype == torch.bfloat16 and out.logits.isfinite().all()
    assert torch.get_default_dtype() == torch.float32


def test_module_runs_without_lmms_eval_and_matplotlib():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['lmms_eval', 'lmms_eval_accelerate', 'matplotlib', 'decord']));"
        "from accelerate_methods.bench.cli import main; main(['--list-models'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "llava-onevision-7b" in done.stdout


def test_plots_need_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MethodError, match="plots need matplotlib"):
        plots.draw({"rows": []}, tmp_path / "r.json")
