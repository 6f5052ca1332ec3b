"""Frame sampling against text.json, and reading videos that the tests make themselves."""

import json
import shutil
import struct
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava import video_utils
from llava.media_kind import is_picture, kind_of
from llava.video_rotation import rotation_of
from llava.video_utils import load_video, sample_frames, uniform_frame_indices
from tests.support.paths import GOLDEN, ROOT

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


# -- rotation in the header --------------------------------------------------------------------------------------------

CODECS = {
    "libx264": ("mp4", "yuv420p"),
    "libx265": ("mp4", "yuv420p"),
    "libvpx-vp9": ("mp4", "yuv420p"),
    "libaom-av1": ("mp4", "yuv420p"),
    "mpeg4": ("mov", "yuv420p"),
    "mjpeg": ("mov", "yuvj420p"),
}
# the four numbers that turn, in the order of the file
MATRICES = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}
UPRIGHT = np.zeros((64, 128, 3), np.uint8)
UPRIGHT[:32, :64], UPRIGHT[:32, 64:], UPRIGHT[32:, :64] = (250, 30, 30), (30, 250, 30), (30, 30, 250)


def clip(path, codec="libx264", pixels="yuv420p", tag=None):
    """Five frames, of which the upper left quarter is red, the upper right green, the lower left blue."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 64, pixels
        if tag:
            stream.metadata["rotate"] = tag
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(UPRIGHT, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """codec -> clip. Written by a process of its own: where decord was imported first, its libvpx stands in the way of
    PyAV's encoder (not of its decoders)."""
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("codecs")
    paths = {codec: folder / f"{codec}.{suffix}" for codec, (suffix, _) in CODECS.items()}
    lines = ["import av, tests.llava.test_video as here", "from pathlib import Path"]
    lines += [
        f"{codec!r} in av.codecs_available and here.clip(Path({str(path)!r}), {codec!r}, {CODECS[codec][1]!r})"
        for codec, path in paths.items()
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, cwd=ROOT, capture_output=True)
    return paths


