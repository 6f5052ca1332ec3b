"""Choosing frames where videos are read: scorers, what is decoded, what the model is given."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoProcessor,
    BertTokenizer,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
    BlipProcessor,
    CLIPModel,
)

import accelerate_methods
from accelerate_methods import MethodError
from accelerate_methods.hosts import frame_sampler as module
from accelerate_methods.hosts.frame_sampler import FrameSampler, frame_sampler
from accelerate_methods.hosts.scorers import BlipScorer, ClipScorer, Scorer
from llava.frame_choice import Candidates, FrameSample
from llava.video_utils import load_video
from tests.support.clip_checkpoints import clip_folder
from tests.support.native_models import tree_model
from tests.support.paths import ROOT

CLIP = ROOT / "assets" / "shapes_video" / "clips" / "0004.mp4"
FRAMES = np.random.default_rng(0).integers(0, 255, (5, 40, 60, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def clip():
    return str(clip_folder("tiny-llava-1.5"))


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz?"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": len(words), "encoder_hidden_size": 32, "bos_token_id": 2, "sep_token_id": 3}
    vision = {**sizes, "image_size": 32, "patch_size": 16, "initializer_range": 0.5}
    torch.manual_seed(0)
    model = BlipForImageTextRetrieval(BlipConfig(text_config={**text, "initializer_range": 0.5}, vision_config=vision))
    model.save_pretrained(folder)
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return str(folder)


# -- scorers -----------------------------------------------------------------------------------------------------------


def test_clip_scores_are_cosines(clip):
    scorer = ClipScorer(clip)
    scores = scorer.score(FRAMES, scorer.read("what is it?"))
    model, processor = CLIPModel.from_pretrained(clip).eval(), AutoProcessor.from_pretrained(clip)
    inputs = processor(text=["what is it?"], images=list(FRAMES), return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model(**inputs)
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, (out.image_embeds @ out.text_embeds.T)[:, 0].double(), atol=1e-5, rtol=1e-5)
    assert scorer.read("what " * 300).shape == scorer.read("what").shape, "a long question is cut"


def test_blip_scores_are_probabilities_of_a_match(blip):
    scorer = BlipScorer(blip)
    scores = scorer.score(FRAMES, scorer.read("what is it?"))
    assert scores.shape == (5,) and ((scores > 0) & (scores < 1)).all() and len(scores.unique()) == 5
    one = torch.cat([scorer.score(FRAMES[i : i + 1], scorer.read("what is it?")) for i in range(5)])
    torch.testing.assert_close(scores, one, atol=1e-6, rtol=1e-6)
    assert scorer.read("a b c d e f g h " * 9)["input_ids"].shape == (1, 35)


def test_a_scorer_that_is_not_there(tmp_path):
    with pytest.raises(MethodError, match="scorer_checkpoint="):
        ClipScorer(str(tmp_path))


# -- choosing ----------------------------------------------------------------------------------------------------------


class Counting(Scorer):
    """Scores a frame by its red; says what it was shown."""

    default = "red"

    def load(self):
        self.shown = 0

    def read(self, question):
        return question

    def score(self, frames, question):
        self.shown += len(frames)
        assert question == "what moves?" and len(frames) <= 32
        return torch.from_numpy(frames[..., 0].mean((1, 2)))


@pytest.fixture
def counting(monkeypatch):
    made = []

    def make(checkpoint, device):
        made.append(Counting(checkpoint, device))
        return made[-1]

    monkeypatch.setattr(module, "scorer_class", lambda name: make)
    return made


def sampler_of(**params):
    return frame_sampler(accelerate_methods.resolve("aks", **params))


@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_the_frames_of_a_file(backend, counting):
    plain = load_video(CLIP, fps=1, backend=backend)
    red = torch.from_numpy(plain.frames[..., 0].mean((1, 2)))
    sampler = sampler_of(mode="top")
    count = len(plain.frames) - 1
    video = load_video(CLIP, num_frames=count, backend=backend, sampler=sampler, question="<image>\nwhat moves?")
    left_out = int(red.argmin())
    kept = [index for i, index in enumerate(plain.sample.indices) if i != left_out]
    assert video.sample.indices == kept and video.frames.shape[0] == count
    assert np.array_equal(video.frames, np.delete(plain.frames, left_out, 0))
    assert video.sample.seconds == [index / round(plain.avg_fps) for index in kept]
    assert counting[0].shown == count + 1, "one candidate per second, and nothing else"


def test_scores_are_kept_for_a_video_and_a_question(counting):
    sampler = sampler_of()
    for _ in range(2):
        load_video(CLIP, num_frames=2, sampler=sampler, question="what moves?")
    load_video(CLIP, num_frames=1, sampler=sampler, question="what moves?")
    assert len(counting) == 1 and counting[0].shown == len(load_video(CLIP, fps=1).frames)


def test_too_few_frames_mean_the_models_own_choice(counting):
    sampler = sampler_of()
    plain = load_video(CLIP, num_frames=16)
    assert load_video(CLIP, num_frames=16, sampler=sampler, question="what moves?").sample == plain.sample
    uniform = load_video(CLIP, num_frames=3, sampler=sampler_of(mode="uni"), question="what moves?")
    assert uniform.sample == load_video(CLIP, num_frames=3).sample


def test_a_stretch_of_a_video(counting):
    """Frames come from where the caller's own choice lies."""
    plain = load_video(CLIP, fps=1)
    first, last = plain.sample.indices[1], plain.sample.indices[-1]

    def choose(total, rate):
        return type(plain.sample)([first, last], [0.0, 1.0], 1.0)

    video = load_video(CLIP, choose=choose, sampler=sampler_of(), question="what moves?")
    assert len(video.frames) == 2 and video.sample.indices[0] >= first


