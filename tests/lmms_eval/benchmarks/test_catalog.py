"""The table of benchmarks against the installed lmms-eval; scores, judges, the offline environment; the fixtures."""

from __future__ import annotations

import ast
import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from lmms_eval_accelerate.benchmarks.catalog import (
    BENCHMARKS,
    Benchmark,
    benchmark,
    group_metrics,
    offline_environment,
    require_judge,
    require_judges,
    score,
)
from lmms_eval_accelerate.benchmarks.command import END, START, markdown_table
from PIL import Image

from accelerate_methods.stages.errors import MethodError, UnknownNameError
from tests.support.paths import ROOT

FIXTURES = ROOT / "tests" / "fixtures"
PLUGIN = ROOT / "lmms-eval" / "lmms_eval_accelerate" / "tasks"
HUB = [b for b in BENCHMARKS.values() if not b.embedded]


class TaskLoader(yaml.SafeLoader):
    """Task files, functions as their names."""


TaskLoader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def task_file(path: Path) -> dict:
    content = yaml.load(path.read_text(encoding="utf-8"), TaskLoader)
    if "include" in content:
        content = {**task_file(path.parent / content.pop("include")), **content}
    return content


@pytest.fixture(scope="module")
def stock() -> Path:
    """The folder of lmms-eval's tasks, found without importing it."""
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None:
        pytest.skip("lmms-eval is not installed")
    return Path(spec.origin).parent / "tasks"


@pytest.fixture(scope="module")
def definitions(stock) -> dict[str, dict]:
    """Name of a task or group -> its definition, of ours and of the stock folders where our benchmarks are."""
    folders = "mme mmbench pope scienceqa textvqa gqa vqav2 vizwiz_vqa seedbench videomme mvbench longvideobench mlvu"
    folders += " egoschema nextqa activitynetqa videochatgpt ai2d chartqa docvqa ocrbench mmstar realworldqa"
    folders += " hallusion_bench"
    files = [f for folder in folders.split() for f in (stock / folder).glob("*.yaml")]
    files += PLUGIN.glob("*/*.yaml")
    contents = [task_file(f) for f in files]
    named = {c["task"]: c for c in contents if isinstance(c.get("task"), str)}
    return named | {c["group"]: c for c in contents if isinstance(c.get("task"), list)}


@pytest.mark.parametrize("bench", BENCHMARKS.values(), ids=lambda b: b.name)
def test_table_says_what_the_tasks_say(bench: Benchmark, definitions) -> None:
    if bench.subtasks:
        assert sorted(definitions[bench.task]["task"]) == sorted(bench.tasks)
    produced = set()
    for part in bench.parts:
        task = definitions[part.task]
        options = task.get("dataset_kwargs", {})
        produced |= {metric["metric"] for metric in task["metric_list"]}
        assert task["test_split"] == bench.split
        if bench.embedded:
            lines = (PLUGIN / bench.dataset / options["data_files"]["test"]).read_text().splitlines()
            assert len(lines) == bench.documents
            continue
        assert task["dataset_path"] == bench.dataset
        assert task.get("dataset_name") == part.config
        assert options.get("cache_dir") == bench.media
        assert options.get("revision") == bench.revision
        assert bool(options.get("video")) == (bench.kind == "video") == bool(part.files)
    assert {metric.partition(",")[0] for metric in bench.metrics} <= produced
    assert bench.name == bench.task and bench.kind in ("image", "video")
    if bench.documents is not None:
        assert sum(part.documents for part in bench.parts) == bench.documents


def test_folders_of_mvbench(stock) -> None:
    tree = ast.parse((stock / "mvbench" / "utils.py").read_text())
    (folders,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "DATA_LIST"
    )
    assert {p.config: p.files for p in benchmark("mvbench").parts} == {
        name: (f"{folder}/{{video}}",) for name, folder in folders.items()
    }


def test_the_chinese_static_task_is_the_stock_one(definitions) -> None:
    ours, theirs = definitions["mmbench_cn_dev_static"], definitions["mmbench_cn_dev"]
    # functions: cn_utils.f there, utils.f here, which hands it on
    clean = {k: v.replace("cn_utils.", "utils.") if isinstance(v, str) else v for k, v in theirs.items()}
    differing = {k for k in clean.keys() | ours.keys() if clean.get(k) != ours.get(k)}
    assert differing == {"task", "metric_list", "metadata"}
    assert [m["metric"] for m in ours["metric_list"]] == [m["metric"] for m in theirs["metric_list"]]


