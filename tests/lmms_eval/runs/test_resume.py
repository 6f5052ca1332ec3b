"""Interrupted runs: answers are kept as they come, found again by what was asked, and never those of another run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("lmms_eval")
pytest.importorskip("lmms_eval_accelerate")

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval_accelerate.models.costs import Costs
from lmms_eval_accelerate.models.journal import Journal
from lmms_eval_accelerate.models.question import Likelihood
from lmms_eval_accelerate.runs import folder as runs
from lmms_eval_accelerate.runs import series
from lmms_eval_accelerate.runs.folder import RunError, RunFolder

from tests.support.lmms_tasks import document, standard_tasks, write_tasks, write_video
from tests.support.paths import CHECKPOINTS


def request(doc_id: int, context: str = "What?", kind: str = "generate_until", **gen_kwargs) -> Instance:
    metadata = {"task": "clips", "doc_id": doc_id, "repeats": 1}
    return Instance(kind, (context, gen_kwargs, print, doc_id, "clips", "test"), 0, metadata)


def test_answers_come_back_with_their_costs(tmp_path):
    first, second = request(0), request(1)
    journal = Journal(tmp_path, rank=0)
    costs = Costs(input_tokens=7, output_tokens=2, extra={"prefill_ms": 1.5, "warmup": True})
    keys = journal.keys([first, second])
    journal.add([(keys[0], GenerationResult("ü left", costs)), (keys[1], Likelihood(0.25, True))])
    later = Journal(tmp_path, rank=1)  # another number of processes
    answer = later.find(keys[0])
    assert (answer.text, answer.token_counts) == ("ü left", costs)
    assert tuple(later.find(keys[1])) == (0.25, True) and isinstance(later.find(keys[1]), Likelihood)


def test_another_question_is_another_answer(tmp_path):
    journal = Journal(tmp_path, rank=0)
    asked = [
        *(request(0), request(1), request(0, "Which?"), request(0, max_new_tokens=4)),
        request(0, kind="loglikelihood"),
    ]
    keys = journal.keys(asked)
    assert len(set(keys)) == len(asked)
    journal.add([(keys[0], GenerationResult("left"))])
    assert [Journal(tmp_path, 0).find(k) is not None for k in keys] == [True, False, False, False, False]
    twice = journal.keys([request(0), request(0)])  # repeats: each gets an answer of its own
    assert twice[0] == keys[0] and twice[1] != keys[0]


def test_a_line_that_was_cut_off_is_answered_again_and_spoils_nothing(tmp_path):
    journal = Journal(tmp_path, rank=0)
    keys = journal.keys([request(0), request(1), request(2)])
    journal.add([(keys[0], GenerationResult("a")), (keys[1], GenerationResult("b"))])
    file = tmp_path / "rank0.jsonl"
    file.write_bytes(file.read_bytes()[:-5] + "猫".encode()[:1])  # also inside a character
    again = Journal(tmp_path, rank=0)
    assert again.find(keys[0]).text == "a" and again.find(keys[1]) is None
    again.add([(keys[2], GenerationResult("c"))])
    assert Journal(tmp_path, rank=0).find(keys[2]).text == "c"


def test_answers_with_unusual_line_ends_and_skipped_ones(tmp_path):
    journal = Journal(tmp_path, rank=0)
    keys = journal.keys([request(0), request(1)])
    skipped = Costs(extra={"skipped": True, "error": "no file"})
    journal.add([(keys[0], GenerationResult("a\u2028b\x85c")), (keys[1], GenerationResult("", skipped))])
    again = Journal(tmp_path, rank=0)
    assert again.find(keys[0]).text == "a\u2028b\x85c"
    assert again.find(keys[1]) is None  # its video may be there now


def test_without_a_folder_nothing_is_kept():
    journal = Journal(None, rank=0)
    assert journal.keys([request(0)]) == [None] and journal.find(None) is None
    journal.add([(None, GenerationResult("a"))])


def test_a_run_is_resumed_only_with_its_own_arguments(tmp_path, monkeypatch):
    arguments = ["--tasks", "a"]
    begun = RunFolder.claim(str(tmp_path / "x"), "name", 0, arguments)
    with pytest.raises(RunError, match="still going on"):
        RunFolder.claim(str(tmp_path / "x"), "name", 0, arguments, resume=True)
    started = json.loads((tmp_path / "x" / "run.json").read_text())["started"]
    begun.lock.close()  # as if the process had been killed
    with pytest.raises(RunError, match="add --resume"):
        RunFolder.claim(str(tmp_path / "x"), "name", 0, arguments)
    with pytest.raises(RunError, match="begun with other arguments"):
        RunFolder.claim(str(tmp_path / "x"), "name", 0, ["--tasks", "b"], resume=True)
    again = RunFolder.claim(str(tmp_path / "x"), "name", 0, arguments, resume=True)
    assert json.loads((tmp_path / "x" / "run.json").read_text())["started"] == started
    again.failed(ValueError("broken"))
    with pytest.raises(RunError, match="begun with other arguments"):
        RunFolder.claim(str(tmp_path / "x"), "name", 0, ["--tasks", "b"], resume=True)
    RunFolder.claim(str(tmp_path / "x"), "name", 0, arguments, resume=True)
    assert not runs.finished(tmp_path / "x", arguments)
    (tmp_path / "x" / "summary.json").write_text("{}")
    assert runs.finished(tmp_path / "x", arguments)
    with pytest.raises(RunError, match="begun with other arguments"):
        runs.finished(tmp_path / "x", ["--tasks", "b"])
    monkeypatch.setattr(runs, "code_hash", lambda: "other")
    with pytest.raises(RunError, match="another state of the code"):
        runs.finished(tmp_path / "x", arguments)
    with pytest.raises(RunError, match="nothing to resume"):
        RunFolder.claim(str(tmp_path / "x"), "name", 0, arguments, resume=True)


def test_a_failed_run_that_is_started_anew_forgets_its_answers(tmp_path):
    folder = RunFolder.claim(str(tmp_path / "x"), "name", 0, ["a"])
    Journal(folder.answers, 0).add([("k", GenerationResult("a"))])
    folder.failed(ValueError("broken"))
    assert folder.answers.exists()
    assert not RunFolder.claim(str(tmp_path / "x"), "name", 0, ["b"]).answers.exists()


SAME = '{"name": "a", "output_path": "o", "argv": []}'


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"runs": [{"name": "a"}]}', "no json", f'{{"runs": [{SAME}, {SAME}]}}']
)
def test_a_bad_plan_is_refused(tmp_path, content, capsys):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        series.main([str(tmp_path / "plan.json")])
    assert stop.value.code == 2 and "plan.json" in capsys.readouterr().err


# -- for real: killed in the middle ------------------------------------------------------------------------------------

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def write_plan(path: Path, tasks: Path, output: Path) -> Path:
    def run(name: str, more: str) -> dict:
        arguments = f"pretrained={CHECKPOINTS / 'tiny-llava-onevision'},max_frames_num=4{more}"
        argv = ["--model", "llava_onevision_accelerated", "--model_args", arguments]
        argv += ["--tasks", "many_clips", "--include_path", str(tasks), "--batch_size", "2"]
        return {"name": name, "output_path": str(output / name), "argv": argv}

    plan = {"runs": [run("dense", ""), run("fastvid", ",method=fastvid,retention_ratio=0.2")]}
    path.write_text(json.dumps(plan))
    return path


def start(plan: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "lmms_eval_accelerate", "--runs", str(plan)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | ENVIRONMENT,
        start_new_session=True,
    )


def results(folder: Path) -> dict:
    (file,) = folder.rglob("*_samples_many_clips.jsonl")
    samples = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda s: s["doc_id"])
    costs = [s["token_counts"][0] for s in samples]
    return {
        "answers": [s["filtered_resps"] for s in samples],
        "tokens": [c["visual_tokens_after"] for c in costs],
        "tasks": json.loads((folder / "summary.json").read_text())["tasks"],
    }


@pytest.mark.slow
def test_a_killed_plan_goes_on_where_it_stopped(tmp_path):
    tasks = standard_tasks(tmp_path / "tasks")
    clips = [write_video(tasks / f"c{n}.mp4", frames=12, seed=n) for n in range(4)]
    write_tasks(tasks, many_clips=[document(n, video=clips[n % 4], answer=f"{n}") for n in range(60)])
    plan = write_plan(tmp_path / "plan.json", tasks, tmp_path / "out")
    journal = tmp_path / "out" / "fastvid" / "answers" / "rank0.jsonl"
    process = start(plan)
    deadline = time.time() + 400
    while process.poll() is None and time.time() < deadline:
        if journal.exists() and len(journal.read_text().splitlines()) >= 6:
            os.killpg(process.pid, signal.SIGKILL)
            break
        time.sleep(0.02)
    assert process.wait() == -signal.SIGKILL, process.stdout.read()[-3000:]
    kept = len([line for line in journal.read_text().splitlines() if line.endswith("}")])
    assert (tmp_path / "out" / "dense" / "summary.json").exists() and 6 <= kept < 60
    finished = (tmp_path / "out" / "dense" / "summary.json").stat().st_mtime_ns

    again = start(plan)
    printed, _ = again.communicate(timeout=400)
    assert again.returncode == 0, printed[-3000:]
    assert "== run 1/2 is there: dense" in printed and "== run 2/2 done: fastvid" in printed
    assert f"{kept} of 60 answers were given before" in printed
    assert (tmp_path / "out" / "dense" / "summary.json").stat().st_mtime_ns == finished
    assert not (tmp_path / "out" / "fastvid" / "answers").exists()

    whole = start(write_plan(tmp_path / "plan2.json", tasks, tmp_path / "whole"))
    printed, _ = whole.communicate(timeout=400)
    assert whole.returncode == 0, printed[-3000:]
    assert "weights of the run before are used again" in printed
    for name in ("dense", "fastvid"):
        assert results(tmp_path / "out" / name) == results(tmp_path / "whole" / name)
    summary = json.loads((tmp_path / "out" / "fastvid" / "summary.json").read_text())
    assert summary["costs"]["by_task"]["many_clips"]["samples"] == 60
    assert runs.SUMMARY == "summary.json" and summary["task_info"]["many_clips"]["documents"] == 60


def test_weights_are_shared_whatever_memory_they_leave(tmp_path, monkeypatch):
    """With several GPUs per model the free memory at a second run is less by the very weights that it takes over."""
    from types import SimpleNamespace

    from lmms_eval_accelerate.models import loading
    from lmms_eval_accelerate.models.placement import Placement
    from lmms_eval_accelerate.session import session

    values = dict.fromkeys(("pretrained", "device_map", "dtype", "attn_implementation"), None)
    arguments = SimpleNamespace(values=values, family="llava", device_map=None, dtype="float16")
    monkeypatch.setattr(loading, "remeasured", lambda placement: placement)
    loads = []

    def loader(dtype, device_map, max_memory):
        loads.append(max_memory)
        return loading.Loaded(torch.nn.Linear(1, 1), None, None)

    with session(share=True):
        for free in (80, 40):
            place = Placement("cuda:0", (0, 1), "auto", {0: free, 1: free})
            loading.load(arguments, place, loader, {})
        other = Placement("cuda:2", (2, 3), "auto", {2: 80, 3: 80})
        loading.load(arguments, other, loader, {})
    assert loads == [{0: 80, 1: 80}, {2: 80, 3: 80}]
