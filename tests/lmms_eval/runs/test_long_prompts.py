"""Prompts longer than the context in runs: counted and told in summaries, marked in every table, refused on demand."""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lmms_eval")
pytest.importorskip("plotly")

from lmms_eval_accelerate.compare import cli as compare_cli
from lmms_eval_accelerate.compare import table as comparison
from lmms_eval_accelerate.models.costs import summarise
from lmms_eval_accelerate.report.__main__ import main as report_main
from lmms_eval_accelerate.reproduce import leaderboard, outcome, render
from lmms_eval_accelerate.reproduce.choice import Choices, select
from lmms_eval_accelerate.reproduce.plan import plan
from lmms_eval_accelerate.reproduce.tables import load
from lmms_eval_accelerate.runs import summary
from lmms_eval_accelerate.runs.answer_checks import check
from lmms_eval_accelerate.runs.folder import RunFolder
from lmms_eval_accelerate.runs.launch import Machines
from lmms_eval_accelerate.runs.long_prompts import MARK, LongPrompts, not_comparable
from lmms_eval_accelerate.session import session
from rich.console import Console

from accelerate_methods.engine.long_prompts import LongPromptError
from accelerate_methods.stages.errors import UnknownNameError
from tests.lmms_eval.report.test_report import FASTV, write_bench, write_run
from tests.support import reproduce_runs
from tests.support.lmms_tasks import document, evaluate, lines, write_tasks, write_video
from tests.support.paths import ROOT

CONFIG = {"generation_kwargs": {"max_new_tokens": 16}}
WHOLE = {"prompt_tokens_cut": 0, "prompt_tokens_untrained": 0, "prompt_tokens_over_dense": 0}


def sample(number: int, answer: str, **costs) -> dict:
    counts = {"generated_tokens": 2, "prompt_tokens": 10, "warmup": False, **WHOLE, **costs}
    return {"doc_id": number, "filtered_resps": answer, "target": "ABCD"[number % 4], "token_counts": [counts]}


# -- counted and told --------------------------------------------------------------------------------------------------


def test_a_cut_prompt_is_told_and_the_template_is_not_blamed():
    good = [sample(n, "ABCD"[n % 4]) for n in range(50)]
    broken = [sample(n, "ftftftftft", prompt_tokens_cut=300 + n) for n in range(50, 60)]
    (warning,) = check("quiz", [*good, *broken], CONFIG)
    assert warning.startswith("quiz: 10 of 60 prompts were longer than the model's context and lost their end")
    assert "by up to 359 tokens; first: document 50" in warning and "10 are empty or one thing repeated" in warning
    assert "conv_template" not in warning and "on_long_prompt=error" in warning
    told = check("quiz", [*good, *broken, *(sample(n, "") for n in range(60, 70))], CONFIG)
    assert len(told) == 2 and "answers are empty" in told[1] and "conv_template" in told[1], "whole prompts are checked"
    (warning,) = check("quiz", [*good, sample(50, "A", prompt_tokens_untrained=7)], CONFIG)
    assert "1 of 51 prompts ran beyond the positions of the model's training" in warning


def test_prompts_that_fit_only_when_compressed_are_told():
    samples = [sample(n, "ABCD"[n % 4], prompt_tokens_over_dense=5 * (n < 3)) for n in range(8)]
    (warning,) = check("quiz", samples, CONFIG)
    assert "3 of 8 (38 %) prompts fit into the model's context only because visual tokens were dropped" in warning
    assert check("quiz", [sample(n, "ABCD"[n % 4]) for n in range(8)], CONFIG) == []


