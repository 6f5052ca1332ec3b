"""Tensor parallelism over two ranks, in engines of several processes. ``VLLM_TWO_RANKS=1`` runs it, in minutes."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from tests.support.served_engines import SETTINGS

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not os.environ.get("VLLM_TWO_RANKS"), reason="minutes; VLLM_TWO_RANKS=1 runs it"),
]


def answers(folder, ranks):
    several = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": str(ROOT)}
    if ranks > 1:
        several["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(ranks)))
    command = [sys.executable, str(ROOT / "tests" / "support" / "served_ranks.py"), str(folder), str(ranks)]
    run = subprocess.run(
        command, env={**os.environ, **SETTINGS, **several}, capture_output=True, text=True, timeout=900
    )
    line = next((line for line in run.stdout.splitlines() if line.startswith("ANSWERS")), None)
    assert line is not None, run.stderr[-3000:]
    return json.loads(line.removeprefix("ANSWERS"))


def test_two_ranks_answer_as_one(tmp_path):
    from tests.support.served_models import llava_1_5

    folder = llava_1_5(tmp_path)
    assert answers(folder, 1) == answers(folder, 2)
