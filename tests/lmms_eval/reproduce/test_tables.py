"""The published tables: they load, their numbers are those of the sources, their settings those that were printed."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from lmms_eval_accelerate.benchmarks.catalog import BENCHMARKS
from lmms_eval_accelerate.reproduce.tables import MODEL_KEYS, OTHER_KEYS, available, load

from accelerate_methods.engine.flops import prefill_macs
from accelerate_methods.registry import compatibility
from accelerate_methods.registry.configs import read_config
from accelerate_methods.registry.pipeline import resolve
from accelerate_methods.stages.errors import UnknownNameError
from tests.support.paths import ROOT

TABLES = sorted(
    [
        *("dycoke", "embedded", "fastervlm", "fastv", "fastvid", "prunevid", "visionzip"),
        *("internvl3", "llava_1_5", "llava_next", "llava_onevision", "llava_video", "qwen2_5_vl", "qwen3_vl"),
        *("fastvlm", "flashsloth", "hicom", "llama_vid", "llava_mini", "mqt", "video_xl", "voco_llama"),
    ]
)
ROWS = [
    pytest.param(part, row, id=f"{name}-{part.name}-{row.name}")
    for name in available()
    for part in load(name).parts
    for row in part.rows
]
RUNNABLE = [row for row in ROWS if not row.values[1].not_run]


def test_tables_that_are_there():
    assert available() == TABLES


@pytest.mark.parametrize("name", TABLES)
def test_table(name):
    table = load(name)
    assert table.name == name and table.title and table.paper and table.source
    for part in table.parts:
        assert [row.name for row in part.rows if row.dense] == ["dense"] and part.dense.name == "dense"
        assert part.not_run or (part.columns and part.tasks and Path(part.model["pretrained"]).name)
        assert part is table.part(part.name)
        assert all(row is part.row(row.folder) and re.fullmatch(r"[\w@.+-]+", row.folder) for row in part.rows)
    with pytest.raises(UnknownNameError, match="unknown part of table"):
        table.part("llava-7b")


@pytest.mark.parametrize(("part", "row"), ROWS)
def test_row_is_run_or_says_why_not(part, row):
    assert row.source
    assert (row.pipeline is None) == bool(row.not_run)
    assert not set(row.published) - {column.title for column in part.columns}
    assert not set(row.unmeasured) - set(part.unmeasured)


@pytest.mark.parametrize(("part", "row"), RUNNABLE)
def test_row_resolves_and_runs_on_its_family(part, row):
    compatibility.check(row.pipeline, part.family, part.model_class)
    arguments = row.model_args()
    assert bool(arguments) != row.dense or row.arguments
    arguments = row.method_args()
    # what is typed after --model_args gives the same methods, and no argument of the model's own
    assert resolve(arguments.pop("method", None), **arguments) == row.pipeline
    assert not set(arguments) & set(MODEL_KEYS[part.family])


@pytest.mark.parametrize(
    ("table", "part", "row", "published"),
    [
        ("fastvid", "llava-onevision-7b", "dense", {"MVBench": 56.9, "LongVideoBench": 56.4, "MLVU": 65.2}),
        ("fastvid", "llava-onevision-7b", "dense", {"VideoMME": 58.6}),
        ("fastvid", "llava-onevision-7b", "FastVID 25 %", {"MVBench": 56.5, "MLVU": 64.1, "VideoMME": 58.0}),
        ("fastvid", "llava-onevision-7b", "FastVID 19.9 %", {"LongVideoBench": 57.1, "VideoMME": 57.9}),
        ("fastvid", "llava-onevision-7b", "FastVID 14.8 %", {"MVBench": 56.0, "VideoMME": 57.7}),
        ("fastvid", "llava-onevision-7b", "FastVID 9.7 %", {"MVBench": 55.9, "LongVideoBench": 56.3, "VideoMME": 57.3}),
        ("fastvid", "llava-onevision-7b", "FastV 10 %", {"MVBench": 51.7, "VideoMME": 52.4}),
        ("fastvid", "llava-onevision-7b", "VisionZip 9.7 %", {"MVBench": 44.4, "VideoMME": 46.0}),
        ("fastvid", "llava-onevision-7b", "VisionZip* 25 %", {"MVBench": 56.6, "MLVU": 64.8}),
        ("fastvid", "llava-onevision-7b", "DyCoke 32.5 %", {"MVBench": 56.3, "MLVU": 62.1}),
        ("fastvid", "llava-onevision-7b", "PruneVID* 10.1 %", {"MVBench": 54.2, "VideoMME": 55.9}),
        ("fastvid", "llava-onevision-7b", "FastVID+FastV 9.7 / 3.6 %", {"MVBench": 55.0, "VideoMME": 56.3}),
        ("fastvid", "log-llava-onevision-7b", "FastVID 10 %", {"VideoMME": 57.3}),
        ("fastvid", "log-llava-video-7b", "FastVID 10 %", {"VideoMME": 60.7}),
        ("dycoke", "llava-onevision-0.5b", "DyCoke K=0.7 (14.25 %)", {"NExT-QA": 57.7, "VideoMME": 45.2}),
        ("dycoke", "llava-onevision-7b", "dense", {"ActivityNet-QA": 51.93, "NExT-QA": 79.4, "VideoMME": 58.5}),
        ("dycoke", "llava-onevision-7b", "DyCoke K=0.5 (18.75 %)", {"ActivityNet-QA score": 2.88, "VideoMME": 59.5}),
        ("dycoke", "llava-onevision-72b", "DyCoke K=0.7 (14.25 %)", {"NExT-QA": 78.8, "VideoMME": 64.9}),
        ("prunevid", "llava-onevision-7b", "PruneVid 17 %", {"MVBench": 57.5, "VideoMME": 58.6, "EgoSchema": 62.6}),
        ("prunevid", "llava-onevision-7b-videochatgpt", "PruneVid 17 %", {"TU": 2.73, "CI": 3.51, "Avg": 3.24}),
        ("prunevid", "pllava-7b", "PruneVid 16.2 %", {"MVBench": 47.6, "VideoMME": 45.3, "EgoSchema": 49.0}),
        ("prunevid", "st-llm-7b", "dense", {"MVBench": 54.9, "EgoSchema": 56.2, "CO": 2.66}),
        ("visionzip", "llava-1.5-7b", "dense", {"GQA": 61.9, "MME": 1862, "POPE": 85.9, "TextVQA": 58.2}),
        ("visionzip", "llava-1.5-7b", "VisionZip 192", {"GQA": 59.3, "POPE": 85.3, "VQAv2": 76.8, "SEED": 56.4}),
        ("visionzip", "llava-1.5-7b", "VisionZip 64", {"MMB": 60.1, "MME": 1690, "POPE": 77.0, "VQAv2": 72.4}),
        ("visionzip", "llava-1.5-7b-reproduction", "VisionZip 64", {"TextVQA": 55.52, "POPE": 80.39, "MME": 1710.8}),
        ("fastervlm", "llava-1.5-7b", "dense", {"VQAv2": 78.52, "POPE": 85.87, "MME": 1506.47, "MMB-CN": 58.08}),
        ("fastervlm", "llava-1.5-7b", "FasterVLM 144", {"GQA": 58.34, "SQA": 67.92, "POPE": 83.46, "MMB": 62.54}),
        ("fastervlm", "llava-1.5-7b", "FasterVLM 29", {"VQAv2": 66.75, "TextVQA": 53.09, "MME": 1254.80}),
        ("fastervlm", "llava-next-7b", "FasterVLM 290", {"VQAv2": 75.21, "SQA": 68.12, "MMB-CN": 54.47}),
        ("fastv", "llava-1.5-7b", "FastV K=3 R=50 %", {"GQA": 60.4, "MME-Cog": 349.3, "MME-Per": 1511.7}),
        ("fastv", "llava-1.5-7b-in-fastervlm", "FastV 58", {"VQAv2": 65.38, "POPE": 57.30, "MME": 1210.36}),
        ("llava_1_5", "llava-1.5-7b", "CDPruner 64", {"VQAv2": 75.4, "POPE": 87.5, "MME-P": 1415.1, "VizWiz": 53.4}),
        ("llava_1_5", "llava-1.5-7b", "HiPrune 192", {"GQA": 59.2, "MME": 1814, "MMB-CN": 57.0, "VQAv2": 76.7}),
        ("llava_1_5", "llava-1.5-7b", "SCOPE 128", {"GQA": 59.7, "MMB": 62.5, "SEED": 57.8}),
        ("llava_1_5", "llava-1.5-7b", "SparseVLM 64", {"GQA": 53.8, "MME": 1591, "TextVQA": 53.4}),
        ("llava_next", "llava-next-7b", "CDPruner 320", {"GQA": 61.6, "POPE": 87.2, "MMB-CN": 55.7}),
        ("llava_next", "llava-next-7b-in-scope", "SCOPE 160", {"GQA": 60.0, "MME": 1700, "TextVQA": 56.8}),
        ("qwen2_5_vl", "qwen2.5-vl-7b-in-hiprune", "HiPrune 11.2 %", {"GQA": 52.5, "TextVQA": 62.6}),
        ("qwen2_5_vl", "qwen2.5-vl-7b-in-cdpruner", "CDPruner 256", {"ChartQA": 73.0, "AI2D": 77.5, "OCRBench": 749}),
        ("qwen3_vl", "qwen3-vl-8b-32-frames", "VidCom2 25 %", {"MVBench": 67.0, "MLVU": 60.6, "VideoMME": 62.4}),
        ("qwen3_vl", "qwen3-vl-8b-32-frames", "HoliTom 25 %", {"LongVideoBench": 56.8, "VideoMME": 59.7}),
        ("llava_onevision", "llava-onevision-7b", "HoliTom 15 %", {"MVBench": 58.1, "VideoMME": 57.3}),
        ("llava_onevision", "llava-onevision-7b", "VisionZip 10 %", {"LongVideoBench": 49.3, "VideoMME": 53.4}),
        ("llava_onevision", "llava-onevision-7b-in-vidcom2", "VidCom2 15 %", {"MVBench": 54.3, "MLVU": 58.9}),
        ("llava_video", "llava-video-7b", "FlashVID 10 %", {"MVBench": 59.3, "VideoMME": 60.9}),
        ("llava_video", "llava-video-7b-in-cdpruner", "CDPruner 64 x 32", {"MLVU": 63.0, "MVBench": 55.7}),
        ("embedded", "tiny-llava-onevision", "fastvid@0.1", {"shapes_video": 95.1, "easy_vqa": 100.0}),
    ],
)  # fmt: skip
def test_numbers(table, part, row, published):
    found = load(table).part(part).row(row).published
    assert {title: found[title] for title in published} == published


@pytest.mark.parametrize(
    ("table", "part", "row", "title", "number"),
    [
        ("fastvid", "llava-onevision-7b", "FastVID 9.7 %", "VideoMME long", 48.6),
        ("fastvid", "log-llava-video-7b", "FastVID 10 %", "VideoMME short", 71.7),
        ("dycoke", "llava-onevision-7b", "dense", "VideoMME subtitles", 61.3),
        ("prunevid", "llava-onevision-7b", "PruneVid 17 %", "EgoSchema full", 59.5),
        ("visionzip", "llava-next-7b", "VisionZip 640", "average %", 97.6),
        ("fastervlm", "llava-1.5-7b", "FasterVLM 58", "average %", 94.24),
        ("fastv", "llava-next-7b-in-fastervlm", "FastV 290", "average %", 89.24),
        ("llava_1_5", "llava-1.5-7b", "MMTok 64", "average %", 96.5),
        ("llava_onevision", "llava-onevision-7b", "HoliTom 10 %", "EgoSchema full", 61.2),
    ],
)
def test_numbers_that_are_not_measured_are_kept(table, part, row, title, number):
    part = load(table).part(part)
    assert part.row(row).unmeasured[title] == number and part.unmeasured[title]


BUDGETS = {
    **{"llava_1_5": ("192", "128", "64", "32"), "llava_next": ("640", "320", "160")},
    **dict.fromkeys(("qwen2_5_vl", "qwen3_vl", "internvl3"), ("25 %", "20 %", "10 %")),
    **dict.fromkeys(("llava_onevision", "llava_video"), ("25 %", "20 %", "15 %", "10 %")),
}


@pytest.mark.parametrize("table", BUDGETS)
def test_tables_of_a_model_show_baselines_at_every_budget(table):
    part = load(table).parts[0]
    videos = any(column.benchmark.kind == "video" for column in part.columns)
    for budget in BUDGETS[table]:
        for name in ("random", "uniform", "pool", "downsample", *(("fewer_frames",) if videos else ())):
            row = part.row(f"{name} {budget}")
            assert not row.published and (row.not_run == "" or name == "downsample"), row.name
            assert row.not_run in ("", "acts at the sample stage, which transformers' models do not offer")
        assert len([row for row in part.rows if row.name.endswith(f" {budget}")]) >= 10


@pytest.mark.parametrize("table", BUDGETS)
def test_numbers_of_others_are_marked(table):
    """A row whose source is a copy, or another method's paper, is secondary."""
    for part in load(table).parts:
        for row in part.rows[1:]:
            assert row.secondary or not ("second hand" in row.source and (row.published or row.unmeasured)), row.name


