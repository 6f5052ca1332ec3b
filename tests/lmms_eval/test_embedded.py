"""The embedded model and tasks: all there in a checkout, one clear line where they are not."""

from __future__ import annotations

import pytest

pytest.importorskip("lmms_eval_accelerate")

from lmms_eval_accelerate import embedded
from lmms_eval_accelerate.benchmarks.catalog import BENCHMARKS

from accelerate_methods.stages.errors import MethodError


def test_a_checkout_has_everything():
    embedded.require_model()
    embedded.require_tasks(",".join(embedded.QUESTIONS))
    embedded.require_tasks(["videomme", "no_task_of_ours"])
    assert set(embedded.QUESTIONS) == {b.task for b in BENCHMARKS.values() if b.embedded}


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """As if the plugin had been installed without its checkout."""
    monkeypatch.setattr(embedded, "MODEL", tmp_path / "tiny")
    monkeypatch.setattr(embedded, "QUESTIONS", {name: tmp_path / name for name in embedded.QUESTIONS})


def test_what_is_missing_is_said_in_one_line(installed):
    from lmms_eval_accelerate.compare import cli as compare

    for ask in (embedded.require_model, lambda: embedded.require_tasks("videomme, shapes_video")):
        with pytest.raises(MethodError, match=r"missing .*pip install -e lmms-eval") as error:
            ask()
        assert "\n" not in str(error.value)
    with pytest.raises(SystemExit, match="the embedded model is missing"):
        compare.main([])
    with pytest.raises(SystemExit, match="questions of task easy_vqa are missing"):
        compare.main(["--pretrained", "x", "--tasks", "easy_vqa"])


def test_a_run_of_an_embedded_task_says_so_too(installed):
    pytest.importorskip("lmms_eval")
    from lmms_eval_accelerate.runs.evaluation import own_options

    with pytest.raises(MethodError, match="questions of task shapes_video are missing"):
        own_options(["--model", "m", "--tasks", "videomme,shapes_video"])
