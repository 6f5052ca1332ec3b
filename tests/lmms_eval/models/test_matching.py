"""Equal budgets in runs: solved on the first questions, told in the settings, refused where nothing can be solved."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("lmms_eval")

from lmms_eval_accelerate.compare import matched
from lmms_eval_accelerate.models.arguments import parse
from lmms_eval_accelerate.models.matching import spread
from lmms_eval_accelerate.reproduce.choice import Choices, select
from lmms_eval_accelerate.reproduce.folders import foreign
from lmms_eval_accelerate.reproduce.plan import plan
from lmms_eval_accelerate.reproduce.tables import load
from lmms_eval_accelerate.runs.launch import Machines
from lmms_eval_accelerate.session import current, session

from accelerate_methods.bench.matching import Target
from accelerate_methods.registry.settings import Setting, settings_of
from accelerate_methods.stages.errors import MethodError
from tests.support import reproduce_runs
from tests.support.lmms_tasks import document, evaluate, lines, write_tasks, write_video
from tests.support.paths import ROOT

MODEL = f"pretrained={ROOT / 'assets' / 'tiny-llava-onevision'},conv_template=qwen_1_5,device=cpu,max_frames_num=4"
HALF = Target("layer_tokens", 0.5)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("match")
    clips = [write_video(folder / f"{n}.mp4", seed=n) for n in range(2)]
    return write_tasks(folder, clips=[document(n, video=clip) for n, clip in enumerate(clips)], words=[document(0)])


@pytest.mark.parametrize(
    ("method", "kind", "start"),
    [
        ("uniform", "tokens", 1.0),  # says its count
        ("fastv", "layer_tokens", 0.9),  # measured, inside the language model
        ("fewer_frames", "tokens", 0.9),  # measured, where videos are read
        ("uniform", "flops", 0.9),
    ],
)
def test_a_run_solves_its_budget_and_says_so(tasks, method, kind, start):
    with session():
        args = f"{MODEL},method={method},retention_ratio={start},match={kind}:0.5"
        results = evaluate("llava_onevision_accelerated", ["clips"], tasks, model_args=args)
        settings = current().settings
    found = settings["matched"]
    assert found["target"] == f"{kind}=0.5" and found["parameter"] == "retention_ratio" and found["reached"]
    assert settings["methods"][0]["retention_ratio"] == found["value"] < start
    for line in lines(results, "clips"):
        share = line["kept"] if kind != "flops" else line["llm_tflops"] / line["llm_tflops_dense"]
        assert share == pytest.approx(0.5, rel=0.05)


def test_without_a_document_to_try_there_is_an_error(tasks):
    args = f"{MODEL},method=uniform,retention_ratio=0.5,match=tokens:0.5"
    with pytest.raises(MethodError, match="uniform acts on none of the 1 documents"):
        evaluate("llava_onevision_accelerated", ["words"], tasks, model_args=args)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"method": "dycoke", "match": "tokens:0.5"}, "dycoke has no free budget"),
        ({"method": "fastv", "match": "tokens:0.5"}, "match layer_tokens or flops"),
        ({"method": "fastv", "match": "layers:0.5"}, "unknown kind of budget"),
        ({"method": "fastv", "match": "flops:2"}, "not a share above 0"),
    ],
)
def test_what_cannot_be_solved_is_refused_before_anything_is_loaded(given, why):
    with pytest.raises(MethodError, match=why):
        parse("llava_onevision_accelerated", {"pretrained": "x", **given})


def test_calibration_takes_its_documents_from_all_over_the_requests():
    assert spread(list(range(100)), 4) == [12, 37, 62, 87] and spread([1, 2], 8) == [1, 2]


# -- in comparisons and tables -----------------------------------------------------------------------------------------


def test_a_comparison_solves_what_has_a_free_budget():
    settings = settings_of("dense fastvid dycoke visionzip+fastv", 0.1, {}, "llava_onevision")
    named = matched.without_budgets(settings, "dense fastvid dycoke visionzip+fastv", None, HALF)
    assert [setting.label for setting in named] == ["dense", "fastvid", "dycoke", "visionzip+fastv"]
    assert matched.arguments("fastvid", HALF) == {"retention_ratio": 0.5, "match": "layer_tokens:0.5"}
    for method in (None, "dycoke", "visionzip+fastv"):
        assert matched.arguments(method, HALF) == {} and matched.why_not(method, HALF)
    assert "fewer_frames" in matched.baselines("llava_video") and "downsample" not in matched.baselines("hf")
    for words, ratio in (("fastvid@0.2", None), ("fastvid", 0.3)):
        with pytest.raises(MethodError, match="leave @ratio and --retention-ratio out"):
            matched.without_budgets([Setting.of("fastvid", retention_ratio=0.2)], words, ratio, HALF)


def test_a_table_has_one_row_per_method_and_no_published_numbers(tmp_path):
    table = load("fastvid")
    choices = Choices("fastvid", part="llava-onevision-7b", match="layer_tokens=0.5")
    (selection,) = select(table, choices)
    names = [row.name for row in selection.rows]
    assert names[:1] == ["dense"] and names.count("fastvid") == names.count("fastv") == 1
    assert len(set(names)) == len(names)
    assert all(not row.published and row.tflops is None for row in selection.rows)
    dycoke = next(row for row in selection.rows if row.method == "dycoke/llava_onevision")
    assert dycoke.note.startswith("not matched: dycoke has no free budget") and "match" not in dycoke.model_args()
    fastvid = selection.rows[names.index("fastvid")]
    assert fastvid.model_args()["match"] == "layer_tokens:0.5" and fastvid.pipeline.methods[0].retention_ratio == 0.5


def test_results_with_a_solved_budget_are_the_units_own(tmp_path):
    path = reproduce_runs.write_table(tmp_path / "tables")
    choices = Choices("made_up", match="flops=0.4", columns=("Video",))
    units = plan(select(load(path), choices), choices, Machines(processes=1), tmp_path / "out")
    unit = next(unit for unit in units if unit.row == "fastv")
    settings = {"match": "flops:0.4", "matched": {"parameter": "retention_ratio", "value": 0.37}}
    lines_of_run = {"shapes_video": reproduce_runs.documents([1.0])}
    reproduce_runs.write_run(unit, lines_of_run, {"shapes_video": {"exact_match": 1.0}})
    summary = json.loads((unit.folder / "summary.json").read_text())
    summary["settings"] |= settings
    summary["settings"]["methods"][0]["retention_ratio"] = 0.37
    assert foreign(unit, summary) == []
    summary["settings"]["methods"][0]["k"] = 7
    assert foreign(unit, summary), "but nothing else may differ"
