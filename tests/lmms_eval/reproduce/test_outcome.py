"""What comes out of a reproduced table: arithmetic, intervals, guards, the printed tables and the leaderboard."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from lmms_eval_accelerate.benchmarks.catalog import benchmark
from lmms_eval_accelerate.reproduce import guards, leaderboard, means, outcome, render
from lmms_eval_accelerate.reproduce.breakdown import Breakdown, break_down, interval, paired_test, standard_error
from lmms_eval_accelerate.reproduce.choice import Choices, select
from lmms_eval_accelerate.reproduce.plan import plan
from lmms_eval_accelerate.reproduce.schema import Column
from lmms_eval_accelerate.reproduce.tables import load
from lmms_eval_accelerate.runs.launch import Machines
from rich.console import Console

from accelerate_methods.stages.errors import MethodError
from tests.support.paths import ROOT
from tests.support.reproduce_runs import documents, with_first_tokens, write_run, write_table

# -- scores taken apart, against the harness's own aggregation ---------------------------------------------------------


def stock(task: str):
    """``utils.py`` of a stock task, without importing the harness."""
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None:
        pytest.skip("lmms-eval is not installed")
    path = Path(spec.submodule_search_locations[0]) / "tasks" / task / "utils.py"
    spec = importlib.util.spec_from_file_location(f"stock_{task}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mme_lines(draw: random.Random, images: int = 9) -> dict:
    """Two questions per image in three categories of unequal size, one of them of the cognition part."""
    lines = {}
    for image in range(images):
        category = ("count", "OCR", "OCR", "code_reasoning")[image % 4]
        key = "mme_cognition_score" if category == "code_reasoning" else "mme_perception_score"
        for question in range(2):
            entry = {"question_id": f"{image}.png", "category": category, "score": float(draw.random() < 0.7)}
            lines["mme", 2 * image + question] = {key: entry}
    return lines


@pytest.mark.parametrize("seed", range(5))
def test_mme_is_what_the_harness_makes(seed):
    lines = mme_lines(random.Random(seed))
    aggregate = stock("mme").mme_aggregate_results
    scores = [
        aggregate([line[key] for line in lines.values() if key in line])
        for key in ("mme_perception_score", "mme_cognition_score")
    ]
    both = break_down(benchmark("mme"), "mme_perception_score+mme_cognition_score", 1, lines, sum(scores))
    perception = break_down(benchmark("mme"), "mme_perception_score", 1, lines, scores[0])
    assert both.score() == pytest.approx(sum(scores)) and perception.score() == pytest.approx(scores[0])
    assert (both.members, both.per, perception.members) == (9, "image", 7)


@pytest.mark.parametrize("seed", range(5))
def test_mlvu_is_what_the_harness_makes(seed):
    draw = random.Random(seed)
    types = ["anomaly_reco", "count", "ego", "needle", "order", "plotQA", "topic_reasoning"][: 7 - seed]
    entries = [
        {"question_id": str(n), "task_type": draw.choice(types), "pred_answer": draw.choice("AB"), "answer": "A"}
        for n in range(40)
    ]
    score = stock("mlvu").mlvu_aggregate_results_dev(entries)
    lines = {("mlvu_dev", n): {"mlvu_percetion_score": entry} for n, entry in enumerate(entries)}
    assert break_down(benchmark("mlvu_dev"), "mlvu_percetion_score", 1, lines, score).score() == pytest.approx(score)


@pytest.mark.parametrize("seed", range(5))
def test_pope_is_what_the_harness_makes(seed):
    draw = random.Random(seed)
    entries = [
        {"prediction": draw.choice(["yes", "no", "maybe"]), "ground_truth": draw.choice(["yes", "no"]), "score": 0.0}
        for _ in range(30)
    ]
    score = 100 * stock("pope").pope_aggregate_f1_score(entries)
    lines = {("pope", n): {"pope_f1_score": entry} for n, entry in enumerate(entries)}
    parts = break_down(benchmark("pope"), "pope_f1_score", 100, lines, score)
    assert parts.shape == "f1" and parts.score() == pytest.approx(score)


@pytest.mark.parametrize("seed", range(3))
def test_mmstar_is_what_the_harness_makes(seed):
    draw = random.Random(seed)
    kinds = ["geometry", "image emotion", "recognition"]
    scores = [draw.choice([0.0, 1.0]) for _ in range(20)]
    entries = [{"question_id": n, "l2_category": draw.choice(kinds), "score": s} for n, s in enumerate(scores)]
    score = 100 * stock("mmstar").mmstar_aggregate_results(entries)
    lines = {("mmstar", n): {"average": entry} for n, entry in enumerate(entries)}
    assert break_down(benchmark("mmstar"), "average", 100, lines, score).score() == pytest.approx(score)


def test_ocrbench_counts_out_of_a_thousand():
    entries = [{"prediction": "tea", "ground_truth": ["tea"], "score": n % 2} for n in range(7)]
    lines = {("ocrbench", n): {"ocrbench_accuracy": entry} for n, entry in enumerate(entries)}
    about = benchmark("ocrbench")
    parts = break_down(about, about.metric, about.scale, lines, 3.0)
    assert parts.shape == "mean" and parts.score() == pytest.approx(3.0) and parts.members == 7
    assert dataclasses.replace(column("ocrbench"), metric=about.metric).unit == "points"


CHOSEN = [{"pred_answer": "A", "answer": "A", "score": 1.0}, {"pred_answer": "B", "answer": "A", "score": 0.0}]
PARSED = [{"parsed_pred": "A", "answer": "A"}, {"parsed_pred": "B", "answer": "A"}]
STATIC = {("mmbench_en_dev_static", 0): {"gpt_eval_score": {"prediction": "A", "answer": "A"}}}
HALF = {("mme", 0): {"mme_perception_score": {"category": "OCR", "question_id": "a", "score": 1}}}


@pytest.mark.parametrize(
    ("name", "metric", "scale", "entries", "score"),
    [
        ("videomme", None, None, CHOSEN, 50),
        ("longvideobench_val_v", None, None, PARSED, 50),
        ("egoschema_subset", None, None, [{"pred": 3, "ground_truth": "3"}, {"pred": -1, "ground_truth": "0"}], 50),
        ("seedbench", None, None, [{"pred": " a", "answer": "A"}, {"pred": "B", "answer": "A"}], 50),
        ("gqa", None, None, [1.0, 0.0, 0.0, 1.0], 50),
        ("chartqa", None, None, [1.0, 0.0], 50),
        ("docvqa_val", None, None, [0.75, 0.0], 37.5),
        ("nextqa_mc_test", None, None, [True, False], 50),
        ("textvqa_val", None, None, [0.9, 0.3], 60),
        ("pope", "pope_accuracy", 100, [{"prediction": "yes", "score": 1.0}, {"prediction": "no", "score": 0.0}], 50),
    ],
)
def test_scores_that_are_means(name, metric, scale, entries, score):
    about = benchmark(name)
    metric, scale = metric or about.metric, scale or about.scale
    lines = {(about.task, n): {metric: entry} for n, entry in enumerate(entries)}
    parts = break_down(about, metric, scale, lines, score)
    assert parts.shape == "mean" and parts.score() == pytest.approx(score)
    # a score that these documents do not make has no parts, and so no interval
    assert "is not what the documents' values make" in break_down(about, metric, scale, lines, score + 3)


def test_a_group_is_the_mean_of_its_tasks():
    about = benchmark("mvbench")
    lines = {
        (task, n): {"mvbench_accuracy": {"pred_answer": "A", "gt_answer": "A", "score": int(number % 2 or n > 0)}}
        for number, task in enumerate(about.tasks)
        for n in range(2 if number % 2 else 4)
    }
    score = 100 * (10 * 1.0 + 10 * 0.75) / 20
    parts = break_down(about, about.metric, about.scale, lines, score)
    assert len(parts.strata) == 20 and parts.score() == pytest.approx(score)


@pytest.mark.parametrize(
    ("name", "lines", "reason"),
    [
        ("mmbench_en_dev_static", STATIC, "no number per"),
        ("activitynetqa", {("activitynetqa", 0): {"gpt_eval_accuracy": 1}}, "judge"),
        ("gqa", {}, "no samples"),
        ("mme", HALF, "both questions"),
    ],
)
def test_scores_that_cannot_be_taken_apart_say_why(name, lines, reason):
    about = benchmark(name)
    why = break_down(about, about.metric, about.scale, lines, 50.0)
    assert isinstance(why, str) and reason in why
    assert interval(why, why) == why and standard_error(why) is None


# -- intervals ---------------------------------------------------------------------------------------------------------


def test_interval_by_hand():
    # 5 documents, dense right in 4, the row in 3: how often the one -1 is drawn is Binomial(5, 1/5)
    dense = Breakdown("mean", 100.0, {"": dict(enumerate([1.0, 1.0, 1.0, 1.0, 0.0]))})
    row = Breakdown("mean", 100.0, {"": dict(enumerate([1.0, 0.0, 1.0, 1.0, 0.0]))})
    found = interval(row, dense)
    assert (found.low, found.high, found.members) == (pytest.approx(-60.0), 0.0, 5)
    assert standard_error(dense) == pytest.approx(100 * math.sqrt(0.8 * 0.2 / 5))


def test_stratified_interval_against_resampled_members():
    draw = np.random.default_rng(3)
    sizes, factor = (5, 20, 50), 100 / 7
    strata = [{g: dict(enumerate(draw.integers(0, 2, n).astype(float))) for g, n in zip("abc", sizes, strict=True)}]
    strata.append({g: {m: float(draw.random() < 0.6) for m in members} for g, members in strata[0].items()})
    found = interval(Breakdown("strata", factor, strata[1]), Breakdown("strata", factor, strata[0]))
    differences = [np.array([strata[1][g][m] - strata[0][g][m] for m in strata[0][g]]) for g in "abc"]
    sums = sum(d[draw.integers(0, len(d), (20000, len(d)))].mean(1) for d in differences)
    assert (found.low, found.high) == pytest.approx(tuple(factor * np.quantile(sums, [0.025, 0.975])), abs=0.4)


def test_f1_interval_against_resampled_documents():
    draw = np.random.default_rng(4)
    truth = draw.random(80) < 0.5
    counts = []
    for accuracy in (0.9, 0.75):
        said = np.where(draw.random(80) < accuracy, truth, ~truth)
        counts.append(np.stack([said & truth, said & ~truth, ~said & truth], axis=1).astype(int))
    dense, row = (Breakdown("f1", 100.0, {"": {n: tuple(c) for n, c in enumerate(part)}}) for part in counts)
    found = interval(row, dense)
    index = draw.integers(0, 80, (20000, 80))
    totals = [part[index].sum(1) for part in counts]
    f1 = [2 * t[:, 0] / (2 * t[:, 0] + t[:, 1] + t[:, 2]) for t in totals]
    assert (found.low, found.high) == pytest.approx(tuple(100 * np.quantile(f1[1] - f1[0], [0.025, 0.975])), abs=1.0)


def test_no_interval_over_other_documents():
    dense, row = (Breakdown("mean", 1.0, {"": dict.fromkeys(range(n), 1.0)}) for n in (3, 2))
    assert "same documents" in interval(row, dense) and "same documents" in interval(dense, row)


# -- a whole outcome ---------------------------------------------------------------------------------------------------

#: right answers of the four videos that everything below is about
DENSE, FASTV, RANDOM = [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]


def mme_document(right: int) -> dict:
    return {"question_id": "a", "category": "unused", "pred_answer": "A" if right else "B", "answer": "A"}


def finished(tmp_path, **changes):
    """Table, selections and choices of the made-up table with every unit run."""
    table = load(write_table(tmp_path / "tables", **changes.pop("table", {})))
    choices = Choices(table=table.name, **changes.pop("choices", {}))
    selections = select(table, choices)
    units = plan(selections, choices, Machines(), tmp_path / "out")
    right = {"dense": DENSE, "FastV 50 %": FASTV, "Random": RANDOM}
    for unit in units:
        scores = right[unit.row]
        if unit.task == "videomme":
            lines = documents(scores)
            for line, score in zip(lines, scores, strict=True):
                line["videomme_perception_score"] = mme_document(bool(score))
            metrics = {"videomme": {"videomme_perception_score": 25.0 * sum(scores)}}
        else:
            lines = documents(scores)
            metrics = {unit.task: {"exact_match": sum(scores) / 4}}
        lines = with_first_tokens(lines, [math.log(p) for p in ((0.5, 0.5) if unit.dense else (0.75, 0.25))])
        kept = {"dense": 1.0, "FastV 50 %": 0.5, "Random": 0.25}[unit.row]
        write_run(unit, {unit.task: lines}, metrics, kept, **changes)
    return table, selections, choices


def evaluated(tmp_path, **changes):
    table, selections, choices = finished(tmp_path, **changes)
    about = {"created": "2026-01-02T03:04:05+00:00", "command": "made up", "machine": {"name": "paper"}, "versions": {}}
    return json.loads(json.dumps(outcome.evaluate(table, selections, choices, about)))


def test_outcome_by_hand(tmp_path):
    made = evaluated(tmp_path)
    (part,) = made["parts"]
    dense, fastv, plain, lost = part["rows"]
    video, videomme = (fastv["cells"][title] for title in ("Video", "VideoMME"))
    assert (dense["cells"]["Video"]["measured"], video["measured"], videomme["measured"]) == (75.0, 50.0, 50.0)
    assert (video["published"], video["difference"], videomme["difference"]) == (45.0, 5.0, 10.0)
    assert video["relative"] == pytest.approx(100 * 50 / 75) and video["relative_published"] == pytest.approx(90.0)
    assert fastv["mean_relative"] == pytest.approx(100 * 50 / 75)
    assert fastv["mean_relative_published"] == pytest.approx((90.0 + 100.0) / 2)
    assert video["change"] == -25.0 and (video["low"], video["high"]) == (-75.0, 0.0)
    assert video["agreement"] == 0.75 and video["documents"] == video["members"] == 4
    # KL((1/2, 1/2) || (3/4, 1/4))
    assert video["kl"] == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), rel=1e-5)
    assert video["visual_tokens_share"] == video["flops_share"] == 0.5
    assert video["speedup"] == pytest.approx(10 / 6) and dense["cells"]["Video"]["speedup"] is None
    assert dense["cells"]["Video"]["change"] is None and dense["mean_relative"] == 100.0
    assert plain["cells"]["Video"]["published"] is plain["cells"]["Video"]["difference"] is None and plain["secondary"]
    assert lost["cells"]["Video"]["measured"] is None and lost["cells"]["Video"]["published"] == 10.0
    assert lost["cells"]["Video"]["relative_published"] == 20.0 and lost["mean_relative"] is None


def test_documents_right_in_one_run_are_tested_beside_the_interval(tmp_path):
    made = evaluated(tmp_path)
    fastv, plain = (row["cells"]["Video"] for row in made["parts"][0]["rows"][1:3])
    assert (fastv["p_value"], fastv["lost"], fastv["won"]) == (1.0, 1, 0)
    assert (plain["p_value"], plain["lost"], plain["won"]) == (0.5, 2, 0)
    assert "-75.0 to +0.0<br>p 1.000 (1 : 0)" in render.markdown(made)
    right, half = Breakdown("mean", 1, {"": {1: 1.0, 2: 0.5}}), Breakdown("mean", 1, {"": {1: 1.0, 2: 1.0}})
    assert paired_test(right, half) == "scores per document are not just right and wrong"
    assert paired_test("scored by a judge", half) == "scored by a judge"


def test_rows_without_effect_are_marked_and_named_last(tmp_path):
    kept = {"kept": 1.0, "kept_least": 1.0, "kept_most": 1.0, "kept_by_layer": [1.0, 0.5], "with_visual_tokens": 4}
    table, selections, choices = finished(tmp_path)
    for (row, column), unit in selections[0].units.items():
        path = unit.folder / "summary.json"
        summary = json.loads(path.read_text())
        for means_of_task in summary["costs"]["by_task"].values():
            means_of_task |= kept
        if row == "Random" and column == "Video":
            summary["no_op"] = dict.fromkeys(summary["tasks"], "every visual token was kept")
        path.write_text(json.dumps(summary))
    made = outcome.evaluate(table, selections, choices, {})
    idle = [(r["name"], t) for r in made["parts"][0]["rows"] for t, c in r["cells"].items() if c["no_op"]]
    assert idle == [("Random", "Video")]
    assert "∅: no effect, the dense model's numbers (Random on Video): every visual token was kept." in made["warnings"]
    assert render.closing(made).startswith("∅ no effect in 1 of 4: Random on Video")
    text = render.markdown(made)
    assert "Random ° ∅" in text and "25.0 ∅<br>" in text and "100% x 1, 50% x 1" in text
    assert made["parts"][0]["rows"][1]["cells"]["Video"]["realised"]["by_layer"] == [1.0, 0.5]


def test_another_model_has_no_difference_to_the_paper(tmp_path):
    made = evaluated(tmp_path, choices={"pretrained": "embedded"})
    assert "below it published for another model" in printed(made, 100)
    own = evaluated(tmp_path / "own")["parts"][0]
    headers = [[h for grid in render.grids(part, 160) for h in grid.headers] for part in (made["parts"][0], own)]
    assert ["paper\n1e12" in h for h in headers] == [False, True]
    cells = [cell for row in made["parts"][0]["rows"] for cell in row["cells"].values()]
    assert all(cell["difference"] is None for cell in cells) and any(cell["published"] for cell in cells)
    assert made["parts"][0]["pretrained"] == "assets/tiny-llava-onevision"
    assert any("Other model" in line for line in render.headings(made))
    assert not [w for w in made["warnings"] if "baseline" in w or "wrong model" in w]


def test_limited_runs_say_so(tmp_path):
    made = evaluated(tmp_path, choices={"limit": 4})
    assert render.headings(made) == ["First 4 documents of every task: not the paper's numbers."]
    assert not [w for w in made["warnings"] if "baseline" in w]


def test_other_questions_are_not_compared(tmp_path):
    table, selections, choices = finished(tmp_path)
    path = next((tmp_path / "out" / "runs" / "shapes_video").glob("FastV*/model/*.jsonl"))
    path.write_text(path.read_text().replace("question 1", "another question"))
    made = outcome.evaluate(table, selections, choices, {})
    cell = made["parts"][0]["rows"][1]["cells"]["Video"]
    assert cell["interval"] == "none: asked other questions than the dense run"
    assert cell["low"] is cell["agreement"] is None and cell["measured"] == 50.0


def test_parts_that_cannot_be_run_show_what_was_published(tmp_path):
    path = write_table(tmp_path / "t")
    path.write_text(
        path.read_text()
        + """
  - name: eight
    model: {family: another}
    not_run: there is no host for it
    columns: {VideoMME: {benchmark: videomme}}
    rows:
      - {name: dense, published: {VideoMME: 60}}
      - {name: Its method, not_run: as above, published: {VideoMME: 45}}