def test_embedded_table_is_the_page_of_results():
    page = (ROOT / "docs" / "results" / "embedded.md").read_text(encoding="utf-8")
    every_question = page.split("## The first six methods, all questions")[1]
    rows = [line for line in every_question.splitlines() if line.startswith("| ")]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in rows]
    printed = {line[0]: (float(line[1]), float(line[4])) for line in lines if line[0] != "setting"}
    (part,) = load("embedded").parts
    assert {row.name: tuple(row.published.values()) for row in part.rows} == printed
    assert Path(part.model["pretrained"]).is_dir()


def test_settings_give_the_printed_tflops():
    """K, budgets and the combination of FastVID's table: MACs over the visual tokens (docs/methods/fastvid.md)."""
    part = load("fastvid").parts[0]
    shape = SimpleNamespace(**part.checkpoint, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4)
    frames, per_frame, layers = part.model["max_frames_num"], 14 * 14, part.checkpoint["num_hidden_layers"]

    def tokens(pipeline):
        count, method = frames * per_frame, pipeline.compress
        if method is not None and method.name == "fastvid":
            count = frames * method.frame_budget(per_frame)
        elif method is not None:
            count = frames * sum(method.view_budget(per_frame))
        if not pipeline.prefills:
            return [count] * layers
        (prefill,) = pipeline.prefills
        return [count] * prefill.k + [prefill.keep_count(count)] * (layers - prefill.k)

    checked = 0
    for row in part.rows:
        if not row.not_run and not {"dycoke", "prunevid"} & {method.name for method in row.pipeline.methods}:
            assert prefill_macs(tokens(row.pipeline), shape) / 1e12 == pytest.approx(row.tflops, abs=0.006), row.name
            checked += 1
    assert checked == 14