def turn(path, numbers, box=b"tkhd", place=44):
    """Write a display matrix into the header."""
    data = bytearray(path.read_bytes())
    start = data.index(box) + place
    a, b, c, d = (int(n * 65536) for n in numbers)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def quarters(frame):
    """Colours of the four quarters: R, G, B or K (black), row by row."""
    height, width = frame.shape[:2]
    names = {(1, 0, 0): "R", (0, 1, 0): "G", (0, 0, 1): "B", (0, 0, 0): "K"}
    places = [(y, x) for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    return "".join(names[tuple(int(v > 120) for v in frame[place])] for place in places)


TURNED = {0: "RGBK", 90: "BRKG", 180: "KBGR", 270: "GKRB"}


@pytest.mark.parametrize("degrees", MATRICES)
@pytest.mark.parametrize("codec", CODECS)
def test_frames_are_upright_with_every_reader(tmp_path, clips, backend, codec, degrees):
    if not clips[codec].exists():
        pytest.skip(f"this PyAV has no {codec}")
    path = turn(Path(shutil.copy(clips[codec], tmp_path)), MATRICES[degrees])
    if backend == "decord" and codec == "libaom-av1":
        with pytest.raises(OSError, match="decord"):  # it has no AV1; "auto" goes on with PyAV
            load_video(path, num_frames=2, backend=backend)
        return
    frames = load_video(path, num_frames=2, backend=backend).frames
    assert frames.shape == (2, *((128, 64) if degrees != 180 else (64, 128)), 3)
    assert [quarters(frame) for frame in frames] == [TURNED[degrees]] * 2


# What is no quarter turn is left alone, and a mirror counts as the turn that decord takes it for.
@pytest.mark.parametrize(
    ("numbers", "seen"),
    [
        ((1, 0, 0, 1), 0),
        ((0.7071, 0.7071, -0.7071, 0.7071), 0),
        ((0.0087, 0.99996, -0.99996, 0.0087), 0),
        ((0, 0, 0, 0), 0),
        ((-1, 0, 0, 1), 180),
        ((1, 0, 0, -1), 0),
        ((0, 1, 1, 0), 90),
    ],
)
def test_other_matrices_are_read_as_decord_reads_them(tmp_path, backend, numbers, seen):
    path = turn(clip(tmp_path / "a.mp4"), numbers)
    assert quarters(load_video(path, num_frames=1, backend=backend).frames[0]) == TURNED[seen]


@pytest.mark.parametrize("numbers", MATRICES.values())
def test_the_matrix_of_the_movie_counts_too(tmp_path, backend, numbers):
    path = turn(turn(clip(tmp_path / "a.mp4"), MATRICES[90]), numbers, b"mvhd", 40)
    degrees = 90 + next(k for k, v in MATRICES.items() if v == numbers)
    assert quarters(load_video(path, num_frames=1, backend=backend).frames[0]) == TURNED[degrees % 360]


@pytest.mark.parametrize(("tag", "seen"), [("90", 90), ("270", 270), ("-90", 270), ("33", 0), ("0", 0), ("up", 0)])
def test_tags_of_matroska(tmp_path, backend, tag, seen):
    path = clip(tmp_path / "a.mkv", tag=tag)
    assert quarters(load_video(path, num_frames=1, backend=backend).frames[0]) == TURNED[seen]


def test_what_newer_ffmpeg_alone_knows_is_not_turned(tmp_path, backend):
    """An orientation inside the stream, which PyAV tells of and decord does not see."""
    av = pytest.importorskip("av")
    bitstream = pytest.importorskip("av.bitstream")
    turned = tmp_path / "turned.mp4"
    with av.open(str(clip(tmp_path / "a.mp4"))) as source, av.open(str(turned), "w") as target:
        if not hasattr(target, "add_stream_from_template"):
            pytest.skip("this PyAV copies streams in another way")
        stream = target.add_stream_from_template(source.streams.video[0])
        change = "h264_metadata=rotate=90:display_orientation=insert"
        rewrite = bitstream.BitStreamFilterContext(change, source.streams.video[0], stream)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                for changed in rewrite.filter(packet):
                    changed.stream = stream
                    target.mux(changed)
    with av.open(str(turned)) as container:
        assert next(container.decode(video=0)).rotation == 90
    assert quarters(load_video(turned, num_frames=1, backend=backend).frames[0]) == TURNED[0]


def test_headers_that_cannot_be_read_turn_nothing(tmp_path):
    path = turn(clip(tmp_path / "a.mp4"), MATRICES[90])
    assert rotation_of(path, {}, 1) == 90 and rotation_of(path, {}, 2) == 0
    assert rotation_of(path, {"ROTATE": "180"}, 1) == 180
    data = path.read_bytes()
    for content in (b"", b"\0\0\0\1moov", data[: data.index(b"tkhd") + 20], b"RIFF" + bytes(64)):
        path.write_bytes(content)
        assert rotation_of(path, {}, 1) == 0
    assert rotation_of(tmp_path / "none.mp4", {}, 1) == 0


# -- pictures ----------------------------------------------------------------------------------------------------------

STILL = {
    "a.jpg": "JPEG",
    "a.jfif": "JPEG",
    "noise": "PNG",
    "clip.mp4": "JPEG",
    "a.ppm": "PPM",
    "a.jp2": "JPEG2000",
    "a.avif": "AVIF",
    "a.gif": "GIF",
    "a.webp": "WEBP",
}


def picture(path, kind, frames=1, **how):
    pictures = [Image.fromarray(np.full((48, 64, 3), 40 * i, np.uint8)) for i in range(frames)]
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    more = {"save_all": True, "append_images": pictures[1:]} if frames > 1 else {}
    pictures[0].save(path, format=kind, **more, **how)
    return path


@pytest.mark.parametrize("name", STILL)
def test_a_still_picture_is_no_video(tmp_path, backend, name):
    path = picture(tmp_path / name, STILL[name])
    assert is_picture(path)
    with pytest.raises(OSError, match=f"cannot read video .*{name}: it is a still picture"):
        load_video(path, num_frames=4, backend=backend)


@pytest.mark.parametrize("kind", ["TIFF", "MPO"])
def test_pages_and_views_are_no_frames(tmp_path, kind):
    assert is_picture(picture(tmp_path / "a", kind, frames=3))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF"])
def test_moving_pictures_are_videos(tmp_path, backend, kind):
    path = picture(tmp_path / "a.jpg", kind, frames=6, duration=100)
    assert kind_of(path) == "animation"
    video = load_video(path, num_frames=3, backend=backend)
    assert (video.total_frames, video.avg_fps, video.sample.indices) == (6, 10, [0, 2, 5])
    assert video.frames.shape == (3, 48, 64, 3) and np.abs(_levels(video) - [0, 80, 200]).max() <= 6


def test_moving_pictures_need_no_package_for_videos(tmp_path, monkeypatch):
    monkeypatch.setattr(video_utils, "find_spec", lambda name: None)
    assert len(load_video(picture(tmp_path / "a.gif", "GIF", frames=3), num_frames=2).frames) == 2


def test_frames_of_a_moving_picture_lie_on_white(tmp_path):
    clear, red = Image.new("RGBA", (8, 8), (0, 0, 0, 0)), Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    clear.save(tmp_path / "a.webp", save_all=True, append_images=[red], lossless=True)
    frames = load_video(tmp_path / "a.webp", num_frames=2).frames
    assert frames[:, 0, 0].tolist() == [[255, 255, 255], [255, 0, 0]]


def test_a_video_named_as_a_picture_is_a_video(tmp_path, backend):
    path = clip(tmp_path / "a.mp4").rename(tmp_path / "a.jpg")
    assert kind_of(path) == "video" and not is_picture(path)
    assert len(load_video(path, num_frames=2, backend=backend).frames) == 2


def test_damaged_pictures_are_pictures_and_empty_files_nothing(tmp_path, monkeypatch):
    data = picture(tmp_path / "a.png", "PNG").read_bytes()
    (tmp_path / "cut.dat").write_bytes(data[:20])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    assert kind_of(tmp_path / "cut.dat") == kind_of(tmp_path / "phone.heic") == "picture"
    assert kind_of(tmp_path / "empty.jpg") == kind_of(tmp_path / "none") == kind_of(tmp_path) == "unknown"
    assert is_picture(tmp_path / "empty.jpg")  # by its name: the error is then about a picture
    with pytest.raises(OSError, match=r"cannot read video .*empty\.jpg"):
        load_video(tmp_path / "empty.jpg", num_frames=2)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert kind_of(tmp_path / "a.png") == "picture"  # whoever reads it is told that it is too large