"""
    )
    table, choices = load(path), Choices("made_up", rows=("Its method",))
    with pytest.raises(MethodError, match="that can be run"):
        select(table, choices)
    selections = select(table, Choices("made_up"))
    assert [s.part.name for s in selections] == ["seven", "eight"]
    made = json.loads(json.dumps(outcome.evaluate(table, selections[1:], Choices("made_up"), {})))
    text = printed(made, 100)
    assert "75.0" in text and "there is no host for it" in text and "Relative to" not in text
    assert "| Its method | -<br>45.0 | -<br>75.0 |" in render.markdown(made)


def test_costs_of_a_group_are_weighted_by_documents():
    by_task = {"a": {"measured": 3, "prefill_ms": 10.0}, "b": {"measured": 1, "prefill_ms": 2.0}}
    assert outcome._costs({"costs": {"by_task": by_task}}, ["a", "b"]) == {"prefill_ms": 8.0}
    assert outcome._costs({"costs": {"by_task": {}, "overall": {"prefill_ms": 5.0}}}, ["a"]) == {"prefill_ms": 5.0}


# -- guards ------------------------------------------------------------------------------------------------------------


def column(name: str, title: str = "it") -> Column:
    about = benchmark(name)
    return Column(title, about, about.metric, about.scale)


def drift(name: str, measured: float, published: float, documents: int, error: float | None = None) -> list[str]:
    return guards.dense_baseline("part", [guards.Baseline(column(name, "It"), measured, published, documents, error)])


def test_a_drifting_dense_baseline_is_named_with_its_causes():
    (warning,) = drift("videomme", 63.9, 58.2, 2700)
    assert "It 63.9, published 58.2 (+5.7;" in warning
    assert all(cause in warning for cause in guards.CAUSES) and "stock LLaVA-OneVision-7B" in warning
    assert "stock LLaVA-OneVision-7B" not in drift("gqa", 63.9, 58.2, 2700)[0]
    # 2700 documents explain 2 x 0.95, and one point is rounding
    assert not drift("videomme", 60.9, 58.2, 2700)
    assert drift("videomme", 55.0, 58.2, 2700)
    assert not drift("videomme", 63.9, 58.2, 100)  # 9.8 points of chance
    assert drift("videomme", 63.9, 58.2, 100, error=1.0)
    assert not drift("mme", 1880.0, 1862.0, 2374, error=20.0)
    assert drift("mme", 1780.0, 1862.0, 2374, error=20.0)


def test_columns_that_drift_are_told_together():
    pairs = {"gqa": (50.0, 60.0), "pope": (85.0, 85.9), "videomme": (63.9, 58.2)}
    found = [guards.Baseline(column(name, name), *scores, 10000) for name, scores in pairs.items()]
    (warning,) = guards.dense_baseline("part", found)
    assert "gqa 50.0" in warning and "videomme 63.9" in warning and "pope" not in warning


def test_wrong_data_is_named():
    right = {"dataset": "sy1998/MLVU_dev", "config": None, "split": "test", "documents": 2174}
    about = dataclasses.replace(benchmark("mlvu_dev"), documents=2174)

    def of(limit=None, answered=2174, **changes):
        summary = {"task_info": {"mlvu_dev": {**right, **changes}}, "n_samples": {"mlvu_dev": answered}}
        return guards.data("dense", "MLVU", about, summary, limit)

    assert of() == [] and of(limit=5, answered=5) == []
    (warning,) = of(dataset="sy1998/MLVU_Test")
    assert "sy1998/MLVU_Test" in warning and "sy1998/MLVU_dev" in warning and "dev and a test set" in warning
    assert "split validation was run" in of(split="validation")[0]
    assert "502 documents" in of(documents=502, answered=502)[0]
    assert of(answered=2000) == ["dense on MLVU: 2000 of 2174 documents of mlvu_dev were answered."]
    assert guards.data("x", "y", about, {}, None) == []


def test_configurations_of_a_data_set_are_compared():
    info = {"dataset": "lmms-lab-encoder/ScienceQA", "config": "ScienceQA-FULL", "split": "test", "documents": 2017}
    (warning,) = guards.data("x", "y", benchmark("scienceqa_img"), {"task_info": {"scienceqa_img": info}}, 5)
    assert "configuration ScienceQA-FULL" in warning


@pytest.mark.parametrize(
    ("settings", "facts", "expected"),
    [
        ({}, {"hidden_size": 896, "num_hidden_layers": 28}, "hidden_size 896, the paper's has 3584"),
        ({}, {"hidden_size": 3584, "num_hidden_layers": 24}, "num_hidden_layers 24"),
        ({"pretrained": "lmms-lab/LLaVA-Video-7B-Qwen2"}, {}, "looks like a llava_video model"),
        ({"conv_template": "vicuna_v1"}, {}, "conv_template vicuna_v1 does not fit"),
        ({"model_name": "llava_onevision"}, {}, "model_name llava_onevision lacks 'qwen'"),
        ({}, {"hidden_size": 3584, "num_hidden_layers": 28}, None),
        ({"model_name": "llava_qwen"}, {}, None),
        ({"pretrained": "/data/my-model", "conv_template": "anything"}, {}, None),
    ],
)
def test_a_wrong_model_is_named(settings, facts, expected):
    usual = {"pretrained": "lmms-lab/llava-onevision-qwen2-7b-ov", "conv_template": "qwen_1_5", "model_name": None}
    summary = {"settings": usual | settings, "checkpoint": facts}
    found = guards.model("part", "llava_onevision", {"hidden_size": 3584, "num_hidden_layers": 28}, summary)
    assert (found == []) if expected is None else (len(found) == 1 and expected in found[0])


def test_templates_of_llava_1_5_fit():
    summary = {"settings": {"pretrained": "liuhaotian/llava-v1.5-7b", "conv_template": "vicuna_v1"}}
    assert guards.model("part", "llava", {}, summary) == []
    summary["settings"]["conv_template"] = "qwen_1_5"
    assert "does not fit" in guards.model("part", "llava", {}, summary)[0]


def test_broken_answers_and_adaptations_are_named():
    assert guards.answers("x", {"warnings": ["half are empty"]}) == ["x: half are empty"]
    assert guards.answers("x", {"warnings": []}) == []
    told = guards.adaptations("VisionZip", {"settings": {"adaptations": {"cls_attention": "received_attention"}}})
    assert told == ["VisionZip is an adaptation, not the authors' work: received_attention in place of cls_attention."]
    assert guards.adaptations("x", {"settings": {"adaptations": {}}}) == []


def test_times_of_a_busy_machine_are_doubted():
    assert guards.times("it", {"dense": 5.0, "fastv": 7.0}) == [] == guards.times("it", {"dense": 5.0})
    assert "took 5.0 ms with dense and 8.0 ms with fastv" in guards.times("it", {"dense": 5.0, "fastv": 8.0})[0]


def test_limits_on_mme_are_doubted():
    assert guards.limit(benchmark("mme"), 6) and not guards.limit(benchmark("mme"), None)
    assert not guards.limit(benchmark("gqa"), 6)


def test_a_mean_over_published_columns_is_marked(tmp_path):
    published = {"dense": {"Video": 75.0, "VideoMME": 75.0}, "fastv": {"Video": 60.0}, "lost": {}}
    part = evaluated(tmp_path, table={"published": published})["parts"][0]
    assert render._mean(part["rows"][1]) == "66.7\n80.0 †" and render._mean(part["rows"][2]) == "33.3\n-"
    assert any("the measured mean is over the columns" in note for note in render.notes(part))


# -- units, copies of the paper's checkpoint, and the mean as the table makes it --------------------------------------


@pytest.mark.parametrize(
    ("name", "metric", "unit"),
    [
        ("activitynetqa", "gpt_eval_score", "of 5"),
        ("activitynetqa", "gpt_eval_accuracy", "%"),
        ("videochatgpt", None, "of 5"),
        ("videochatgpt", "gpt_eval_score_temporal", "of 5"),
        ("mmbench_en_dev_static", None, "%"),  # its metric has the name of a judge's marks
        ("mme", "mme_perception_score", "points"),
    ],
)
def test_units_are_those_of_the_column(name, metric, unit):
    assert dataclasses.replace(column(name), metric=metric or benchmark(name).metric).unit == unit


def test_drift_of_marks_is_told_in_marks():
    marks = dataclasses.replace(column("activitynetqa", "Score"), metric="gpt_eval_score", scale=1)
    assert guards.dense_baseline("p", [guards.Baseline(marks, 2.3, 2.86, 8000, 0.02)])
    assert not guards.dense_baseline("p", [guards.Baseline(marks, 2.84, 2.86, 8000, 0.02)])


def test_a_copy_of_the_papers_checkpoint_is_the_papers_model(tmp_path):
    copy = tmp_path / "weights" / "LLaVA-OneVision-Qwen2-7B-ov"
    copy.mkdir(parents=True)
    made = evaluated(tmp_path, choices={"pretrained": str(copy)})
    assert made["other_model"] is None and made["parts"][0]["rows"][1]["cells"]["Video"]["difference"] == 5.0
    wrong = evaluated(tmp_path / "2", choices={"pretrained": str(copy)}, checkpoint={"hidden_size": 896})
    assert any("hidden_size 896, the paper's has 3584" in warning for warning in wrong["warnings"])


def test_columns_that_say_the_same_again_are_not_in_the_mean():
    aspects = {c.title: c for c in load("prunevid").part("llava-onevision-7b-videochatgpt").columns}
    assert means.derived(list(aspects.values())) == {"Avg"}
    assert means.derived([aspects["Avg"]]) == means.derived([aspects["Avg"], aspects["TU"]]) == set()
    assert means.derived(load("dycoke").parts[0].columns) == {"ActivityNet-QA score"}
    assert means.derived(load("fastv").parts[0].columns) == set()  # perception and cognition are two things


def test_the_mean_is_made_as_the_table_says(tmp_path):
    path = write_table(tmp_path / "tables")
    text = path.read_text().replace("VideoMME: 40.0}}", "VideoMME: 40.0, relative %: 91.0}}")
    text = text.replace("    rows:\n", "    unmeasured: {relative %: the average over the dense row's}\n    rows:\n")
    text = text.replace("{Video: 45.0, VideoMME: 40.0}", "{Video: 45.0, VideoMME: 40.0, relative %: 91.0}")
    found_means = {}
    for how in ("mean_of_ratios", "ratio_of_means"):
        path.write_text(text.replace("source: tests", f"source: tests\nrelative: {how}"))
        table, choices = load(path), Choices("made_up")
        (selection,) = select(table, choices)
        dense, fastv = selection.rows[:2]
        values = {"dense": (80.0, 20.0), "FastV 50 %": (40.0, 20.0)}
        cells = {}
        for row in selection.rows:
            for number, c in enumerate(selection.columns):
                made = outcome.cell(row, dense, c, None, None, False)
                if row.name in values:
                    measured, whole = values[row.name][number], values["dense"][number]
                    made |= {"measured": measured, "relative": 100 * measured / whole}
                cells[row.name, c.title] = made
        found = outcome._row(fastv, selection, cells)
        found_means[how] = found["mean_relative"]
        assert found["mean_relative_published"] == 91.0 and found["mean_relative_printed"]
        assert outcome._row(dense, selection, cells)["mean_relative"] == 100.0
        few = dataclasses.replace(selection, columns=selection.columns[:1])
        assert outcome._row(fastv, few, cells)["mean_relative_published"] == pytest.approx(90.0)  # not the table's 91
    assert found_means == {"mean_of_ratios": pytest.approx((50 + 100) / 2), "ratio_of_means": pytest.approx(60.0)}


def test_fastvids_printed_relative_is_a_ratio_of_means():
    part = load("fastvid").part("llava-onevision-7b")
    assert part.relative == "ratio_of_means" and load("fastervlm").parts[0].relative == "mean_of_ratios"
    dense = part.dense.published
    for row in part.rows:
        made = means.relative([({"it": row.published[t]}, {"it": dense[t]}) for t in dense], "it", part.relative)
        assert made == pytest.approx(row.unmeasured["relative %"], abs=0.2), row.name


def test_guards_are_asked(tmp_path):
    made = evaluated(
        tmp_path,
        warnings=["90 % of the answers are empty"],
        checkpoint={"hidden_size": 896, "num_hidden_layers": 24},
        task_info={"videomme": {"dataset": "other/set", "split": "test", "documents": 4}},
    )
    text = "\n".join(made["warnings"])
    assert "dense: 90 % of the answers are empty" in text and "hidden_size 896" in text
    assert "data set other/set" in text and "the data has 4 documents" in text
    assert "the dense baseline is not the published one: " not in text  # four documents explain any difference
    assert len(set(made["warnings"])) == len(made["warnings"])


def test_guards_are_silent_where_all_is_well(tmp_path):
    published = {"dense": {"Video": 75.0, "VideoMME": 75.0}, "fastv": {}, "lost": {}}
    right = {"dataset": "lmms-eval/Video-MME", "config": None, "split": "test", "documents": None}
    assert evaluated(tmp_path, table={"published": published}, task_info={"videomme": right})["warnings"] == []


# -- what is printed ---------------------------------------------------------------------------------------------------


def printed(made, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    render.show(made, console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 100, 160])
def test_tables_fit_the_terminal(tmp_path, width):
    text = printed(evaluated(tmp_path), width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    for number in ("75.0", "45.0 +5.0", "66.7", "-75.0 to +0.0", "75%", "1.67x", "50 (50%)", "0.144"):
        assert number in text, number
    assert "VideoMME, n=4" in text
    assert "Lost: not run (its code was never released)" in text and "Random °" in text


@pytest.mark.parametrize("width", [80, 100, 150])
def test_long_names_cost_no_number(tmp_path, width):
    made = evaluated(tmp_path)
    made["parts"][0]["rows"][1]["name"] = "A method with a name of 40 letters 9.7 %"
    made["parts"][0]["rows"][1]["cells"]["Video"] |= {"low": -1234.5, "high": 1234.5, "change": -1000.0}
    text = printed(made, width)
    assert "-1234.5 to +1234.5" in text and "0.144" in text and "1.67x" in text


def test_a_wide_terminal_has_one_table_less(tmp_path):
    part = evaluated(tmp_path)["parts"][0]
    assert (len(render.grids(part, 100)), len(render.grids(part, 160))) == (3, 2)


def test_many_columns_are_split(tmp_path):
    titles = ["GQA", "MMB", "MME", "POPE", "SQA", "VQAv2", "TextVQA", "SEED", "VizWiz"]
    made = evaluated(tmp_path)
    part = made["parts"][0]
    part["columns"] = [{**part["columns"][0], "title": title} for title in titles]
    for row in part["rows"]:
        row["cells"] = {title: row["cells"]["Video"] for title in titles}
    text = printed(made, 100)
    assert max(map(len, text.splitlines())) <= 100 and "…" not in text and "(1 of 2)" in text
    assert all(title in text for title in titles)


def test_markdown_holds_the_same_numbers(tmp_path):
    text = render.markdown(evaluated(tmp_path))
    assert "| FastV 50 % | 50.0<br>45.0 +5.0 | 50.0<br>40.0 +10.0 | 66.7<br>95.0 |" in text
    assert "# A made-up table" in text and "made up" in text and "2026-01-02" in text


def test_missing_intervals_say_why(tmp_path):
    table, selections, choices = finished(tmp_path)
    for path in (tmp_path / "out").rglob("*_samples_shapes_video.jsonl"):
        path.write_text(path.read_text().replace('"exact_match": 1.0', '"exact_match": "right"'))
    made = outcome.evaluate(table, selections, choices, {})
    text = printed(made, 160)
    assert "Video: no interval, exact_match is no number per document (FastV 50 %, Random)" in text


# -- leaderboard -------------------------------------------------------------------------------------------------------


def stored(tmp_path, **changes) -> Path:
    path = tmp_path / "store" / "made_up.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(evaluated(tmp_path, **changes)))
    return path


def test_leaderboard_is_sorted_and_says_where_numbers_come_from(tmp_path):
    text = leaderboard.make([stored(tmp_path)], tmp_path)
    assert "## org/llava-onevision-qwen2-7b-ov" in text and "### videomme (lmms-eval/Video-MME, test;" in text
    rows = [line for line in text.splitlines() if line.startswith(("| dense", "| fastv", "| random"))]
    assert [row.split(" | ")[0] for row in rows[:3]] == [
        "| dense",
        "| fastv(retention_ratio=0.5)",
        "| random(retention_ratio=0.25)",
    ]
    assert "50.0 | -25.0 | -75.0 to +0.0 | 75% | 50 (50%) | 50.0% | 4 | 2026-01-02 | [1](store/made_up.json)" in rows[1]
    assert "1. [made_up.json](store/made_up.json): A made-up table" in text and "paper" in text
    assert "Lost" not in text and "45.0" not in text  # published numbers are no measurements


def test_leaderboard_keeps_limited_runs_apart(tmp_path):
    text = leaderboard.make([stored(tmp_path, choices={"limit": 4})], tmp_path)
    assert "first 4 documents only" in text and "limit 4" in text


def test_leaderboard_refuses_other_files(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"kind": "efficiency"}')
    with pytest.raises(MethodError, match="no outcome of this command"):
        leaderboard.make([path], tmp_path)


def test_committed_leaderboard_is_that_of_the_committed_outcomes():
    paths = sorted(leaderboard.STORE.glob("*.json"))
    assert paths, "docs/results/reproduce holds no outcome"
    made = leaderboard.make(paths, leaderboard.OUTPUT.parent)
    shown = leaderboard.OUTPUT.read_text(encoding="utf-8")
    assert shown == made, "run: python -m lmms_eval_accelerate.reproduce leaderboard"
    for path in paths:
        assert str(ROOT) not in path.read_text(encoding="utf-8"), f"{path} names folders of one machine"
