"""Every stock task of the benchmarks runs offline on the documents of tests/fixtures, from the data to the score."""

from __future__ import annotations

import http.server
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support.paths import ROOT

pytest.importorskip("lmms_eval")
pytest.importorskip("lmms_eval_accelerate")

from lmms_eval_accelerate.benchmarks import check
from lmms_eval_accelerate.benchmarks.catalog import BENCHMARKS, Benchmark, group_metrics, offline_environment, score

FIXTURES = ROOT / "tests" / "fixtures"
CHECKPOINT = ROOT / "tests" / "golden" / "checkpoints" / "tiny-llava-onevision"
HUB = [b for b in BENCHMARKS.values() if not b.embedded]
WITHOUT_JUDGE = [b for b in HUB if not b.needs_judge]
JUDGED = [b for b in HUB if b.needs_judge]
VERDICT = 4
FRAMES = 4


def command(*arguments: object, data: Path, cache: Path, **more: str) -> subprocess.CompletedProcess:
    """A python process in a data folder, offline, on the CPU, without a judge's key unless given."""
    folder, offline = offline_environment(data, cache)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OPENAI_", "API_TYPE", "AZURE_"))}
    environment.update(offline, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", PYTHONPATH=path(), **more)
    process = [sys.executable, *map(str, arguments)]
    return subprocess.run(process, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)


def path() -> str:
    """The module search path of this process: the tests run without an installed project as well."""
    return os.pathsep.join([str(ROOT), str(ROOT / "lmms-eval"), os.environ.get("PYTHONPATH", "")])


def evaluation(tasks: str, output: Path) -> tuple[object, ...]:
    arguments = f"pretrained={CHECKPOINT},method=fastvid,retention_ratio=0.25,max_frames_num={FRAMES}"
    return (
        *("-m", "lmms_eval_accelerate", "--model", "llava_onevision_accelerated", "--model_args", arguments),
        *("--tasks", tasks, "--gen_kwargs", "max_new_tokens=4", "--device", "cpu", "--output_path", output),
    )


def tree(folder: Path) -> dict[str, float]:
    files = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {str(p.relative_to(folder)): p.stat().st_mtime for p in files}


@pytest.fixture(scope="module")
def judge():
    """An OpenAI-like server on this machine that always gives the same verdict; the list of what it was asked."""
    asked: list[dict] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            content = json.dumps({"pred": "yes", "score": VERDICT})
            answer = {"model": "stand-in", "choices": [{"message": {"role": "assistant", "content": content}}]}
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/chat/completions", asked
    server.shutdown()


@pytest.fixture(scope="module")
def run(judge, tmp_path_factory) -> Path:
    """All tasks in one process, straight on the committed fixtures."""
    folder = tmp_path_factory.mktemp("stock")
    before = tree(FIXTURES)
    done = command(
        *evaluation(",".join(b.task for b in HUB), folder / "run"),
        data=FIXTURES,
        cache=folder / "cache",
        OPENAI_API_KEY="stand-in",
        OPENAI_API_URL=judge[0],
        NO_PROXY="127.0.0.1",
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert tree(FIXTURES) == before, "the run wrote into the data folder"
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", HUB, ids=lambda b: b.name)
def test_stock_task_runs_offline(benchmark: Benchmark, run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    metrics = group_metrics(benchmark, summary["tasks"])
    best = {"mme": 2800, "videochatgpt": VERDICT, "ocrbench": 1000}.get(benchmark.name, 100)
    value = score(benchmark, metrics)
    assert math.isfinite(value) and 0 <= value <= best
    counts = {task: len(samples(run, task)) for task in benchmark.tasks}
    assert counts == {task: summary["n_samples"][task] for task in benchmark.tasks}
    assert sum(counts.values()) == check(benchmark, FIXTURES).documents > 0
    for task in benchmark.tasks:
        for sample in samples(run, task):
            costs = sample["token_counts"][0]
            before, after = costs["visual_tokens_before"], costs["visual_tokens_after"]
            # FastVID acts on videos alone: what it did tells what the model was given
            assert 0 < after < before if benchmark.kind == "video" else 0 < after == before
            assert costs["generated_tokens"] == 4


def samples(run: Path, task: str) -> list[dict]:
    (file,) = run.rglob(f"*_samples_{task}.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_the_judge_scores(run: Path, judge) -> None:
    tasks = json.loads((run / "summary.json").read_text())["tasks"]
    activitynet, videochatgpt = BENCHMARKS["activitynetqa"], BENCHMARKS["videochatgpt"]
    assert score(activitynet, group_metrics(activitynet, tasks)) == 100
    # the mean of five aspects, which three tasks ask for
    assert score(videochatgpt, group_metrics(videochatgpt, tasks)) == pytest.approx(VERDICT)
    # one question each; generic documents are asked three, pairs of consistency one
    assert len(judge[1]) == 3 + 2 * 3 + 2 + 2


@pytest.mark.slow
@pytest.mark.parametrize("task", ["activitynetqa", "mme,videochatgpt_temporal", "mmbench_cn_dev"])
def test_without_a_key_a_judged_task_is_refused(task: str, tmp_path: Path) -> None:
    done = command(*evaluation(task, tmp_path / "run"), data=FIXTURES, cache=tmp_path / "cache")
    assert done.returncode != 0
    for text in (task.split(",")[-1], "OPENAI_API_KEY", "OPENAI_API_URL", "MODEL_VERSION"):
        assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> dict:
    """The scores of all right and of all wrong answers."""
    folder = tmp_path_factory.mktemp("known")
    # a copy: without an output folder MMBench writes its submission into the working directory
    data = shutil.copytree(FIXTURES, folder / "data")
    script, target = ROOT / "tests" / "support" / "gold_answers.py", folder / "scores.json"
    done = command(script, target, *(b.task for b in WITHOUT_JUDGE), data=data, cache=folder / "cache")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return json.loads(target.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", WITHOUT_JUDGE, ids=lambda b: b.name)
def test_right_answers_score_full_and_wrong_ones_nothing(benchmark: Benchmark, known: dict) -> None:
    """The documents are such that the task's own scoring works on them, and the unit is that of the papers."""
    right, wrong = (score(benchmark, group_metrics(benchmark, known[k]["tasks"])) for k in ("right", "wrong"))
    # of MME's 14 categories the fixtures have 4, 200 points each; of OCRBench's thousand documents 3
    assert right == pytest.approx({"mme": 800, "ocrbench": 3}.get(benchmark.name, 100))
    assert wrong == 0
    assert all(known["right"]["visuals"][task] > 0 for task in benchmark.tasks)
