"""Several processes, on one machine and on two (on loopback): the answers of one process; and one failure fails all.

Starting the harness takes 20 to 60 s, so that there is one start per test and one more for what they compare with.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval")
pytest.importorskip("lmms_eval_accelerate")

from lmms_eval_accelerate.runs import launch
from lmms_eval_accelerate.runs.launch import Machines, write_plan
from lmms_eval_accelerate.runs.request import Run

from tests.support.lmms_tasks import document, standard_tasks, write_tasks
from tests.support.paths import CHECKPOINTS

pytestmark = pytest.mark.slow
MODEL = f"pretrained={CHECKPOINTS / 'tiny-llava-onevision'},max_frames_num=4"
TASKS = ("video", "mixed")  # 3 and 8 documents: two processes do not get equally many of the first
SETTINGS = {"dense": "", "fastvid": ",method=fastvid,retention_ratio=0.2"}
TIMEOUT = 570

#: a document that ends its process as the system would, without any Python error
_KILLING = """
import os, signal

_read = doc_to_visual

def doc_to_visual(doc):
    if doc["video"] == "KILL":
        os.kill(os.getpid(), signal.SIGKILL)
    return _read(doc)
"""


@pytest.fixture(scope="module", autouse=True)
def _no_gpu():
    """The commands are those of a machine without GPUs, wherever this runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "gpus", lambda: 0)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files; in ``broken`` and ``killed`` it is document 1, hence rank 1, that goes wrong."""
    folder = standard_tasks(tmp_path_factory.mktemp("tasks"))
    (folder / "bad.mp4").write_bytes(b"this is no video")
    good = [document(n, video=folder / f"{n}.mp4") for n in (0, 2)]
    write_tasks(folder, broken=[good[0], document(1, video=folder / "bad.mp4"), *good])
    killing = write_tasks(folder / "killing", killed=[good[0], document(1, video="KILL"), *good])
    with (killing / "utils.py").open("a") as file:
        file.write(_KILLING)
    return folder


def plan(folder: Path, out: Path, tasks: tuple[str, ...], settings: dict[str, str] = SETTINGS) -> list[str]:
    """Arguments that do one run per setting."""
    runs = []
    for name, more in settings.items():
        argv = ("--model", "llava_onevision_accelerated", "--model_args", MODEL + more, "--tasks", ",".join(tasks))
        runs.append(Run(name, out / name, (*argv, "--include_path", str(folder))))
    return ["--runs", str(write_plan(runs, out))]


def start(machines: Machines, arguments: list[str], log: Path) -> subprocess.Popen:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        return subprocess.Popen(
            machines.command(arguments), stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def finish(*processes: subprocess.Popen) -> list[int]:
    """Exit codes; whatever is still running after the time limit is killed and fails the test."""
    end = time.monotonic() + TIMEOUT
    try:
        return [process.wait(max(1.0, end - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def samples_of(run: Path, task: str) -> list[dict]:
    (file,) = run.rglob(f"*_samples_{task}.jsonl")
    return sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda sample: sample["doc_id"])


def compare(alone: Path, shared: Path, processes: int) -> None:
    """The run of several processes equals that of one, document by document."""
    of_one, of_all = (json.loads((run / "summary.json").read_text()) for run in (alone, shared))
    assert len(list(shared.rglob("summary.json"))) == 1
    assert of_all["settings"]["world_size"] == processes and of_one["settings"]["world_size"] == 1
    assert of_all["tasks"] == of_one["tasks"] and of_all["n_samples"] == of_one["n_samples"] == {"video": 3, "mixed": 8}
    for task in TASKS:
        pairs = list(zip(samples_of(alone, task), samples_of(shared, task), strict=True))
        assert [a["doc_id"] for a, _ in pairs] == list(range(of_one["n_samples"][task]))
        for a, b in pairs:
            assert a["doc_id"] == b["doc_id"] and a["filtered_resps"] == b["filtered_resps"]
            (costs,), (same) = b["token_counts"], a["token_counts"][0]
            assert costs["prefill_ms"] > 0 and costs["generate_ms"] > 0
            for key in ("visual_tokens_before", "visual_tokens_after", "prompt_tokens", "llm_tflops", "output_tokens"):
                assert costs[key] == same[key], key
    overall, single = of_all["costs"]["overall"], of_one["costs"]["overall"]
    assert overall["samples"] == single["samples"] == 11
    assert overall["warmup"] == processes * single["warmup"], "the first call of each process"
    assert overall["measured"] == 11 - overall["warmup"]


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """Both settings in one process."""
    out = tmp_path_factory.mktemp("one")
    assert finish(start(Machines(), plan(folder, out, TASKS), out / "log")) == [0], (out / "log").read_text()[-3000:]
    return out


def test_two_processes(folder, alone, tmp_path) -> None:
    log = tmp_path / "log"
    codes = finish(start(Machines(processes=2), plan(folder, tmp_path, TASKS), log))
    printed = log.read_text()
    assert codes == [0], printed[-3000:]
    for setting in SETTINGS:
        compare(alone / setting, tmp_path / setting, 2)
    assert printed.count("weights of the run before are used again") == 2, "loaded once in each process"
    assert printed.count("== run 2/2 done: fastvid") == 1, "one process speaks for all"
    dense, fast = (json.loads((tmp_path / s / "summary.json").read_text())["costs"]["by_task"] for s in SETTINGS)
    assert fast["video"]["visual_tokens_after"] < 0.3 * dense["video"]["visual_tokens_after"]


def two_machines() -> list[Machines]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [Machines(machines=2, machine_rank=rank, main_ip="127.0.0.1", main_port=port) for rank in range(2)]


def test_two_machines(folder, alone, tmp_path) -> None:
    arguments = plan(folder, tmp_path, TASKS, {"fastvid": SETTINGS["fastvid"]})
    logs = [tmp_path / f"log{rank}" for rank in range(2)]
    codes = finish(*map(start, two_machines(), [arguments] * 2, logs))
    assert codes == [0, 0], "".join(log.read_text()[-3000:] for log in logs)
    compare(alone / "fastvid", tmp_path / "fastvid", 2)
    assert ["== run 1/1 done" in log.read_text() for log in logs] == [True, False]


#: the traceback of rank 1, and its message, which names task, document and file
_UNREADABLE = ("Traceback", "VisualError", "task broken, split test, doc 1", "bad.mp4")


@pytest.mark.parametrize(
    ("task", "machines", "says"),
    [
        ("broken", 1, _UNREADABLE),
        ("broken", 2, _UNREADABLE),
        ("killed", 1, ("Signal 9 (SIGKILL)", "rank      : 1 (local_rank: 1)")),
    ],
)
def test_one_process_that_fails_ends_all_of_them(task, machines, says, folder, tmp_path) -> None:
    arguments = plan(folder, tmp_path, (task,), {"dense": ""})
    commands = [Machines(processes=2)] if machines == 1 else two_machines()
    logs = [tmp_path / f"log{rank}" for rank in range(machines)]
    processes = list(map(start, commands, [arguments] * machines, logs))
    while processes[0].poll() is None and "begins: dense" not in logs[0].read_text():
        time.sleep(0.5)
    begun = time.monotonic()
    codes = finish(*processes)
    assert 0 not in codes, "".join(log.read_text()[-3000:] for log in logs)
    for text in says:
        assert text in logs[-1].read_text()
    assert not (tmp_path / "dense" / "summary.json").exists() and "run 1/1 done" not in logs[0].read_text()
    # reading the task list, loading and an answer are in it; waiting for the dead process would take days
    assert time.monotonic() - begun < 240


def test_copies_over_several_gpus_count_as_one_process(monkeypatch) -> None:
    monkeypatch.setattr(launch, "gpus", lambda: 8)
    assert Machines(gpus_per_model=8).command(["x"]) == [sys.executable, "-m", "lmms_eval_accelerate", "x"]
    command = Machines(processes=2, machines=2, main_ip="10.0.0.1", gpus_per_model=4).command(["x"])
    assert command[command.index("--num_processes") + 1] == "4", "two copies on each of two machines"
