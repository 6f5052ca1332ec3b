"""Pictures under a method that chooses frames: all rows show what it chose."""

import json
import re

import pytest
import torch

from accelerate_methods.hosts.scorers import ClipScorer
from llava.video_utils import load_video
from tests.visualize.test_visualize import CLIP
from tests.visualize.test_visualize import run as visualize


@pytest.fixture(autouse=True)
def later_is_better(monkeypatch):
    monkeypatch.setattr(ClipScorer, "load", lambda self: None)
    monkeypatch.setattr(ClipScorer, "read", lambda self, question: question)
    monkeypatch.setattr(ClipScorer, "score", lambda self, frames, question: torch.arange(len(frames)).double())


def test_the_frames_that_were_chosen_are_drawn(tmp_path):
    pytest.importorskip("av")
    every = load_video(CLIP, fps=1).sample
    out = tmp_path / "out.html"
    visualize(
        "--input", CLIP, "--question", "what?", "--frames", 1, "--method", "aks(scorer=clip,mode=top)", "--output", out
    )
    content = json.loads(re.search(r'id="content">(.*?)</script>', out.read_text(encoding="utf-8"), re.S)[1])
    (panel,) = content["panels"]
    assert f"{every.indices[-1] / round(load_video(CLIP, fps=1).avg_fps):.1f}" in panel["caption"]


def test_two_methods_that_choose_frames_are_drawn_one_by_one(tmp_path, capsys):
    with pytest.raises(SystemExit):
        visualize(
            "--input", CLIP, "--question", "what?", "--frames", 2, "--output", tmp_path / "out.png",
            "--method", "aks(scorer=clip,mode=top)", "--method", "aks(scorer=clip,mode=bin)",
        )  # fmt: skip
    assert "several methods choose the frames" in capsys.readouterr().err