def test_budgets_are_those_of_the_configs():
    """VisionZip's and FasterVLM's rows against the levels that their own configs list."""
    for table, part, config in [
        ("visionzip", "llava-1.5-7b", "visionzip/llava_1_5"),
        ("visionzip", "llava-next-7b", "visionzip/llava_next"),
        ("fastervlm", "llava-1.5-7b", "fastervlm/llava_1_5"),
        ("fastervlm", "llava-next-7b", "fastervlm/llava_next"),
    ]:
        levels = read_config(config)["levels"]
        rows = [row for row in load(table).part(part).rows[1:] if not row.not_run]
        assert [row.pipeline for row in rows] == [resolve(config, **level) for level in levels]


def test_who_said_it():
    fastvid = load("fastvid").parts[0]
    assert not fastvid.row("FastVID 9.7 %").secondary and fastvid.row("FastV 10 %").secondary
    assert all(row.secondary for part in load("visionzip").parts for row in part.rows)
    fastv = load("fastv")
    assert not fastv.parts[0].rows[1].secondary and fastv.parts[1].rows[1].secondary
    assert "EVAL.md" in fastv.parts[1].rows[1].source and "README" in fastv.parts[0].rows[1].source


def test_metrics_that_differ_by_column():
    columns = {(t, p.name, c.title): c for t in TABLES for p in load(t).parts for c in p.columns}
    assert columns["fastervlm", "llava-1.5-7b", "POPE"].metric == "pope_f1_score"
    assert columns["visionzip", "llava-1.5-7b-reproduction", "POPE"].metric == "pope_accuracy"
    assert columns["fastervlm", "llava-1.5-7b", "MME"].metric == "mme_perception_score"
    assert columns["visionzip", "llava-1.5-7b", "MME"].metric == "mme_perception_score+mme_cognition_score"
    assert columns["fastvid", "llava-onevision-7b", "MLVU"].benchmark.task == "mlvu_dev"
    # a share is printed in per cent, a judge's score as it is
    assert columns["fastervlm", "llava-1.5-7b", "POPE"].scale == 100
    assert columns["dycoke", "llava-onevision-7b", "ActivityNet-QA score"].scale == 1
    assert columns["prunevid", "llava-onevision-7b-videochatgpt", "TU"].scale == 1


