"""Frame sampling against text.json, and reading videos that the tests make themselves."""

import json
import wave

import numpy as np
import pytest

from llava import video_utils
from llava.video_utils import load_video, sample_frames, uniform_frame_indices
from tests.support.paths import GOLDEN

TEXT = json.loads((GOLDEN / "base/text.json").read_text(encoding="utf-8"))
FRAMES, FPS = 40, 10


@pytest.mark.parametrize(
    "case", TEXT["frame_sampling"]["cases"], ids=lambda c: f"{c['total_frames']}-{c['frames_upbound']}"
)
def test_fixed_rate_golden(case):
    sample = sample_frames(
        case["total_frames"], case["avg_fps"], case["video_fps"], case["frames_upbound"], case["force_sample"]
    )
    assert sample.indices == case["frame_idx"]
    assert sample.frame_time == case["frame_time"]
    assert sample.video_time == case["video_time"]


@pytest.mark.parametrize("case", TEXT["uniform_sampling"], ids=lambda c: f"{c['num']}-of-{c['total_frames']}")
def test_uniform_golden(case):
    assert uniform_frame_indices(case["total_frames"], case["num"]) == case["frame_idx"]


def test_more_frames_per_second_than_there_are():
    assert sample_frames(5, 2.0, video_fps=30).indices == [0, 1, 2, 3, 4]  # the official step is 0 here and crashes


@pytest.mark.parametrize("args", [(0, 30.0, 1), (5, 0.0, 1), (5, 30.0, 0)])
def test_bad_counts(args):
    with pytest.raises(ValueError, match="positive"):
        sample_frames(*args)
    with pytest.raises(ValueError, match="at least 1"):
        uniform_frame_indices(*((0, 4) if args[0] == 0 else (4, 0)))


# -- reading -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """video.mp4 and .mkv of grey frames (frame i has level 6 i), a damaged one, and two that are no video."""
    av = pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("video")
    for name in ("video.mp4", "video.mkv"):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=FPS)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for i in range(FRAMES):
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 6 * i, np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    data = (folder / "video.mkv").read_bytes()
    (folder / "cut.mkv").write_bytes(data[: len(data) // 2])
    (folder / "text.mp4").write_bytes(b"this is no video" * 50)
    (folder / "empty.mp4").write_bytes(b"")
    return folder


@pytest.fixture(params=["decord", "pyav", "auto"])
def backend(request):
    if request.param != "auto":
        pytest.importorskip(video_utils._READERS[request.param][0])
    return request.param


def _levels(video):
    return video.frames[:, 20, 30, 0].astype(int)


@pytest.mark.parametrize("name", ["video.mp4", "video.mkv"])
def test_reads_the_right_frames(folder, backend, name):
    video = load_video(folder / name, num_frames=4, backend=backend)
    assert video.frames.shape == (4, 48, 64, 3) and video.frames.dtype == np.uint8
    assert (video.total_frames, video.avg_fps) == (FRAMES, FPS)
    assert video.sample.indices == [0, 13, 26, 39]
    assert video.sample.frame_time == "0.00s,1.30s,2.60s,3.90s" and video.sample.video_time == 4.0
    assert np.abs(_levels(video) - 6 * np.array(video.sample.indices)).max() <= 4


def test_rates(folder, backend):
    path = str(folder / "video.mp4")
    assert load_video(path, fps=2, backend=backend).sample.indices == list(range(0, FRAMES, 5))
    assert load_video(path, fps=2, num_frames=3, backend=backend).sample.indices == [0, 19, 39]
    assert load_video(path, fps=1, num_frames=8, backend=backend).sample.indices == [0, 10, 20, 30]
    assert len(load_video(path, fps=1, num_frames=8, force_sample=True, backend=backend).frames) == 8


def test_more_frames_than_the_video_has(folder, backend):
    video = load_video(folder / "video.mp4", num_frames=64, backend=backend)
    assert len(video.frames) == 64 and (np.diff(_levels(video)) >= -4).all()


def test_a_cut_off_file_gives_what_is_there(folder, backend):
    video = load_video(folder / "cut.mkv", num_frames=4, backend=backend)
    assert 0 < video.total_frames < FRAMES
    assert np.abs(_levels(video) - 6 * np.array(video.sample.indices)).max() <= 9


@pytest.mark.parametrize("name", ["text.mp4", "empty.mp4"])
def test_unreadable_files_are_named(folder, backend, name):
    with pytest.raises(OSError, match=rf"cannot read video .*{name}") as caught:
        load_video(folder / name, num_frames=4, backend=backend)
    assert ("pyav" if backend == "auto" else backend) in str(caught.value)  # the reason of every reader tried


def test_a_file_without_pictures(folder, backend):
    with wave.open(str(folder / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(b"\0\0" * 800)
    with pytest.raises(OSError, match=r"cannot read video .*sound.wav"):
        load_video(folder / "sound.wav", num_frames=4, backend=backend)


def test_missing_files(folder, backend):
    with pytest.raises(FileNotFoundError, match=r"nowhere.mp4"):
        load_video(folder / "nowhere.mp4", num_frames=4, backend=backend)
    with pytest.raises(FileNotFoundError):
        load_video(folder, num_frames=4, backend=backend)


def test_no_backend_installed(folder, monkeypatch):
    monkeypatch.setattr(video_utils, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"video.mp4.*decord or av"):
        load_video(folder / "video.mp4", num_frames=4)
    with pytest.raises(ImportError, match="pip install av"):
        load_video(folder / "video.mp4", num_frames=4, backend="pyav")


def test_auto_falls_back(folder, monkeypatch):
    def broken(path, choose):
        raise RuntimeError("decord cannot")

    monkeypatch.setitem(video_utils._READERS, "decord", ("json", broken))  # "installed", but it fails
    assert len(load_video(folder / "video.mp4", num_frames=2).frames) == 2
    with pytest.raises(OSError, match="decord cannot"):
        load_video(folder / "video.mp4", num_frames=2, backend="decord")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "num_frames, fps"),
        ({"num_frames": 0}, "num_frames"),
        ({"fps": 0}, "fps"),
        ({"num_frames": 1, "backend": "x"}, "'x'"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        load_video("any.mp4", **kwargs)