def test_the_hallusion_static_task_is_the_stock_one(definitions) -> None:
    ours, theirs = definitions["hallusion_bench_image_static"], definitions["hallusion_bench_image"]
    clean = {k: v.replace("evaluate_hb.", "utils.") if isinstance(v, str) else v for k, v in theirs.items()}
    differing = {k for k in clean.keys() | ours.keys() if clean.get(k) != ours.get(k)}
    assert differing == {"task", "metric_list", "tag"}
    assert [m["metric"] for m in ours["metric_list"]] == [m["metric"] for m in theirs["metric_list"]]
    judged = [m["aggregation"].replace("evaluate_hb.", "utils.") for m in theirs["metric_list"]]
    assert [m["aggregation"] for m in ours["metric_list"]] == [f"{name}_intern" for name in judged]


def test_the_chinese_static_task_asks_no_judge(monkeypatch) -> None:
    pytest.importorskip("lmms_eval")
    pytest.importorskip("openpyxl")
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    def asked(*_, **__):
        raise AssertionError("asked a judge")

    monkeypatch.setattr(MMBench_Evaluator, "_post_request", asked)
    spec = importlib.util.spec_from_file_location("mmbench_cn_utils", PLUGIN / "mmbench_cn" / "utils.py")
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    documents = [
        {
            **dict.fromkeys(("question", "hint", "source", "split", "category", "L2-category"), "x"),
            **{"index": n, "answer": "B", "A": "红色", "B": "蓝色", "C": "nan", "D": "nan"},
        }
        for n in range(4)
    ]
    answers = ("B", "A", "一个谜", "是蓝色")  # right, wrong, unreadable, right by its text
    rows = [utils.mmbench_process_results(d, [a])["gpt_eval_score"] for d, a in zip(documents, answers, strict=True)]
    monkeypatch.setattr(utils, "generate_submission_file", lambda *_: "/dev/null")
    assert utils.aggregate_static(rows, None) == 50


def test_scores() -> None:
    assert score(benchmark("mme"), {"mme_perception_score": 1500.0, "mme_cognition_score": 300.0}) == 1800
    assert score(benchmark("mme"), {"mme_perception_score": 1500.0}, metric="mme_perception_score") == 1500
    assert score(benchmark("gqa"), {"exact_match": 0.61}) == pytest.approx(61)
    assert score(benchmark("videomme"), {"videomme_perception_score": 58.2}) == 58.2
    assert score(benchmark("videomme"), {"videomme_perception_score": 50.0}, scale=0.01) == 0.5
    with pytest.raises(MethodError, match=r"no metric exact_match .* found: other"):
        score(benchmark("gqa"), {"other": 1.0})


def test_group_metrics_are_means_over_subtasks() -> None:
    mvbench = benchmark("mvbench")
    tasks = {"mvbench": {}, **{t: {"mvbench_accuracy": float(n)} for n, t in enumerate(mvbench.tasks)}}
    assert score(mvbench, group_metrics(mvbench, tasks)) == sum(range(20)) / 20
    with pytest.raises(MethodError, match="mvbench_moving_count"):
        group_metrics(mvbench, {t: m for t, m in tasks.items() if t != "mvbench_moving_count"})
    videochatgpt = benchmark("videochatgpt")
    tasks = {
        "videochatgpt_gen": dict(zip(videochatgpt.metrics[:3], (1.0, 2.0, 3.0), strict=True)),
        "videochatgpt_temporal": {"gpt_eval_score_temporal": 4.0},
        "videochatgpt_consistency": {"gpt_eval_score_consistency": 5.0},
    }
    assert score(videochatgpt, group_metrics(videochatgpt, tasks)) == pytest.approx(3)


def test_unknown_benchmark() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'videomme'"):
        benchmark("video_mme")


def test_judges() -> None:
    key = {"OPENAI_API_KEY": "something"}
    for bench in BENCHMARKS.values():
        require_judge(bench, key)
        if bench.needs_judge:
            with pytest.raises(MethodError, match="OPENAI_API_KEY"):
                require_judge(bench, {})
            with pytest.raises(MethodError, match="OPENAI_API_KEY"):
                require_judge(bench, {"OPENAI_API_KEY": "YOUR_API_KEY"})  # the stock tasks' stand-in for none
            with pytest.raises(MethodError, match="API_TYPE=openai"):
                require_judge(bench, {**key, "API_TYPE": "azure"})
        else:
            require_judge(bench, {})
    require_judges("mme,mvbench,some_task_of_mine", {})
    require_judges(["activitynetqa", "mmbench_en_dev"], key)
    for tasks in ("mme, videochatgpt_gen", ["activitynetqa"], "mmbench_cn_dev"):
        with pytest.raises(MethodError, match="OPENAI_API_KEY"):
            require_judges(tasks, {})
    with pytest.raises(MethodError, match="mmbench_en_dev_static needs none"):
        require_judges("mmbench_en_dev", {})