def test_metrics_exist_in_the_stock_tasks():
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None:
        pytest.skip("lmms-eval is not installed")
    files = {}
    for path in Path(spec.submodule_search_locations[0], "tasks").rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        if name := re.search(r"^task: *\"?(\w+)\"? *$", text, re.MULTILINE):
            files[name[1]] = text
    columns = [column for name in TABLES for part in load(name).parts for column in part.columns]
    metrics = ((c.benchmark.name, metric.partition(",")[0]) for c in columns for metric in c.metric.split("+"))
    wanted = set(metrics)
    stock = [(BENCHMARKS[name], metric) for name, metric in sorted(wanted) if BENCHMARKS[name].task not in OURS]
    for benchmark, metric in stock:
        texts = [files[task] for task in benchmark.tasks]
        shared = "" if any(metric in text for text in texts) else _included(spec, benchmark)
        assert re.search(rf"metric: *{metric}\b", "".join(texts) + shared), (benchmark.name, metric)
    assert len(stock) > 15


OURS = {"shapes_video", "easy_vqa", "mmbench_cn_dev_static", "hallusion_bench_image_static"}


def _included(spec, benchmark):
    folder = benchmark.name.partition("_")[0]
    templates = Path(spec.submodule_search_locations[0], "tasks", folder).glob("_default*yaml")
    return "".join(path.read_text(encoding="utf-8") for path in templates)


