"""Whatever is wrong with a document's media is one error that names document and file; ``on_error=skip`` skips it."""

from __future__ import annotations

import io
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, PngImagePlugin

pytest.importorskip("lmms_eval")

from lmms_eval_accelerate.models.clips import Sampling, fitted_image, read_clip
from lmms_eval_accelerate.models.engine import RefusedQuestion
from lmms_eval_accelerate.models.native import HfAccelerated
from lmms_eval_accelerate.models.visuals import (
    UnsupportedVisual,
    VisualError,
    document_visuals,
    frame_files,
    read_frames,
    read_image,
    read_video,
    reading,
    without_media,
)

from accelerate_methods.stages.errors import MethodError
from tests.support import native_processors
from tests.support.lmms_tasks import document, evaluate, lines, write_image, write_tasks, write_video
from tests.support.paths import CHECKPOINTS

WHERE = "task t, split test, doc 3"


def note(path):
    """A picture with a text chunk that is too large for Pillow."""
    info = PngImagePlugin.PngInfo()
    info.add_text("x", "a" * 3_000_000, zip=True)
    Image.new("RGB", (40, 30)).save(path, pnginfo=info)


def damaged(path):
    data = io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (60, 80, 3), dtype=np.uint8)).save(data, "PNG")
    content = bytearray(data.getvalue())
    content[200:260] = bytes(60)
    path.write_bytes(content)


BAD_PICTURES = {
    "bomb": lambda path: Image.new("1", (20000, 20000)).save(path),
    "text chunk": note,
    "damaged": damaged,
    "cut": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"404 not found"),
    "strip": lambda path: Image.new("1", (60000, 1)).save(path),
    "missing": lambda path: None,
}


#: which the harness has Pillow read all the same (``LOAD_TRUNCATED_IMAGES``)
READ_BY_THE_HARNESS = {"text chunk", "damaged"}


