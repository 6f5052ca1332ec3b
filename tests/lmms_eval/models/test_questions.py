"""What the models of the plugin say to methods that look at the question, and to those that choose frames."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch

pytest.importorskip("lmms_eval")
pytest.importorskip("lmms_eval_accelerate")

from lmms_eval_accelerate.models import model_class
from lmms_eval_accelerate.models.arguments import parse
from lmms_eval_accelerate.models.question import asked_of

from accelerate_methods.hosts.scorers import ClipScorer
from accelerate_methods.stages.errors import MethodError
from tests.support import native_processors
from tests.support.clip_checkpoints import clip_folder
from tests.support.lmms_tasks import WORDS, document, evaluate, lines, standard_tasks, write_tasks, write_video
from tests.support.paths import CHECKPOINTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return standard_tasks(tmp_path_factory.mktemp("tasks"))


def made(model_id, arguments):
    return model_class(model_id).create_from_arg_string(arguments)


def listening(model, monkeypatch):
    """What ``generate`` of the model is told, call by call."""
    told, generate = [], model.model.generate

    def heard(*args, **kwargs):
        told.append(kwargs.get("questions"))
        return generate(*args, **kwargs)

    monkeypatch.setattr(model.model, "generate", heard)
    return told


@pytest.mark.parametrize("name", ["llava_cdpruner", "hf_cdpruner"])
def test_the_plain_question_goes_with_the_images(name, folder, tmp_path, monkeypatch):
    native = name.startswith("hf")
    checkpoint = native_processors.llava(tmp_path, "tiny-llava-1.5") if native else CHECKPOINTS / "tiny-llava-1.5"
    tower = clip_folder("tiny-llava-1.5")
    model = made(name, f"pretrained={checkpoint},batch_size=2,visual_token_num=9,text_tower={tower}")
    assert model.settings["adaptations"] == {}
    told = listening(model, monkeypatch)
    results = evaluate(model, ["image", "text"], folder, model_name=name)
    assert {q for call in told for q in call or ()} == set(WORDS[:3])
    assert [line["visual_tokens_after"] for line in lines(results, "image")] == [9] * 3


def test_likelihoods_are_asked_too(folder):
    tower = clip_folder("tiny-llava-1.5")
    arguments = f"pretrained={CHECKPOINTS / 'tiny-llava-1.5'},visual_token_num=9,text_tower={tower}"
    evaluate(made("llava_cdpruner", arguments), ["choice_image"], folder, model_name="llava_cdpruner")


def test_the_question_of_a_document():
    documents = [{"question": " which? "}, {"question": 3}, {"ask": "?"}, "text"]
    assert [asked_of(documents, n, "of the prompt") for n in range(4)] == ["which?", *["of the prompt"] * 3]


@pytest.mark.parametrize("name", ["llava_onevision_aks", "llava_video_aks", "hf_aks"])
def test_frames_are_chosen_by_the_question(name, tmp_path, monkeypatch):
    """A clip of 6 seconds; the scorer likes the later frames."""
    video = [document(1, video=write_video(tmp_path / "clip.mp4", frames=48))]
    tasks = write_tasks(tmp_path / "tasks", video=video)
    asked, shown = [], []

    def score(self, frames, question):
        shown.append(len(frames))
        return torch.arange(len(frames), dtype=torch.float64)

    monkeypatch.setattr(ClipScorer, "load", lambda self: None)
    monkeypatch.setattr(ClipScorer, "read", lambda self, question: asked.append(question))
    monkeypatch.setattr(ClipScorer, "score", score)
    if name == "hf_aks":
        checkpoint, count = native_processors.qwen(tmp_path, "tiny-qwen2.5-vl"), "max_num_frames=4,min_pixels=256"
        count += ",max_pixels=1024"
    else:
        checkpoint, count = CHECKPOINTS / "tiny-llava-onevision", "max_frames_num=4"
        count += ",add_time_instruction=true" if "video" in name else ""
    model = made(name, f"pretrained={checkpoint},{count},scorer=clip,mode=top")
    seen = []
    read = model._read
    monkeypatch.setattr(model, "_read", lambda *request: seen.append(read(*request)) or seen[-1])
    evaluate(model, ["video"], tasks, model_name=name)
    assert asked == [WORDS[1]] and shown == [6]
    (question,) = seen
    if name == "hf_aks":
        assert question.clips[0].metadata["frames_indices"] == [16, 24, 32, 40]
    else:
        assert question.visuals[0].shape[0] == 4
    if name == "llava_video_aks":
        assert "4 frames are uniformly sampled" in question.text and "2.00s,3.00s,4.00s,5.00s" in question.text


def test_one_canvas_for_every_image(folder):
    checkpoint = CHECKPOINTS / "tiny-llava-1.6"
    arguments = f"pretrained={checkpoint},fixed_resolution=672x672,method=cdpruner,visual_token_num=9"
    results = evaluate(made("llava_accelerated", arguments), ["image"], folder, model_name="llava_accelerated")
    assert [line["visual_tokens_after"] for line in lines(results, "image")] == [5 * 9] * 3
    with pytest.raises(MethodError, match="fixed_resolution must be WIDTHxHEIGHT"):
        parse("llava_accelerated", {"pretrained": "somewhere", "fixed_resolution": "672"})