def test_a_damaged_file_gives_what_it_has(counting):
    def read(indices):
        return FRAMES[:0] if indices[0] > 40 else FRAMES[:1].repeat(len(indices), 0)

    picked = sampler_of(mode="top").pick(Candidates("damaged", 400, 1.0, (0, 399), read), "what moves?", 4)
    assert len(picked) == 4 and max(picked) < 64


def test_without_a_question_the_error_names_the_argument():
    with pytest.raises(MethodError, match="question="):
        load_video(CLIP, num_frames=2, sampler=sampler_of())


def test_what_a_method_returns_is_checked(counting):
    class Wrong(type(accelerate_methods.get("aks"))):
        def frames(self, scores, count):
            return torch.tensor([1, 1])

    with pytest.raises(MethodError, match="ascending indices"):
        FrameSampler(Wrong()).pick(Candidates("v", 90, 30.0, (0, 89), lambda i: FRAMES[:1]), "what moves?", 2)


def test_attached_methods_bring_their_sampler(clip):
    model = tree_model("tiny-llava-onevision")
    with accelerate_methods.accelerate(
        model, "aks+fastvid", **{"aks.scorer": "clip", "aks.scorer_checkpoint": clip, "fastvid.retention_ratio": 0.5}
    ) as acceleration:
        video = load_video(CLIP, num_frames=2, sampler=acceleration.frame_sampler, question="what moves?")
        assert len(video.frames) == 2
    with accelerate_methods.accelerate(model, "downsample") as acceleration:
        assert acceleration.frame_sampler is None
    with pytest.raises(MethodError, match="video only"):
        accelerate_methods.accelerate(tree_model("tiny-llava-1.5"), "aks")


# -- fewer of them -----------------------------------------------------------------------------------------------------


def fewer(**params):
    return frame_sampler(accelerate_methods.resolve("fewer_frames", **params))


@pytest.mark.parametrize(
    ("params", "count", "left"),
    [
        ({"retention_ratio": 0.25}, 32, 8),
        ({"retention_ratio": 0.1}, 32, 3),  # rounded down
        ({"retention_ratio": 0.1}, 4, 1),  # at least one
        ({"retention_ratio": 1.0}, 32, 32),
        ({"num_frames": 5}, 32, 5),
        ({"num_frames": 40}, 32, 32),
    ],
)
def test_fewer_frames_are_the_models_own_choice_of_that_many(params, count, left):
    video = load_video(CLIP, num_frames=count, sampler=fewer(**params))
    plain = load_video(CLIP, num_frames=left)
    assert video.sample.indices == plain.sample.indices and video.sample.seconds == plain.sample.seconds
    assert np.array_equal(video.frames, plain.frames)
    assert video.sample.of == (None if left == count else count)


def test_fewer_frames_of_a_rate_cover_the_same_stretch():
    plain = load_video(CLIP, fps=4)
    video = load_video(CLIP, fps=4, sampler=fewer(retention_ratio=0.5))
    assert len(video.frames) == len(plain.frames) // 2 and video.sample.of == len(plain.frames)
    assert (video.sample.indices[0], video.sample.indices[-1]) == (plain.sample.indices[0], plain.sample.indices[-1])
    assert video.sample.video_time == plain.sample.video_time


@pytest.mark.parametrize(("ratio", "left"), [(0.25, 2), (0.4, 2), (0.5, 4), (0.05, 2)])
def test_frames_that_a_model_joins_stay_together(ratio, left):
    def choose(total, rate):
        return FrameSample(list(range(8)), [i / rate for i in range(8)], total / rate, group=2)

    assert len(load_video(CLIP, choose=choose, sampler=fewer(retention_ratio=ratio)).frames) == left


def test_a_method_may_not_want_more_frames_than_there_are():
    class More(type(accelerate_methods.get("fewer_frames", num_frames=1))):
        def frame_count(self, count):
            return count + 1

    with pytest.raises(MethodError, match="must return 1 to 4, got 5"):
        load_video(CLIP, num_frames=4, sampler=FrameSampler(More(num_frames=1)))
