"""The report: numbers in CSV and HTML, grouping, errors, saved provenance, and the page in a real browser."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("plotly")

from lmms_eval_accelerate.distributions import pack
from lmms_eval_accelerate.report.__main__ import main
from lmms_eval_accelerate.report.accuracy import accuracy_sections
from lmms_eval_accelerate.report.figures import Style, pareto
from lmms_eval_accelerate.report.labels import labels_of
from lmms_eval_accelerate.report.results import find
from lmms_eval_accelerate.report.statistics import McNemar, bootstrap_interval, mcnemar, p_text, pareto_front
from lmms_eval_accelerate.runs.long_prompts import MARK

FASTV = {"method": "fastv", "retention_ratio": 0.25, "k": 2}


# -- made-up runs ------------------------------------------------------------------------------------------------------


def write_run(
    folder: Path, methods: list[dict], scores: list, tokens: float = 100.0, prefill: float = 10.0, **changes
) -> Path:
    """A finished run of task ``quiz`` as lmms-eval-accelerate leaves it; ``scores`` per document."""
    answers = ["yes" if score else "no" for score in scores]
    costs = {
        "samples": len(scores),
        "visual_tokens_before": 100.0,
        "visual_tokens_per_layer": tokens,
        "llm_tflops_dense": 2.0,
        "llm_tflops": 2.0 * tokens / 100,
        "vision_ms": 5.0,
        "compress_ms": 1.0 if methods else 0.0,
        "prefill_ms": prefill,
        "decode_ms": 6.0,
        "generated_tokens": 3.0,
    }
    name = "+".join(m["method"] for m in methods) or "dense"
    settings = {
        **{
            "family": "llava_onevision",
            "methods": methods,
            "method": name,
            "config": None,
            "conv_template": "qwen_1_5",
        },
        **{"pretrained": "lmms-lab/llava-onevision-qwen2-7b-ov", "max_frames_num": 32, "device": "cpu"},
        **changes.pop("settings", {}),
    }
    number = [score for score in scores if isinstance(score, float)]
    summary = {
        "method": name,
        "methods": methods,
        "tasks": {"quiz": {"exact_match": sum(number) / len(number)}} if number else {"quiz": {"made_up": 0.5}},
        "n_samples": {"quiz": len(scores)},
        "costs": {"overall": costs, "by_task": {"quiz": costs}},
        "settings": settings,
        "limit": None,
        "date": "20260101_000000",
        "versions": {"torch": "2.15.0"},
    } | changes
    lines = [
        {"doc_id": n, "input": f"question <{n}>?", "target": "yes", "filtered_resps": [answer], "exact_match": score}
        for n, (answer, score) in enumerate(zip(answers, scores, strict=True))
    ]
    (folder / "model").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"command": "made up", "started": "2026-01-01T00:00:00"}))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "model" / "20260101_000000_results.json").write_text(json.dumps({"configs": {"quiz": {"repeats": 1}}}))
    (folder / "model" / "20260101_000000_samples_quiz.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def write_provenance(run: Path, started: str = "2026-01-01T00:00:00") -> None:
    """One document: a clip of two frames on a 2x2 grid in a model of three layers; two tokens leave before layer 2."""
    folder = run / "provenance" / "quiz"
    folder.mkdir(parents=True)
    owner = np.array([[0, 1, 1, -1], [2, 3, 4, 5]], dtype=np.int16)
    kept = np.array([[True, True, False, False], [True] * 4])
    left_at = np.array([[3, 3, 3, 0], [2, 2, 3, 3]], dtype=np.int16)
    facts = {"modality": "video", "tokens_before": 8, "tokens_after": 6, "grid": [2, 2], "num_layers": 3, "info": {}}
    meta = {"task": "quiz", "doc_id": 1, "method": "made up", "started": started, "items": [facts]}
    arrays = {"owner_0": owner, "kept_0": kept, "left_at_0": left_at, "frames_0": np.array([0, 1])}
    np.savez_compressed(folder / "1.npz", meta=np.array(json.dumps(meta)), **arrays)
    Image.new("RGB", (336, 168), "teal").save(folder / "1_0.jpg")


def bench_row(label: str, method: str | None, params: dict, share: float, compress: float, prefill: float) -> dict:
    return {
        **{"label": label, "method": method, "params": params, "status": "ok"},
        "visual_tokens": {"before": 1000, "after": 1000 * share, "per_layer": 1000 * share},
        "prompt_tokens": {"dense": 1020, "first_layer": 1020, "layers": []},
        "tflops": {"tower": 5.0, "llm_prefill": 40 * share, "method": 0.1, "llm_prefill_papers": 30 * share},
        "samples": {
            "vision_ms": [50.0, 52.0, 51.0],
            "compress_ms": [compress] * 3,
            "prefill_ms": [prefill, prefill + 2, prefill - 2],
            "first_token_ms": [60 + prefill] * 3,
            "decode_tokens_per_s": [30.0] * 3,
        },
        **{"peak_memory_bytes": 2**34, "kv_cache_bytes": 2**27},
    }


def write_bench(path: Path, **changes) -> Path:
    failed = {"label": "prunevid", "method": "prunevid", "params": {}, "status": "out of memory", "samples": {}}
    content = {
        **{"kind": "efficiency", "schema": 1, "created": "2026-01-01T00:00:00", "command": []},
        "machine": {"name": "made up", "device": "cpu", "cpu": "made up", "threads": 1, "gpu": None, "memory_bytes": 1},
        "versions": {"torch": "2.15.0"},
        "model": {"shape": "llava-onevision-7b", "weights": "random", "dtype": "bfloat16", "attention": "sdpa"},
        "input": {"kind": "video", "frames": 32, "source": "made up", "text_tokens": 20, "batch": 1},
        "rows": [
            bench_row("dense", None, {}, 1.0, 0.0, 100.0),
            bench_row("fastv@0.25", "fastv", {"retention_ratio": 0.25}, 0.4, 0.0, 40.0),
            bench_row("fastvid@0.1", "fastvid", {"retention_ratio": 0.1}, 0.1, 5.0, 15.0),
            failed,
        ],
    } | changes
    path.write_text(json.dumps(content))
    return path


@pytest.fixture()
def runs(tmp_path) -> Path:
    """Dense is right in 4 of 5 documents, FastV in 3: wrong in one that dense gets right."""
    from accelerate_methods.registry.pipeline import resolve

    fastv = json.loads(json.dumps(resolve("fastv", retention_ratio=0.25).to_dict()))
    write_run(tmp_path / "runs" / "dense", [], [1.0, 1.0, 1.0, 1.0, 0.0])
    write_run(tmp_path / "runs" / "fastv", fastv, [1.0, 0.0, 1.0, 1.0, 0.0], tokens=25.0, prefill=4.0)
    return tmp_path / "runs"


def report(*paths: Path, output: Path) -> tuple[list[dict], str]:
    """Rows of accuracy.csv (empty without runs), and the page."""
    main([*map(str, paths), "--output", str(output)])
    table = output / "accuracy.csv"
    rows = list(csv.DictReader(io.StringIO(table.read_text()))) if table.exists() else []
    return rows, (output / "report.html").read_text()


# -- arithmetic --------------------------------------------------------------------------------------------------------


def test_interval_by_hand() -> None:
    # the mean of 2 draws of {0, 1} is 0, 1/2, 1 with probability 1/4, 1/2, 1/4
    assert bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], level=0.4) == (0.5, 0.5)
    # how often the one -1 among 5 is drawn is Binomial(5, 1/5): P(<= 2) = 0.942, P(<= 3) = 0.993, P(0) = 0.328
    low, high = bootstrap_interval([0, 0, -1, 0, 0])
    assert (low, high) == (pytest.approx(-0.6), 0.0)
    assert bootstrap_interval([0.25] * 7) == (0.25, 0.25)


def test_interval_against_resampled_indices() -> None:
    generator = np.random.default_rng(1)
    values = generator.normal(size=40)
    means = values[generator.integers(0, 40, (20000, 40))].mean(1)
    assert bootstrap_interval(values) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.02)


def test_front() -> None:
    assert pareto_front([1, 2, 3, 3, 1], [5, 4, 6, 7, 5]) == [True, False, False, True, True]


def test_labels_tell_settings_apart() -> None:
    other = {**FASTV, "k": 3}
    assert labels_of([[], [FASTV], [{**FASTV, "retention_ratio": 0.1}]]) == ["dense", "fastv@0.25", "fastv@0.1"]
    assert labels_of([[FASTV], [other], [FASTV]]) == ["fastv@0.25(k=2)", "fastv@0.25(k=3)", "fastv@0.25(k=2) #2"]
    assert labels_of([[{"method": "dycoke", "k": 0.5}, {"method": "fastv", "k": 3}]]) == ["dycoke+fastv"]


def test_mcnemar_is_the_exact_binomial_of_what_differs():
    pairs = [(1.0, 1.0)] * 50 + [(1.0, 0.0)] * 7 + [(0.0, 1.0)] * 2
    few = sum(math.comb(9, k) for k in range(3)) / 2**9
    assert mcnemar(pairs) == McNemar(7, 2, pytest.approx(2 * few, rel=1e-12))
    assert mcnemar([(b, a) for a, b in pairs]).p_value == mcnemar(pairs).p_value
    assert mcnemar([(1.0, 0.0)] * 5).p_value == pytest.approx(2 / 2**5)
    assert mcnemar([(1.0, 0.0), (0.0, 1.0), (1.0, 0.0)]).p_value == 1.0  # never above
    assert mcnemar([(1.0, 1.0), (0.0, 0.0)]) == McNemar(0, 0, 1.0)
    assert mcnemar([]) == "no documents in common"
    for partial in (0.3, None):
        assert mcnemar([(1.0, 1.0), (partial, 1.0)]) == "scores per document are not just right and wrong"


def test_mcnemar_of_many_documents_neither_overflows_nor_ends():
    many = mcnemar([(1.0, 0.0)] * 51_000 + [(0.0, 1.0)] * 49_000)
    normal = math.erfc((51_000 - 49_000 - 1) / math.sqrt(100_000) / math.sqrt(2))
    assert many.p_value == pytest.approx(normal, rel=0.02)
    assert [p_text(p) for p in (many.p_value, 0.0312, 1.0, None)] == ["3e-10", "0.031", "1.000", ""]


# -- tables ------------------------------------------------------------------------------------------------------------


def test_numbers_relative_to_dense(runs, tmp_path) -> None:
    (dense, fastv), page = report(runs, output=tmp_path / "out")
    assert (dense["setting"], fastv["setting"]) == ("dense", "fastv@0.25")
    assert dense["change"] == dense["speedup"] == ""
    assert float(fastv["change"]) == pytest.approx(-0.2)
    assert (float(fastv["interval_low"]), float(fastv["interval_high"])) == (pytest.approx(-0.6), 0.0)
    assert float(fastv["same_answers"]) == pytest.approx(0.8)
    assert float(fastv["speedup"]) == pytest.approx((0 + 10) / (1 + 4))
    assert float(fastv["llm_flops_share"]) == float(fastv["visual_tokens_share"]) == 0.25
    assert float(fastv["decode_ms_per_token"]) == pytest.approx(6.0 / 2)
    assert dense["pareto_work_ms"] == fastv["pareto_work_ms"] == "True"
    text = (tmp_path / "out" / "report.md").read_text()
    row = ["fastv@0.25", "60.0", "-20.0", "-60.0 to +0.0", "1.000 (1 : 0)", "80%"]
    row += ["25 (25%)", "0.5 (25.0%)", "5.0", "1.0", "4.0"]
    assert "| " + " | ".join([*row, "2.00x", "3.00"]) + " |" in text
    assert cells(page)["fastv@0.25"][1:] == [*row[1:], "2.00x", "3.00"]


def log_first_tokens(run: Path, likeliest: list[float | None]) -> None:
    """Give a made-up run distributions of two tokens, of which the first one has these probabilities (None: none)."""
    samples = next(run.rglob("*.jsonl"))
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    for line, p in zip(lines, likeliest, strict=True):
        packed = {} if p is None else {"first_token": pack([7, 9], np.log([p, 1 - p]), -np.inf)}
        line["token_counts"] = [{"generated_tokens": 2, **packed}]
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_loyalty_to_the_dense_run(runs, tmp_path) -> None:
    log_first_tokens(runs / "dense", [0.9] * 5)
    log_first_tokens(runs / "fastv", [0.9, 0.3, 0.9, 0.9, None])
    kl = 0.9 * np.log(0.9 / 0.3) + 0.1 * np.log(0.1 / 0.7)
    (dense, fastv), page = report(runs, output=tmp_path / "out")
    assert dense["first_token_kl_mean"] == dense["same_answers"] == ""
    assert float(fastv["first_token_kl_mean"]) == pytest.approx(kl / 4, abs=1e-6)
    assert float(fastv["first_token_kl_median"]) == float(fastv["first_token_unresolved"]) == 0.0
    assert (float(fastv["first_token_top1_same"]), fastv["n_first_token"]) == (0.75, "4")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| same answers | first-token KL | top-1 same |" in text
    assert f"| 80% | {kl / 4:.3f} | 75% |" in text
    assert cells(page)["fastv@0.25"][5:8] == ["80%", f"{kl / 4:.3f}", "75%"]
    assert "fastv@0.25: the first token&#x27;s distribution is known of 4 of 5 documents." in page


def test_runs_without_distributions_have_no_columns_for_them(runs, tmp_path) -> None:
    log_first_tokens(runs / "dense", [0.9] * 5)
    rows, page = report(runs, output=tmp_path / "out")
    assert not any("first_token" in name or "n_first" in name for name in rows[0])
    assert "first-token KL" not in page and rows[1]["same_answers"] == "0.8"


def test_a_damaged_distribution_is_an_error(runs, tmp_path, capsys) -> None:
    for run in (runs / "dense", runs / "fastv"):
        log_first_tokens(run, [0.9] * 5)
    samples = next((runs / "fastv").rglob("*.jsonl"))
    text = samples.read_text()
    samples.write_text(re.sub(r'"first_token": "\w{8}', '"first_token": "', text, count=1))
    message = fails(capsys, runs, "--output", tmp_path / "out")
    assert "samples of quiz: not a packed distribution" in message and "fastv" in message


def test_answers_of_likelihood_tasks_are_their_choices(runs) -> None:
    for run, losses in (("dense", (1.5, 0.5)), ("fastv", (9.5, 2.5))):
        samples = next((runs / run).rglob("*.jsonl"))
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        lines[0] |= {"filtered_resps": [[str(loss), "False"] for loss in losses], "token_counts": [None, None]}
        lines[1]["filtered_resps"] = [["nan", "False"], ["1.0", "False"]]
        samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (section,) = accuracy_sections(find([runs]).runs)
    for entry in section.tables[0].entries:
        assert (entry.samples[0].answer, entry.samples[0].first_token) == ("choice 1", None)
        assert entry.samples[1].answer == '[["nan", "False"], ["1.0", "False"]]'


def test_efficiency_alone_and_joined(runs, tmp_path) -> None:
    bench = write_bench(tmp_path / "bench.json")
    _, page = report(bench, output=tmp_path / "alone")
    assert not (tmp_path / "alone" / "accuracy.csv").exists()
    rows = {r["setting"]: r for r in csv.DictReader(io.StringIO((tmp_path / "alone" / "efficiency.csv").read_text()))}
    assert float(rows["fastvid@0.1"]["speedup"]) == pytest.approx(100 / 20)
    assert float(rows["fastvid@0.1"]["overhead"]) == pytest.approx(5 / 100)
    assert float(rows["fastvid@0.1"]["first_token_speedup"]) == pytest.approx(160 / 75)
    assert (rows["prunevid"]["status"], rows["prunevid"]["speedup"]) == ("out of memory", "")
    assert cells(page)["prunevid"][1] == "out of memory"
    assert "51.0(50.0-52.0)" in cells(page)["dense"]
    assert "51.0 (50.0-52.0)" in (tmp_path / "alone" / "report.md").read_text()
    (dense, fastv), _ = report(runs, bench, output=tmp_path / "joined")
    assert (float(dense["bench_work_ms"]), float(fastv["bench_speedup"])) == (100.0, 2.5)
    other = write_bench(tmp_path / "other.json", input={"kind": "video", "frames": 8, "source": "made up"})
    (dense, fastv), _ = report(runs, other, output=tmp_path / "other_frames")
    assert dense["bench_work_ms"] == fastv["bench_speedup"] == ""


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"settings": {"max_frames_num": 16}}, "max_frames_num: 32 / 16"),
        ({"settings": {"conv_template": "vicuna_v1"}}, "conv_template: qwen_1_5 / vicuna_v1"),
        ({"versions": {"torch": "2.14.0"}}, "version of torch: 2.15.0 / 2.14.0"),
        ({"limit": 3}, "limit: null / 3"),
    ],
)
def test_different_runs_are_kept_apart(runs, tmp_path, changes, differs) -> None:
    write_run(tmp_path / "other", [FASTV], [1.0, 1.0, 0.0], **changes)
    rows, page = report(runs, tmp_path / "other", output=tmp_path / "out")
    assert [r["section"] for r in rows] == ["Accuracy 1", "Accuracy 1", "Accuracy 2"]
    assert rows[2]["change"] == ""
    assert f"They differ in {differs}." in page
    assert "No dense run with these settings" in page


def test_a_value_left_to_the_model_is_no_difference(runs, tmp_path) -> None:
    write_run(tmp_path / "other", [FASTV], [1.0] * 5, settings={"conv_template": None})
    rows, page = report(runs, tmp_path / "other", output=tmp_path / "out")
    assert {r["section"] for r in rows} == {"Accuracy"}
    assert "Some runs leave conv_template to the model, the others say qwen_1_5" in page


def test_other_questions_are_not_compared(runs, tmp_path) -> None:
    samples = next((runs / "fastv").rglob("*.jsonl"))
    samples.write_text(samples.read_text().replace("question <1>", "another question"))
    (_, fastv), page = report(runs, output=tmp_path / "out")
    assert fastv["change"] == "" and "asked other questions than dense" in page


def test_a_score_that_is_no_mean_has_no_interval(tmp_path) -> None:
    write_run(tmp_path / "runs" / "a", [], ["wrong", "kind"])
    write_run(tmp_path / "runs" / "b", [FASTV], ["wrong", "kind"])
    (_, fastv), page = report(tmp_path / "runs", output=tmp_path / "out")
    assert (float(fastv["change"]), fastv["interval_low"]) == (0.0, "")
    assert "is not the mean of a number per document" in page


def test_times_of_a_busy_machine_are_doubted(runs, tmp_path) -> None:
    assert "Times are not comparable" not in report(runs, output=tmp_path / "out")[1]
    summary = json.loads((runs / "fastv" / "summary.json").read_text())
    summary["costs"]["by_task"]["quiz"]["vision_ms"] = 9.0
    (runs / "fastv" / "summary.json").write_text(json.dumps(summary))
    page = report(runs, output=tmp_path / "busy")[1]
    assert "took 5.0 ms with dense and 9.0 ms with fastv@0.25" in page


def test_answers_in_the_page(runs, tmp_path) -> None:
    _, page = report(runs, output=tmp_path / "out")
    task = data_of(page)["tasks"]["a0t0"]
    assert (task["labels"], task["dense"], task["total"]) == (["dense", "fastv@0.25"], 0, 5)
    assert task["samples"][1] == {"d": 1, "q": "question <1>?", "t": "yes", "a": [["yes", 1.0], ["no", 0.0]]}
    main([str(runs), "--output", str(tmp_path / "short"), "--samples", "2"])
    short = data_of((tmp_path / "short" / "report.html").read_text())["tasks"]["a0t0"]
    assert [s["d"] for s in short["samples"]] == [1, 0] and short["total"] == 5  # those that differ come first


def test_overlays_from_provenance(runs, tmp_path) -> None:
    import base64

    for name in ("dense", "fastv"):
        write_provenance(runs / name)
    data = data_of(report(runs, output=tmp_path / "out")[1])
    assert len(data["pictures"]) == 1  # the same film strip in both runs
    dense, fastv = data["tasks"]["a0t0"]["documents"]["1"]
    assert (dense["setting"], fastv["setting"]) == ("dense", "fastv@0.25")
    assert (fastv["alive"], fastv["steps"]) == ([6, 6, 4], [0, 2])
    assert list(base64.b64decode(fastv["left"])) == [3, 3, 3, 0, 2, 2, 3, 3]
    assert list(base64.b64decode(fastv["kept"])) == [1, 1, 0, 0, 1, 1, 1, 1]


def test_provenance_of_a_failed_attempt_is_ignored(runs, tmp_path) -> None:
    write_provenance(runs / "fastv", started="2025-12-31T00:00:00")
    assert data_of(report(runs, output=tmp_path / "out")[1])["tasks"]["a0t0"]["documents"] == {}


# -- errors ------------------------------------------------------------------------------------------------------------


def fails(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_wrong_folders_are_refused(runs, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    assert "does not exist" in fails(capsys, tmp_path / "nowhere", "--output", out)
    assert "holds no results" in fails(capsys, runs, tmp_path / "empty", "--output", out)
    summary = json.loads((runs / "dense" / "summary.json").read_text())
    (runs / "dense" / "summary.json").write_text(json.dumps(summary | {"tasks": {"quiz": {}}}))
    assert "answers and no scores (--predict_only)" in fails(capsys, runs / "dense", "--output", out)
    (runs / "dense" / "summary.json").unlink()
    assert "not finished" in fails(capsys, runs / "dense", "--output", out)
    (runs / "fastv" / "summary.json").write_text("{")
    assert "cannot read" in fails(capsys, runs / "fastv", "--output", out)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "summary.json").write_text('{"kind": "efficiency of another tool"}')
    assert "holds no results" in fails(capsys, tmp_path / "foreign", "--output", out)
    assert "is not the summary" in fails(capsys, tmp_path / "foreign" / "summary.json", "--output", out)
    assert "schema 2" in fails(capsys, write_bench(tmp_path / "new.json", schema=2), "--output", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tasks": []}, "'tasks' is not a mapping"),
        ({"tasks": {"quiz": 3}}, "'tasks' is not a mapping"),
        ({"tasks": {"quiz": {"score": "high"}}}, "metric score of quiz is no number"),
        ({"costs": 3}, "'costs' is not a mapping"),
        ({"costs": {"by_task": {"quiz": 1}}}, "'costs' is not a mapping"),
        ({"settings": [1]}, "'settings' is not a mapping"),
        ({"methods": ["fastv"]}, "'methods' is not a list of methods"),
    ],
)
def test_summaries_of_another_form(runs, tmp_path, capsys, changes, reason) -> None:
    file = runs / "fastv" / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert f"error: cannot read {file}: {reason}" in fails(capsys, runs, "--output", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("summary.json", b"[1]", "is not the summary"),
        ("summary.json", b"\xff{}", "can't decode byte"),
        ("summary.json", b"\x00", "line 1 column 1"),
        ("samples", b"[1]\n", "line 1: it is no answer with a doc_id"),
        ("samples", b'{"doc_id": [1]}\n', "line 1: it is no answer with a doc_id"),
        ("samples", b"caf\xe9\n", "line 1: 'utf-8' codec can't decode"),
        ("bench.json", b'{"kind": "efficiency", "schema": 1, "machine": {}, "versions": {}, "model": {}, "input": {},'
                       b' "rows": [3]}', "'rows' is not a list of mappings"),
        ("bench.json", b'{"kind": "efficiency", "schema": 1, "machine": {}, "versions": {}, "model": {}, "input": {},'
                       b' "rows": [{"label": "x"}]}', "a row without 'status'"),
        ("provenance", b"no array", "quiz"),
    ],
)  # fmt: skip
def test_damaged_files_are_one_line_with_their_name(runs, tmp_path, capsys, name, content, reason) -> None:
    file = runs / "fastv" / name
    if name == "samples":
        file = next((runs / "fastv").rglob("*.jsonl"))
    if name == "provenance":
        file = runs / "fastv" / "provenance" / "quiz" / "0.npz"
        file.parent.mkdir(parents=True)
    file.write_bytes(content)
    said = fails(capsys, file if name == "summary.json" else runs, "--output", tmp_path / "out")
    assert said.startswith("error: ") and said.count("\n") == 1 and str(file) in said and reason in said


def test_an_output_that_cannot_be_written(runs, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert "file is no folder" in fails(capsys, runs, "--output", tmp_path / "file" / "out")


def test_names_in_plots_are_shown_as_they_are_and_marked(runs) -> None:
    """Plotly reads tags; and a point that the tables mark as not comparable is marked."""
    found = find([runs])
    (section,) = accuracy_sections(found.runs)
    (table,) = section.tables
    fastv = next(e for e in table.entries if e.method != "dense")
    fastv.label = "<b>fastv</b> & $x$"
    style = Style(e.method for e in table.entries)
    assert all(MARK not in str(f.to_dict()) for f in pareto(table, style).values())
    fastv.not_comparable = "why"
    for figure in pareto(table, style).values():
        point = next(t for t in figure.data if t.name == "fastv")
        assert point.text == (MARK,) and point.marker.symbol[0].endswith("-open")
        assert point.hovertext[0].startswith("&lt;b&gt;fastv&lt;/b&gt; &amp; $x$") and MARK in point.hovertext[0]


def test_unfinished_runs_are_named(runs, tmp_path) -> None:
    (runs / "late").mkdir()
    (runs / "late" / "run.json").write_text(json.dumps({"started": "now"}))
    rows, page = report(runs, output=tmp_path / "out")
    assert len(rows) == 2 and "late: not finished" in page


def test_a_report_is_never_overwritten(runs, tmp_path, capsys) -> None:
    report(runs, output=tmp_path / "out")
    before = (tmp_path / "out" / "report.html").read_bytes()
    assert "exists; choose another --output" in fails(capsys, runs, "--output", tmp_path / "out")
    assert (tmp_path / "out" / "report.html").read_bytes() == before


def test_reading_needs_neither_harness_nor_plotly() -> None:
    code = (
        "import sys; sys.modules['lmms_eval'] = sys.modules['plotly'] = sys.modules['matplotlib'] = None\n"
        "from lmms_eval_accelerate.report import __main__, page, tables"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- provenance written by a run ---------------------------------------------------------------------------------------


@pytest.fixture()
def run_folder(tmp_path) -> Iterator[Path]:
    """As if lmms-eval-accelerate had claimed it for this process."""
    pytest.importorskip("lmms_eval_accelerate")
    from lmms_eval_accelerate.runs.folder import RunFolder
    from lmms_eval_accelerate.session import session

    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"started": "2026-01-01T00:00:00"}))
    with session() as shared:
        shared.begin(RunFolder(folder, rank=0), journal=None)
        yield folder


@pytest.mark.parametrize("method", ["fastvid", "random_prefill", "dense"])
def test_a_run_saves_what_its_method_kept(run_folder, tmp_path, monkeypatch, method) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    pytest.importorskip("lmms_eval")
    pytest.importorskip("lmms_eval_accelerate")
    from tests.support.lmms_tasks import document, evaluate, lines, write_image, write_tasks, write_video
    from tests.support.paths import CHECKPOINTS

    clips = [write_video(tmp_path / f"{n}.mp4", seed=n) for n in range(3)]
    photo = write_image(tmp_path / "p.png", (90, 90))
    tasks = write_tasks(
        tmp_path / "tasks",
        video=[document(n, video=clip) for n, clip in enumerate(clips)],
        image=[document(0, (photo,))],
    )
    budget = {
        "fastvid": ",method=fastvid,retention_ratio=0.25",
        "random_prefill": ",method=random_prefill",
        "dense": "",
    }
    args = f"pretrained={CHECKPOINTS / 'tiny-llava-onevision'},max_frames_num=4,save_provenance=2{budget[method]}"
    results = evaluate("llava_onevision_accelerated", ["video", "image"], tasks, model_args=args, batch_size=2)
    saved = sorted(str(p.relative_to(run_folder)) for p in run_folder.rglob("provenance/*/*"))
    videos = [f"provenance/video/{name}" for name in ("0.npz", "0_0.jpg", "1.npz", "1_0.jpg")]
    assert saved == ["provenance/image/0.npz", "provenance/image/0_0.jpg", *videos]
    for number, line in enumerate(lines(results, "video")[:2]):
        with np.load(run_folder / f"provenance/video/{number}.npz") as file:
            owner, kept, left, meta = file["owner_0"], file["kept_0"], file["left_at_0"], json.loads(str(file["meta"]))
        facts = meta["items"][0]
        assert owner.shape == kept.shape == left.shape == (4, 196) and facts["grid"] == [14, 14]
        assert (meta["doc_id"], meta["started"]) == (number, "2026-01-01T00:00:00")
        assert (facts["tokens_before"], kept.sum()) == (784, line["visual_tokens_after"])
        # tokens per layer, out of the provenance alone
        layers = facts["num_layers"]
        alive = [(kept & (left > layer)).sum() for layer in range(layers)]
        assert sum(alive) / layers == pytest.approx(line["visual_tokens_per_layer"])
        assert ((owner < 0) == (left == 0)).all()
    assert Image.open(run_folder / "provenance/video/0_0.jpg").size == (4 * 168, 168)


def test_provenance_needs_a_run_folder(tmp_path, monkeypatch) -> None:
    pytest.importorskip("lmms_eval")
    pytest.importorskip("lmms_eval_accelerate")
    from lmms_eval_accelerate.models import model_class
    from lmms_eval_accelerate.models.provenance import run_folder

    from accelerate_methods.stages.errors import MethodError

    for arguments in ([], ["--output_path", str(tmp_path)]):
        monkeypatch.setattr(sys, "argv", ["lmms-eval", *arguments])
        with pytest.raises(MethodError, match="lmms-eval-accelerate"):
            run_folder()
    with pytest.raises(MethodError, match="save_provenance"):
        model_class("llava_onevision_accelerated").parse(pretrained="x", save_provenance="some")


# -- the page in a browser ---------------------------------------------------------------------------------------------

_DRIVER = """<script>
const out = {};
const press = (node, kind) => node.dispatchEvent(new Event(kind, {bubbles: true}));
const table = document.querySelector("table.sortable");
const first = () => [...table.tBodies[0].rows].map(r => r.cells[0].innerText.trim());
const head = [...table.querySelectorAll("th")];
head.find(h => h.innerText.includes("accuracy")).click();
out.sorted = first();
head.find(h => h.innerText.includes("accuracy")).click();
out.reversed = first();
const answers = document.querySelector(".answers"), [kind, which] = answers.querySelectorAll("select");
const documents = () => [...answers.querySelectorAll("tbody tr")].map(r => parseInt(r.cells[0].innerText));
out.all = documents();
kind.value = "right or wrong differs from dense"; press(kind, "input");
out.differs = documents();
kind.value = "all"; const search = answers.querySelector("input"); search.value = "<3>"; press(search, "input");
out.found = documents();
const slider = document.querySelector(".overlays input[type=range]");
const says = () => document.querySelector(".overlays .strip p").innerText;
out.last = says(); slider.value = 0; press(slider, "input"); out.start = says();
out.plots = [...document.querySelectorAll(".plot")].map(p => p.querySelectorAll("svg .point").length);
setTimeout(() => {
  const canvas = document.querySelector(".overlays canvas"), pen = canvas.getContext("2d");
  const at = (x, y) => [...pen.getImageData(x, y, 1, 1).data].slice(0, 3).reduce((a, b) => a + b);
  const w = canvas.width / (2 + 3 / 76), c = w / 2;
  out.light = [at(c / 2, c / 2), at(c / 2, 1.5 * c), at(1.5 * c, 1.5 * c)];  // kept, merged, dropped
  const shown = document.createElement("pre");
  shown.id = "outcome"; shown.textContent = JSON.stringify({...out, errors: window.problems});
  document.body.append(shown);
}, 1500);
</script>"""
_WATCH = """<script>window.problems = [];
window.addEventListener("error", e => window.problems.push(String(e.message)));
window.addEventListener("unhandledrejection", e => window.problems.push(String(e.reason)));</script>"""


def browser() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(browser() is None, reason="no chromium or chrome in PATH")
def test_the_page_works_in_a_browser(runs, tmp_path) -> None:
    write_provenance(runs / "fastv")
    _, page = report(runs, write_bench(tmp_path / "bench.json"), output=tmp_path / "out")
    assert not re.search(r"""<(?:script|link|img)[^>]+(?:src|href)=["']https?:""", page)
    driven = tmp_path / "driven.html"
    driven.write_text(page.replace("<head>", "<head>" + _WATCH, 1).replace("</body>", _DRIVER + "</body>"))
    command = [browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", driven.as_uri()]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(tmp_path)}
    )
    found = re.search(r'<pre id="outcome">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    out = json.loads(html.unescape(found[1]))
    assert out["errors"] == []
    assert 'data-ready="yes"' in done.stdout
    assert [name.split()[-1] for name in out["sorted"]] == ["fastv@0.25", "dense"]
    assert out["reversed"] == out["sorted"][::-1]
    assert (out["all"], out["differs"], out["found"]) == ([0, 1, 2, 3, 4], [1], [3])
    assert "4 of 8 tokens before layer 2" in out["last"] and "6 of 8 tokens before layer 0" in out["start"]
    assert len(out["plots"]) == 3 + 4 and all(out["plots"])
    kept, merged, dropped = out["light"]
    assert kept > merged > dropped


# -- reading the page --------------------------------------------------------------------------------------------------


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


class _Cells(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._inside = False

    def handle_starttag(self, tag, attributes) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self._inside = True
            self.rows[-1].append("")

    def handle_endtag(self, tag) -> None:
        self._inside &= tag != "td"

    def handle_data(self, text) -> None:
        if self._inside:
            self.rows[-1][-1] += text


def cells(page: str) -> dict[str, list[str]]:
    """Rows of all tables by the setting in their first cell (behind its mark)."""
    parser = _Cells()
    parser.feed(page[: page.index('<script type="application/json"')])
    return {row[0].split()[-1]: row for row in parser.rows if row and row[0].split()}


def test_sections_keep_their_order(runs) -> None:
    (section,) = accuracy_sections(find([runs]).runs)
    assert [e.label for e in section.tables[0].entries] == ["dense", "fastv@0.25"]