@pytest.fixture(params=BAD_PICTURES)
def bad_picture(request, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    path = tmp_path / "bad.png"
    BAD_PICTURES[request.param](path)
    return path


def told(caught, path) -> None:
    message = str(caught.value)
    assert message.startswith(f"{WHERE}: ") and str(path) in message and "\n" not in message


def test_a_bad_picture(bad_picture) -> None:
    with pytest.raises(VisualError) as caught:
        read_image(bad_picture, WHERE)
    told(caught, bad_picture)
    with pytest.raises(VisualError) as caught:
        read_frames([str(bad_picture)] * 3, 2, WHERE)
    told(caught, bad_picture)
    with pytest.raises(VisualError) as caught:
        document_visuals(lambda doc: [Image.open(doc["image"])], [{"image": str(bad_picture)}], 0, WHERE)
    told(caught, bad_picture)


def test_frames_of_two_sizes(tmp_path) -> None:
    paths = [str(write_image(tmp_path / f"{n}.png", size)) for n, size in enumerate([(40, 30), (40, 30), (30, 40)])]
    with pytest.raises(
        VisualError, match=r"frames of a video differ in size: .*0\.png is 40 x 30, .*2\.png is 30 x 40"
    ):
        read_frames(paths, 3, WHERE)
    assert read_frames(paths[:2], 4, WHERE)[0].shape == (4, 30, 40, 3)


def test_shapes_beyond_a_processors_limit(tmp_path) -> None:
    line = write_image(tmp_path / "line.png", (3000, 2))
    with pytest.raises(VisualError) as caught:
        fitted_image(read_image(line, WHERE), Sampling(None, patch=14), WHERE)
    told(caught, line)
    (tmp_path / "frames").mkdir()
    for n in range(3):
        write_image(tmp_path / "frames" / f"{n}.png", (3000, 2))
    with pytest.raises(VisualError) as caught:
        read_clip(str(tmp_path / "frames"), Sampling(2, patch=14), WHERE)
    told(caught, tmp_path / "frames")


def test_pictures_that_were_read_before_stay_readable(tmp_path) -> None:
    assert read_image(write_image(tmp_path / "line.png", (3000, 2)), WHERE).size == (3000, 2)
    assert read_image(Image.new("L", (5, 4)), WHERE).mode == "RGB"


@pytest.mark.parametrize("error", [MethodError("a setting"), ImportError("no decord"), torch.OutOfMemoryError("full")])
def test_what_is_no_fault_of_a_document_is_not_skipped(error) -> None:
    with pytest.raises(type(error)) as caught, reading(WHERE, "image a"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("error", [KeyError("x"), MemoryError(), RecursionError(), SyntaxError("broken PNG file")])
def test_all_kinds_of_errors_are_one(error) -> None:
    message = f"{WHERE}: cannot read image a: {type(error).__name__}"
    with pytest.raises(VisualError, match=message), reading(WHERE, "image a"):
        raise error


# -- by content --------------------------------------------------------------------------------------------------------


def test_a_picture_in_place_of_a_video_is_a_picture(tmp_path) -> None:
    picture = write_image(tmp_path / "a.png", (40, 30)).rename(tmp_path / "a.mp4")
    (found,) = document_visuals(lambda doc: [str(picture)], [{}], 0, WHERE)
    assert found.size == (40, 30)
    with pytest.raises(VisualError, match=r"cannot read video .*a\.mp4: OSError: .*it is a still picture"):
        read_video(str(picture), WHERE, num_frames=4)


def test_paths_of_frames_and_videos_stay_paths(tmp_path) -> None:
    frames = [str(write_image(tmp_path / f"{n}.png", (40, 30))) for n in range(3)]
    clip = str(write_video(tmp_path / "a.mp4"))
    named_as_picture = str(write_video(tmp_path / "b.mp4").rename(tmp_path / "b.jpg"))
    for paths in (frames, [clip], [named_as_picture], [clip, named_as_picture]):
        assert document_visuals(lambda doc, p=paths: p, [{}], 0, WHERE) == paths
    assert frame_files([named_as_picture, clip]) is None


def test_frames_of_an_unusual_suffix(tmp_path) -> None:
    paths = []
    for n in range(3):
        Image.new("RGB", (40, 30), (80 * n, 0, 0)).save(tmp_path / f"{n}.ppm")
        paths.append(str((tmp_path / f"{n}.ppm").rename(tmp_path / f"{n}.frame")))
    assert frame_files(paths) == paths and frame_files([str(tmp_path)]) == paths
    clip = read_clip(paths, Sampling(3), WHERE)
    assert clip.frames[:, 0, 0, 0].tolist() == [0, 80, 160] and clip.metadata["total_num_frames"] == 3
    (tmp_path / "0.frame").write_bytes(b"no picture")
    with pytest.raises(UnsupportedVisual, match="not all pictures"):
        read_clip(paths, Sampling(3), WHERE)


# -- data sets that hold their media -----------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    good = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 0, 0)).save(good, "PNG")
    damaged(tmp_path / "bad.png")
    rows = {
        "image": [
            {"path": "good.png", "bytes": good.getvalue()},
            {"path": "broken.png", "bytes": (tmp_path / "bad.png").read_bytes()[:30]},
        ],
        "question": ["colour?", "colour?"],
    }
    features = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string")})
    return datasets.Dataset.from_dict(rows, features=features)


def test_an_embedded_picture_is_named(dataset) -> None:
    assert document_visuals(lambda doc: [doc["image"]], dataset, 0, WHERE)[0].size == (64, 48)
    with pytest.raises(VisualError, match=rf"{WHERE}: .*\(broken\.png\)"):
        document_visuals(lambda doc: [doc["image"]], dataset, 1, WHERE)


def test_a_document_without_its_media(dataset) -> None:
    assert without_media(dataset, 1) == {"image": None, "question": "colour?"}
    assert without_media(dataset, 0)["image"].size == (64, 48)
    with pytest.raises(IndexError):
        without_media([], 1)


# -- whole runs --------------------------------------------------------------------------------------------------------

CHECKPOINT = {"llava": "tiny-llava-1.5", "llava_onevision": "tiny-llava-onevision", "llava_video": "tiny-llava-video"}
_TASK = """
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
task: {name}
test_split: test
output_type: generate_until
doc_to_visual: !function embedded.doc_to_visual
doc_to_text: !function embedded.doc_to_text
doc_to_target: question
generation_kwargs: {{max_new_tokens: 2}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def model_args(family: str, more: str = "") -> str:
    frames = "" if family == "llava" else ",max_frames_num=2"
    return f"pretrained={CHECKPOINTS / CHECKPOINT[family]}{frames}{more}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks of pictures and of videos, each with good documents at both ends and all that can be wrong between them."""
    folder = tmp_path_factory.mktemp("media")
    good, clip = write_image(folder / "good.png", (64, 48)), write_video(folder / "good.mp4")
    pictures, videos = [], []
    for name, make in ((n, m) for n, m in BAD_PICTURES.items() if n not in READ_BY_THE_HARNESS):
        path = folder / f"{name.replace(' ', '_')}.png"
        make(path)
        pictures.append(path)
        videos.append(path)
    for name, content in (("cut.mp4", clip.read_bytes()[:200]), ("empty.mp4", b""), ("text.mp4", b"404" * 50)):
        (folder / name).write_bytes(content)
        videos.append(folder / name)
    (folder / "mixed").mkdir()
    write_image(folder / "mixed" / "0.png", (40, 30))
    write_image(folder / "mixed" / "1.png", (30, 40))
    videos += [folder / "mixed", folder / "none.mp4"]
    return write_tasks(
        folder / "tasks",
        pictures=[document(n, (path,)) for n, path in enumerate([good, *pictures, good])],
        videos=[document(n, video=path) for n, path in enumerate([clip, *videos, clip])],
        picture_as_video=[document(0, video=good), document(1, (good,))],
    )


def skipped(results, task: str) -> list[str | None]:
    return [line.get("error") if line.get("skipped") else None for line in lines(results, task)]


@pytest.mark.parametrize(
    ("family", "task"),
    [("llava", "pictures"), ("llava_onevision", "pictures"), ("llava_onevision", "videos"), ("llava_video", "videos")],
)
def test_a_run_skips_all_of_it_and_answers_the_rest(family, task, folder) -> None:
    args = model_args(family, ",on_error=skip")
    results = evaluate(f"{family}_accelerated", [task], folder, model_args=args, batch_size=3)
    first, *bad, last = skipped(results, task)
    assert first is None and last is None and all(bad) and len(bad) >= 6
    for number, message in enumerate(bad, 1):
        assert f"task {task}, split test, doc {number}: " in message and str(folder.parent) in message
        assert "\n" not in message


def test_without_skip_that_line_ends_the_run(folder) -> None:
    with pytest.raises(VisualError, match=rf"^task pictures, split test, doc \d: .*{folder.parent}/\w+\.png"):
        evaluate("llava_accelerated", ["pictures"], folder, model_args=model_args("llava"))


@pytest.mark.parametrize("family", CHECKPOINT)
def test_a_picture_in_a_video_task_is_asked_about_as_a_picture(family, folder) -> None:
    args = model_args(family)
    results = evaluate(f"{family}_accelerated", ["picture_as_video"], folder, model_args=args)
    as_video, as_image = lines(results, "picture_as_video")
    assert as_video["visual_tokens_before"] == as_image["visual_tokens_before"]


def test_media_that_a_model_does_not_read_are_skipped_too(folder) -> None:
    args = model_args("llava", ",on_error=skip")
    results = evaluate("llava_accelerated", ["videos"], folder, model_args=args, limit=1)
    assert "doc 0: the family llava reads images, not videos" in skipped(results, "videos")[0]


def test_a_fault_of_the_setting_is_no_fault_of_the_documents(folder, monkeypatch) -> None:
    from lmms_eval_accelerate.models import families

    def fails(*_):
        raise ValueError("no such mode")

    monkeypatch.setattr(families, "process_images", fails)
    with pytest.raises(MethodError, match="cannot be prepared for this model: no such mode"):
        evaluate("llava_accelerated", ["pictures"], folder, model_args=model_args("llava", ",on_error=skip"))


def test_embedded_pictures(dataset, tmp_path) -> None:
    """A data set that holds its pictures: harness and task decode them, and name them badly."""
    dataset.to_parquet(tmp_path / "data.parquet")
    (tmp_path / "embedded.py").write_text(
        "def doc_to_visual(doc):\n    return [doc['image'].convert('RGB')]\n\n\n"
        "def doc_to_text(doc):\n    return doc['question']\n"
    )
    (tmp_path / "embedded.yaml").write_text(_TASK.format(data=tmp_path / "data.parquet", name="embedded"))
    # as on the command line: without it the harness itself decodes the pictures again when it scores
    cli = Namespace(process_with_media=False)
    args = model_args("llava", ",on_error=skip")
    results = evaluate("llava_accelerated", ["embedded"], tmp_path, model_args=args, cli_args=cli)
    good, bad = skipped(results, "embedded")
    assert good is None and "task embedded, split test, doc 1: " in bad and "broken.png" in bad


# -- a processor that refuses ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return native_processors.qwen(tmp_path_factory.mktemp("checkpoints"), "tiny-qwen2.5-vl")


def hf_args(checkpoint, more: str = ",on_error=skip") -> str:
    return f"pretrained={checkpoint},max_num_frames=2,min_pixels=256,max_pixels=1024{more}"


@pytest.mark.parametrize("task", ["pictures", "videos"])
def test_a_native_run_skips_all_of_it(task, folder, qwen) -> None:
    results = evaluate("hf_accelerated", [task], folder, model_args=hf_args(qwen), batch_size=3)
    first, *bad, last = skipped(results, task)
    assert first is None and last is None
    for number, message in enumerate(bad, 1):
        assert f"task {task}, split test, doc {number}: " in message and str(folder.parent) in message
        assert "\n" not in message


def test_a_native_model_sees_a_picture_in_a_video_task(folder, qwen) -> None:
    results = evaluate("hf_accelerated", ["picture_as_video"], folder, model_args=hf_args(qwen))
    as_video, as_image = lines(results, "picture_as_video")
    assert as_video["visual_tokens_before"] == as_image["visual_tokens_before"]


def test_of_a_batch_only_the_refused_question_is_skipped(tmp_path, qwen, monkeypatch) -> None:
    """Processors see a batch at once, and fail with errors that name nothing."""
    good, odd = (write_image(tmp_path / name, size) for name, size in (("good.png", (64, 64)), ("odd.png", (32, 96))))
    tasks = write_tasks(tmp_path / "tasks", batch=[document(n, (p,)) for n, p in enumerate([good, odd, good, good])])
    made = HfAccelerated._inputs

    def refuses(self, questions):
        if any(image.size[1] > 2 * image.size[0] for question in questions for image in question.images):
            raise RuntimeError("shapes\ndo not fit")
        return made(self, questions)

    monkeypatch.setattr(HfAccelerated, "_inputs", refuses)
    results = evaluate("hf_accelerated", ["batch"], tasks, model_args=hf_args(qwen), batch_size=4)
    found = skipped(results, "batch")
    assert [message is None for message in found] == [True, False, True, True]
    assert found[1].startswith("task batch, split test, doc 1 (") and "RuntimeError: shapes do not fit" in found[1]
    with pytest.raises(RefusedQuestion, match=r"doc 1 .*shapes do not fit"):
        evaluate("hf_accelerated", ["batch"], tasks, model_args=hf_args(qwen, ""), batch_size=4)


def test_errors_that_are_no_questions_are_raised_as_they_are(folder, qwen, monkeypatch) -> None:
    def fails(self, questions):
        raise MethodError("a setting")

    monkeypatch.setattr(HfAccelerated, "_inputs", fails)
    with pytest.raises(MethodError, match="a setting"):
        evaluate("hf_accelerated", ["pictures"], folder, model_args=hf_args(qwen), limit=1)