def test_offline_environment(tmp_path, monkeypatch) -> None:
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", "/weights")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = tmp_path / "data"
    with pytest.raises(MethodError, match="does not exist"):
        offline_environment(data)
    (data / "home").mkdir(parents=True)
    folder, environment = offline_environment(data)
    assert folder == data and environment["HF_HOME"] == str(data / "home")
    assert environment["HF_HUB_OFFLINE"] == environment["HF_DATASETS_OFFLINE"] == "1"
    # weights that are in the cache are still found
    assert environment["HF_HUB_CACHE"] == "/weights/hub"
    written = {v for k, v in environment.items() if k.endswith("DATASETS_CACHE")}
    assert len(written) == 1 and not Path(*written).is_relative_to(data)
    assert {v for k, v in offline_environment(data)[1].items() if k.endswith("DATASETS_CACHE")} == written
    _, chosen = offline_environment(data, cache=tmp_path / "mine")
    assert chosen["HF_DATASETS_CACHE"] == chosen["LMMS_EVAL_DATASETS_CACHE"] == str(tmp_path / "mine")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "theirs"))
    assert offline_environment(data)[1]["LMMS_EVAL_DATASETS_CACHE"] == str(tmp_path / "theirs")
    (data / "home" / "mvbench_video").symlink_to(tmp_path)
    with pytest.raises(MethodError, match="is a link"):
        offline_environment(data)


def test_table_in_the_documentation() -> None:
    """`python -m lmms_eval_accelerate.benchmarks list docs/benchmarks.md` makes it."""
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert text.partition(START)[2].partition(END)[0] == f"\n{markdown_table()}"


def test_the_table_is_installed_with_the_package() -> None:
    assert '"benchmarks/catalog.yaml"' in (ROOT / "lmms-eval" / "pyproject.toml").read_text(encoding="utf-8")


def test_fixtures_can_be_made_again(tmp_path) -> None:
    """The script makes the same documents, pictures and clips (the same bytes, where the encoders are the same)."""
    pytest.importorskip("datasets")
    av, pq = pytest.importorskip("av"), pytest.importorskip("pyarrow.parquet")
    done = subprocess.run(
        [sys.executable, FIXTURES / "build.py", tmp_path], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made = {p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()}
    code = {".py", ".pyc"}
    kept = {p.relative_to(FIXTURES) for p in FIXTURES.rglob("*") if p.is_file() and p.suffix not in code}
    assert made == kept - {Path("README.md")}
    for path in sorted(made):
        old, new = FIXTURES / path, tmp_path / path
        if path.suffix == ".parquet":
            tables = [pq.read_table(file) for file in (old, new)]
            assert tables[0].schema == tables[1].schema
            assert without_bytes(tables[0].to_pylist()) == without_bytes(tables[1].to_pylist())
        elif path.suffix == ".mp4":
            clips = []
            for file in (old, new):
                with av.open(str(file)) as container:
                    clips.append([f.to_ndarray(format="gray").mean() for f in container.decode(video=0)])
            assert len(clips[0]) == 16 and clips[0] == pytest.approx(clips[1], abs=2)
        elif path.suffix != ".jpg":
            assert old.read_bytes() == new.read_bytes()


def without_bytes(value):
    """Encoded pictures replaced by their size."""
    if isinstance(value, dict):
        if value.keys() == {"bytes", "path"}:
            return picture(value["bytes"])
        return {k: without_bytes(v) for k, v in value.items()}
    return [without_bytes(v) for v in value] if isinstance(value, list) else value


def picture(content: bytes) -> tuple:
    image = Image.open(io.BytesIO(content)).convert("RGB")
    # anti-aliasing may differ between versions of Pillow, what is drawn does not
    return image.size, tuple(np.round(np.asarray(image).mean(axis=(0, 1)) / 4))


def test_fixtures_are_small() -> None:
    assert sum(p.stat().st_size for p in FIXTURES.rglob("*") if p.is_file()) < 3e6
