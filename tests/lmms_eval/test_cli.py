"""The command lines: exit codes, folders, summaries, two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval")
pytest.importorskip("lmms_eval_accelerate")

from lmms_eval_accelerate import cli
from lmms_eval_accelerate.runs import folder as runs
from lmms_eval_accelerate.runs import summary

from tests.support.lmms_tasks import document, standard_tasks, write_tasks
from tests.support.paths import CHECKPOINTS

MODEL = "llava_onevision_fastvid"
ARGUMENTS = f"pretrained={CHECKPOINTS / 'tiny-llava-onevision'},retention_ratio=0.2,max_frames_num=4"
OURS = ("lmms_eval_accelerate",)
STOCK = ("lmms_eval",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = standard_tasks(tmp_path_factory.mktemp("tasks"))
    bad = folder / "bad.mp4"
    bad.write_bytes(b"this is no video")
    return write_tasks(folder, broken=[document(0, video=bad), document(1, video=folder / "0.mp4")])


def run(module: tuple[str, ...], *arguments: object, processes: int = 1) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", *module, *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.update(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=570)


def options(task: str, folder: Path, *more: object) -> tuple[object, ...]:
    return ("--model", MODEL, "--model_args", ARGUMENTS, "--tasks", task, "--include_path", folder, *more)


def samples_of(path: Path, task: str) -> list[dict]:
    (file,) = path.rglob(f"*_samples_{task}.jsonl")
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(entries, key=lambda e: e["doc_id"])


@pytest.mark.slow
def test_run_leaves_a_summary_and_two_processes_agree_with_one(folder, tmp_path) -> None:
    single = run(OURS, *options("video,text", folder, "--output_path", tmp_path / "one"))
    assert single.returncode == 0, single.stdout[-3000:] + single.stderr[-3000:]
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert summary["n_samples"] == {"video": 3, "text": 3}
    assert summary["tasks"]["video"].keys() == {"exact_match"}
    costs = summary["costs"]["by_task"]["video"]
    assert costs["visual_tokens_before"] == 4 * 196 and costs["visual_tokens_after"] < 0.2 * 4 * 196 + 1
    assert summary["methods"][0]["retention_ratio"] == 0.2 and summary["versions"]["lmms-eval"] == "0.7.3"
    assert json.loads((tmp_path / "one" / "efficiency.json").read_text()) == summary["costs"]

    again = run(OURS, *options("video", folder, "--output_path", tmp_path / "one"))
    assert again.returncode == 2 or again.returncode == 1
    assert "choose another --output_path" in again.stderr

    two = run(OURS, *options("video,text", folder, "--output_path", tmp_path / "two"), processes=2)
    assert two.returncode == 0, two.stdout[-3000:] + two.stderr[-3000:]
    for task in ("video", "text"):
        pairs = zip(samples_of(tmp_path / "one", task), samples_of(tmp_path / "two", task), strict=True)
        assert all(a["doc_id"] == b["doc_id"] and a["filtered_resps"] == b["filtered_resps"] for a, b in pairs)
    shared = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert shared["settings"]["world_size"] == 2
    overall, alone = shared["costs"]["overall"], summary["costs"]["overall"]
    assert overall["samples"] == alone["samples"] == 6
    assert (overall["warmup"], alone["warmup"]) == (2, 1)  # the first call of each process


@pytest.mark.slow
def test_failing_run_says_why_and_exits_with_one(folder, tmp_path) -> None:
    ours = run(OURS, *options("broken", folder, "--output_path", tmp_path / "ours"))
    assert ours.returncode == 1
    assert "the run failed" in ours.stderr and "bad.mp4" in ours.stderr
    assert "bad.mp4" in json.loads((tmp_path / "ours" / "failed.json").read_text())["reason"]
    assert not (tmp_path / "ours" / "summary.json").exists()


@pytest.mark.slow
def test_failing_run_of_the_stock_command_exits_with_one(folder, tmp_path) -> None:
    stock = run(STOCK, *options("broken", folder, "--output_path", tmp_path / "stock"))
    assert stock.returncode == 1
    assert "bad.mp4" in stock.stderr


@pytest.mark.slow
def test_wrong_argument_and_missing_task_fail(folder, tmp_path) -> None:
    typo = list(options("video", folder, "--output_path", tmp_path / "typo"))
    typo[3] = ARGUMENTS.replace("retention_ratio", "retention_ration")
    result = run(OURS, *typo)
    assert result.returncode == 1 and "Did you mean 'retention_ratio'" in result.stderr
    missing = run(OURS, *options("vidio", folder, "--output_path", tmp_path / "missing"))
    assert missing.returncode == 2 and "unknown task 'vidio'. Did you mean 'video'?" in missing.stderr


# -- the same without starting the harness -----------------------------------------------------------------------------


def test_cache_is_refused(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--model", MODEL, "--tasks", "x", "--use_cache", "somewhere"])
    assert stop.value.code == 2 and "--allow_cache" in capsys.readouterr().err


def test_two_runs_never_share_a_folder(tmp_path, monkeypatch) -> None:
    first = runs.RunFolder.claim(str(tmp_path / "x"), "name", 0, [])
    with pytest.raises(runs.RunError, match="belongs to another run"):
        runs.RunFolder.claim(str(tmp_path / "x"), "name", 0, [])
    first.failed(ValueError("no"))
    runs.RunFolder.claim(str(tmp_path / "x"), "name", 0, [])  # a failed run gives its folder up
    monkeypatch.chdir(tmp_path)
    names = {runs.RunFolder.claim(None, "name", 0, []).path for _ in range(3)}
    assert len(names) == 3
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "1_results.json").write_text("{}")
    with pytest.raises(runs.RunError, match="holds the results"):
        runs.RunFolder.claim(str(tmp_path / "old"), "name", 0, [])
    with pytest.raises(runs.RunError, match="','"):
        runs.RunFolder.claim(str(tmp_path / "a,b"), "name", 0, [])


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "no task has results"),
        ({"t": {"alias": "t", "acc,none": "N/A"}}, "task t has no score"),
        ({"t": {"acc,none": float("nan")}}, "acc is NaN"),
    ],
)
def test_results_without_numbers_are_a_failure(values, says) -> None:
    with pytest.raises(runs.RunError, match=says):
        summary.check_scores({"results": values})


def test_answers_that_nobody_scored_have_no_score(capsys, tmp_path) -> None:
    """With --predict_only lmms-eval writes 999 in the place of every score."""
    values = {"alias": "t", "bypass,none": 999, "bypass_stderr,none": "N/A"}
    assert summary.scores(values) == {} and summary.scores({**values, "acc,none": 0.5}) == {"acc": 0.5}
    results = {"results": {"t": values, "u": {"acc,none": 0.5}}, "configs": {"t": {}}}
    assert summary.without_placeholders(results)["results"] == {"t": {"alias": "t"}, "u": {"acc,none": 0.5}}
    assert summary.without_placeholders(None) is None
    report = {"model": "m", "method": None, "tasks": {"t": {}}, "n_samples": {"t": 3}, "warnings": []}
    summary.show({**report, "costs": {"by_task": {}}}, tmp_path)
    shown = capsys.readouterr().out
    assert "no score" in shown and "999" not in shown


@pytest.mark.parametrize(("given", "found"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_that_wait_do_not_spin(given, found, tmp_path) -> None:
    """OpenMP reads that once, when torch is loaded, so nothing may load it before; what a user set stays."""
    (tmp_path / "torch.py").write_text(
        "import os\nprint(os.environ.get('OMP_WAIT_POLICY'))\nclass cuda:\n    is_available = staticmethod(bool)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"} | given
    code = "from lmms_eval_accelerate import cli; cli._prepare_environment()"
    environment["PYTHONPATH"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == f"{found}\n", done.stderr


def test_a_small_model_gets_few_threads(monkeypatch) -> None:
    import torch
    from lmms_eval_accelerate.models import loading

    found = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    with torch.device("meta"):
        loading._use_few_threads(torch.nn.Linear(1000, 1000))
        loading._use_few_threads(torch.nn.Linear(10_000, 10_000))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    loading._use_few_threads(torch.nn.Linear(10, 10))
    assert found == [4, 1]


def test_config_file_of_several_runs_is_refused(tmp_path, capsys) -> None:
    file = tmp_path / "runs.yaml"
    file.write_text("- model: a\n- model: b\n")
    with pytest.raises(SystemExit) as stop:
        cli.main(["--config", str(file)])
    assert stop.value.code == 2 and "describes 2 runs" in capsys.readouterr().err