def test_the_summary_counts_each_prompt_once():
    means = dict.fromkeys(
        ("visual_tokens_before", "visual_tokens_after", "visual_tokens_per_layer", "prompt_tokens_dense"), 1.0
    )
    means |= dict.fromkeys(("prompt_tokens", "vision_ms", "compress_ms", "prefill_ms", "decode_ms", "generate_ms"), 1.0)
    means |= dict.fromkeys(("llm_tflops_dense", "llm_tflops", "generated_tokens"), 1.0)
    costs = [
        {**means, "warmup": True, "prompt_tokens_cut": 3, "prompt_tokens_untrained": 2, "prompt_tokens_over_dense": 3},
        {**means, "prompt_tokens_untrained": 2, "prompt_tokens_over_dense": 3},
        {**means, "prompt_tokens_over_dense": 3},
        means,
        {"skipped": True},
    ]
    made = summarise(costs)
    assert [made[key] for key in ("prompts_cut", "prompts_untrained", "prompts_over_dense")] == [1, 1, 3]
    assert LongPrompts.of(made) == LongPrompts(answers=5, cut=1, untrained=1, over_dense=3)
    assert LongPrompts.of({}) == LongPrompts.of_all([]) == LongPrompts()
    assert LongPrompts.of_all([made, made]).count == "4 of 10"


def test_what_makes_a_row_not_comparable():
    cut, fits, over = LongPrompts(9, cut=2, over_dense=2), LongPrompts(9), LongPrompts(9, over_dense=2)
    assert not_comparable(fits, fits) is None is not_comparable(fits, None)
    assert "of the dense run 2 of 9 prompts" in not_comparable(fits, cut)
    assert "2 of 9 uncompressed prompts" in not_comparable(over, None)


# -- tables ------------------------------------------------------------------------------------------------------------

LONG = {"prompts_cut": 12, "prompts_untrained": 0, "prompts_over_dense": 12}
FITS = {"prompts_cut": 0, "prompts_untrained": 0, "prompts_over_dense": 12}


def compared(folder: Path, dense: dict, method: dict) -> list:
    folders = {}
    for name, share, counts in (("dense", 1.0, dense), ("fastvid@0.25", 0.25, method)):
        costs = {"samples": 50, "visual_tokens_before": 784.0, "visual_tokens_per_layer": 784 * share}
        costs |= {"llm_tflops_dense": 2.0, "llm_tflops": 2 * share, "vision_ms": 30.0, "compress_ms": 0.0}
        costs |= {"prefill_ms": 40 * share, **counts}
        folders[name] = folder / name
        folders[name].mkdir(parents=True)
        content = {"tasks": {"clips": {"exact_match": 0.9 * share}}, "costs": {"by_task": {"clips": costs}}}
        (folders[name] / "summary.json").write_text(json.dumps(content), encoding="utf-8")
    return comparison.read(folders)


def printed(found: list) -> str:
    out = io.StringIO()
    Console(file=out, width=120).print(comparison.tables(found))
    return out.getvalue()


def test_compare_marks_rows_whose_dense_run_lost_questions(tmp_path):
    found = compared(tmp_path / "long", LONG, FITS)
    comparison.write(found, tmp_path)
    dense, method = json.loads((tmp_path / "comparison.json").read_text())
    assert dense["prompts_cut"] == 12 and dense["not_comparable"] is None and method["prompts_cut"] == 0
    assert "of the dense run 12 of 50 prompts" in method["not_comparable"]
    for text in (printed(found), (tmp_path / "comparison.md").read_text()):
        assert "12 of 50" in text and f"4.00x {MARK}" in text and f"25.0% {MARK}" in text and f"-67.5 {MARK}" in text
        assert "arning" in text and "the question with it" in " ".join(text.split()) and "too long: prompts" in text
    without = compared(tmp_path / "fits", {}, {})
    assert MARK not in printed(without) and "too long" not in printed(without)
    (alone,) = [r for r in compared(tmp_path / "alone", LONG, FITS) if r.setting != "dense"]
    assert f"25.0% {MARK}" in printed([alone]), "its work is in doubt without a dense run, too"