def test_model_keys_are_those_of_the_plugin():
    pytest.importorskip("lmms_eval")
    families = pytest.importorskip("lmms_eval_accelerate.models.families")
    arguments = pytest.importorskip("lmms_eval_accelerate.models.arguments")
    manifest = pytest.importorskip("lmms_eval_accelerate.manifest")
    assert {*families.FAMILY_CLASSES, *manifest.TRAINED, "hf"} == set(MODEL_KEYS)
    for family in manifest.TRAINED:
        assert {*MODEL_KEYS[family], *OTHER_KEYS} == set(arguments.defaults_of(family))
    for family, cls in families.FAMILY_CLASSES.items():
        assert {*MODEL_KEYS[family], *OTHER_KEYS} == {*arguments.COMMON, *getattr(cls, "defaults", {})}, family


def test_plugin_reads_every_row_as_it_is_meant():
    """What is typed after --model_args, read by lmms-eval and by the plugin: the same methods and settings."""
    utils = pytest.importorskip("lmms_eval.utils")
    arguments = pytest.importorskip("lmms_eval_accelerate.models.arguments")
    any_method = pytest.importorskip("lmms_eval_accelerate.manifest").any_method
    for part, row in (row.values for row in RUNNABLE):
        model = {key: value for key, value in part.model.items() if key != "family"}
        typed = ",".join(f"{key}={value}" for key, value in {**model, **row.model_args()}.items())
        read = arguments.parse(any_method(part.family), utils.simple_parse_args_string(typed))
        assert read.pipeline == row.pipeline, typed
        assert {key: read.values[key] for key in (*model, *row.arguments)} == {**model, **row.arguments}
