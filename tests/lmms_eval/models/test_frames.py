"""Fewer frames at equal tokens in runs: what the model is shown, and the costs, which count what it was spared."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("lmms_eval")

from lmms_eval_accelerate.models.clips import Sampling, fitted
from lmms_eval_accelerate.models.visuals import Choosing, read_frames
from lmms_eval_accelerate.runs.no_op import kept_everything
from PIL import Image

import accelerate_methods
from accelerate_methods.engine.recording import ItemRecord, SampleRecord
from accelerate_methods.hosts.frame_sampler import frame_sampler
from tests.support.lmms_tasks import document, evaluate, lines, write_tasks, write_video
from tests.support.paths import ROOT

MODEL = f"pretrained={ROOT / 'assets' / 'tiny-llava-onevision'},conv_template=qwen_1_5,device=cpu"


def item(tokens: int, rows: int, kind: str = "video") -> ItemRecord:
    return ItemRecord(kind, tokens, tokens, full_length=rows)


@pytest.mark.parametrize(
    ("rows", "dense"),
    [
        (81, 100 + 3 * 80),  # the newline at the end of a video stays one
        (80 + 4 * 5, 100 + 3 * 100),  # one per row of a frame: as many more
        (80, 100 + 3 * 80),
    ],
)
def test_left_out_frames_count_as_uncompressed_tokens(rows, dense):
    sample = SampleRecord(items=[item(7, 7, "image"), item(80, rows)], dense_length=100, length=100)
    sample.count_left_out([(16, 4)])
    assert [i.tokens_before for i in sample.items] == [7, 320] and sample.dense_length == dense
    assert sample.visual_tokens_after == 87 and sample.length == 100
    sample.count_left_out([(16, 16)])
    assert sample.dense_length == dense


def test_frames_that_are_files_are_fewer_too(tmp_path):
    paths = [str(tmp_path / f"{n:02}.png") for n in range(16)]
    for n, path in enumerate(paths):
        Image.new("RGB", (8, 8), (n, 0, 0)).save(path)
    choosing = Choosing(frame_sampler(accelerate_methods.resolve("fewer_frames", retention_ratio=0.3)))
    assert read_frames(paths, 16, "here", choosing)[1] == [0, 5, 10, 15]
    assert read_frames(paths, 16, "here", choosing, group=3)[1] == [0, 7, 15]
    assert choosing.thinned == [(16, 4), (16, 3)] and len(read_frames(paths, 16, "here")[0]) == 16


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Dense and a quarter of the frames, on a video and on an image."""
    folder = tmp_path_factory.mktemp("frames")
    video = write_video(folder / "clip.mp4")
    image = folder / "picture.png"
    Image.new("RGB", (64, 64), "teal").save(image)
    tasks = write_tasks(folder, clips=[document(0, video=video)], pictures=[document(0, images=(image,))])
    made = {}
    for name, more in (("dense", ""), ("fewer", ",method=fewer_frames,retention_ratio=0.25")):
        args = f"{MODEL},max_frames_num=8{more}"
        made[name] = evaluate("llava_onevision_accelerated", ["clips", "pictures"], tasks, model_args=args)
    return {name: {task: lines(r, task)[0] for task in ("clips", "pictures")} for name, r in made.items()}


def test_costs_are_relative_to_all_frames(runs):
    dense, fewer = (runs[name]["clips"] for name in ("dense", "fewer"))
    assert dense["kept"] == 1.0 and fewer["kept"] == 0.25
    assert fewer["visual_tokens_before"] == dense["visual_tokens_before"] == 4 * fewer["visual_tokens_after"]
    assert fewer["prompt_tokens_dense"] == dense["prompt_tokens"] > fewer["prompt_tokens"]
    assert fewer["llm_tflops_dense"] == dense["llm_tflops"] > 3 * fewer["llm_tflops"]


def test_images_are_left_alone(runs):
    dense, fewer = (runs[name]["pictures"] for name in ("dense", "fewer"))
    assert fewer["kept"] == 1.0 and fewer["visual_tokens_before"] == dense["visual_tokens_before"]
    means = {"kept_everything": 1, "with_visual_tokens": 1, "modalities": ["image"]}
    assert "acts on videos only" in kept_everything(means, [{"method": "fewer_frames", "retention_ratio": 0.25}])
    means["modalities"] = ["video"]
    assert kept_everything(means, [{"method": "fewer_frames", "retention_ratio": 0.25}]), "its counts would show it"


def test_frames_that_are_left_do_not_become_larger():
    """Qwen's limit is of a whole video; fewer frames at equal tokens share it with those that were left out."""
    frames = torch.zeros(2, 3, 800, 800)
    how = Sampling(frames=8, total_pixels=8 * 150_000, patch=14)
    alone, of_eight = fitted(frames, how).shape, fitted(frames, how, 8).shape
    assert of_eight[2:] == fitted(torch.zeros(8, 3, 800, 800), how).shape[2:] and of_eight[2] < alone[2]