@pytest.fixture
def reproduced(tmp_path):
    table = load(str(reproduce_runs.write_table(tmp_path / "t", {"Video": "{benchmark: shapes_video}"})))
    choices = Choices(table=table.name)
    selections = select(table, choices)
    units = plan(selections, choices, Machines(), tmp_path / "out")
    for unit in units:
        own = reproduce_runs.documents([float(n % 3 > 0) for n in range(9)])
        path = reproduce_runs.write_run(unit, {"shapes_video": own}, {"shapes_video": {"exact_match": 2 / 3}})
        content = json.loads(path.read_text())
        content["costs"]["by_task"]["shapes_video"] |= LONG if unit.dense else FITS
        path.write_text(json.dumps(content))
    return outcome.evaluate(table, selections, choices, {"created": "2026-01-01T00:00:00", "command": "x", "code": "y"})


def test_reproduce_marks_rows_whose_dense_run_lost_questions(reproduced, tmp_path):
    rows = {row["name"]: row["cells"]["Video"] for row in reproduced["parts"][0]["rows"]}
    assert rows["dense"]["long_prompts"]["cut"] == 12 and rows["dense"]["not_comparable"] is None
    assert "of the dense run 12 of 9 prompts" in rows["FastV 50 %"]["not_comparable"]
    assert any("the dense row is no baseline" in warning for warning in reproduced["warnings"])
    text = render.markdown(reproduced)
    (line,) = [row for row in text.splitlines() if row.startswith("|   FastV")]
    cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
    assert sum(cell.endswith(MARK) for cell in cells) >= 5 and "12 of 9" in text
    assert f"100.0 {MARK}<br>" in text, "the mean over the columns"
    assert f"{MARK}: not comparable (FastV 50 %, Video" in text
    stored = tmp_path / "outcome.json"
    stored.write_text(json.dumps(reproduced))
    board = leaderboard.make([stored], tmp_path)
    assert f"+0.0 {MARK}" in board and "prompts too long: 12 of 9" in board and f"{MARK}: not comparable" in board


def test_the_report_marks_rows_whose_dense_run_lost_questions(tmp_path):
    for name, methods, counts in (("dense", [], LONG), ("fastv", [FASTV], FITS)):
        run = write_run(tmp_path / "runs" / name, methods, [1.0, 0.0] * 25, tokens=25.0 if methods else 100.0)
        content = json.loads((run / "summary.json").read_text())
        content["costs"]["by_task"]["quiz"] |= counts
        content["settings"]["on_long_prompt"] = "warn" if methods else "error"  # no other setting
        (run / "summary.json").write_text(json.dumps(content))
    report_main([str(tmp_path / "runs"), "--output", str(tmp_path / "report")])
    rows = list(csv.DictReader((tmp_path / "report" / "accuracy.csv").open()))
    assert [row["prompts_cut"] for row in rows] == ["12", "0"] and rows[0]["not_comparable"] == ""
    assert "of the dense run 12 of 50 prompts" in rows[1]["not_comparable"]
    for name in ("report.md", "report.html"):
        text = (tmp_path / "report" / name).read_text()
        assert "12 of 50 prompts were longer than the model" in text and f"{MARK}: not comparable (fastv@0.25)" in text
        assert f"100% {MARK}" in text and "too long" in text


def test_the_report_marks_a_bench_whose_dense_prompt_was_cut(tmp_path):
    path = write_bench(tmp_path / "bench.json")
    content = json.loads(path.read_text())
    for row in content["rows"]:
        row["prompt_tokens"] = {"dense": 4096, "lost": 0, "over_dense": 809}
    path.write_text(json.dumps(content))
    report_main([str(path), "--output", str(tmp_path / "report")])
    text = (tmp_path / "report" / "report.md").read_text()
    assert f"5.00x {MARK}" in text and "809 tokens longer than the model's context" in text


# -- real runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The embedded model with a context of 150 tokens: four frames do not fit."""
    source, folder = ROOT / "assets" / "tiny-llava-onevision", tmp_path_factory.mktemp("short") / "tiny-llava-onevision"
    folder.mkdir()
    for path in source.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tokenizer_model_max_length": 150}))
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    clip = write_video(folder / "0.mp4")
    write_tasks(folder, video=[document(0, video=clip), document(1)], choice_video=[document(0, video=clip)])
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def run(checkpoint, tasks, task: str, more: str = "", folder: Path | None = None):
    args = f"pretrained={checkpoint},max_frames_num=4,device=cpu{more}"
    with session() as shared:
        if folder is not None:
            (folder / "run.json").write_text(json.dumps({"started": "2026-01-01T00:00:00"}))
            shared.begin(RunFolder(folder, rank=0), journal=None)
        results = evaluate("llava_onevision_accelerated", [task], tasks, model_args=args)
        options = argparse.Namespace(model="llava_onevision_accelerated", model_args=args)
        return results, summary.build(results, results["samples"], options, shared)


def test_a_run_counts_and_tells_prompts_that_were_cut(checkpoint, tasks, capsys, tmp_path):
    results, report = run(checkpoint, tasks, "video", ",save_provenance=1", tmp_path)
    cut, whole = lines(results, "video")
    assert cut["prompt_tokens_cut"] == cut["prompt_tokens_over_dense"] > 0 and cut["prompt_limit"] == 150
    assert cut["prompt_tokens"] == cut["prompt_tokens_dense"] == 150 > cut["visual_tokens_after"]
    assert cut["llm_tflops"] == cut["llm_tflops_dense"]
    assert cut["visual_tokens_per_layer"] == cut["visual_tokens_after"] < cut["visual_tokens_before"]
    assert whole["prompt_tokens_cut"] == 0
    assert report["costs"]["overall"]["prompts_cut"] == report["costs"]["by_task"]["video"]["prompts_cut"] == 1
    (warning,) = [text for text in report["warnings"] if "lost their end" in text]
    assert "1 of 2 prompts" in warning and "first: document 0" in warning
    assert not any("conv_template" in text for text in report["warnings"])
    summary.show(report, Path("summary.json"))
    assert "prompts that lost their end" in capsys.readouterr().out
    with np.load(tmp_path / "provenance" / "video" / "0.npz") as saved:
        meta = json.loads(str(saved["meta"]))
        assert meta["prompt_tokens_cut"] == cut["prompt_tokens_cut"]
        assert saved["kept_0"].sum() == cut["visual_tokens_after"] == meta["items"][0]["tokens_after"]


def test_the_compressed_run_knows_that_dense_would_be_cut(checkpoint, tasks):
    _, report = run(checkpoint, tasks, "video", ",method=uniform,retention_ratio=0.1")
    costs = report["costs"]["by_task"]["video"]
    assert (costs["prompts_cut"], costs["prompts_over_dense"]) == (0, 1)
    assert any("the dense model cannot read their questions" in text for text in report["warnings"])


def test_a_run_can_end_at_the_first_prompt_that_is_too_long(checkpoint, tasks):
    with pytest.raises(LongPromptError, match=r"task video, split test, doc 0.*The prompt of sample 0"):
        run(checkpoint, tasks, "video", ",on_long_prompt=error")
    with pytest.raises(UnknownNameError, match="Did you mean 'error'"):
        run(checkpoint, tasks, "video", ",on_long_prompt=errors")


def test_a_continuation_that_is_lost_has_no_likelihood(checkpoint, tasks):
    results, report = run(checkpoint, tasks, "choice_video")
    (line,) = results["samples"]["choice_video"]
    assert {float(loss) for loss, _ in line["filtered_resps"]} == {float("inf")}
    assert report["costs"]["overall"]["prompts_cut"] == 2
    (warning,) = report["warnings"]
    assert "1 of 1 prompts" in warning and "counts as infinitely unlikely" in warning and "dtype" not in warning


def test_compare_takes_the_switch():
    args = compare_cli.parser().parse_args(["--on-long-prompt", "error"])
    assert compare_cli.wanted_of(args).model_args == {"on_long_prompt": "error"}
    assert compare_cli.wanted_of(compare_cli.parser().parse_args([])).model_args == {}
