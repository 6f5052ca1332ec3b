"""``check`` and ``prepare``: what is on disk, and how it gets there. The hub is a folder on this machine."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.paths import FIXTURES

pytest.importorskip("pyarrow")

from lmms_eval_accelerate.benchmarks import check, contents, layout, prepare, require
from lmms_eval_accelerate.benchmarks.catalog import BENCHMARKS, benchmark
from lmms_eval_accelerate.benchmarks.command import main
from lmms_eval_accelerate.benchmarks.prepare import unpack
from rich.console import Console

from accelerate_methods.stages.errors import MethodError

HUB = [b for b in BENCHMARKS.values() if not b.embedded]
QUIET = Console(quiet=True)
COMMIT = "0123abc"


@pytest.fixture
def data(tmp_path) -> Path:
    return shutil.copytree(FIXTURES, tmp_path / "data", ignore=shutil.ignore_patterns("*.py", "__pycache__"))


@pytest.mark.parametrize("bench", HUB, ids=lambda b: b.name)
def test_check_finds_the_fixtures(bench) -> None:
    finding = check(bench, FIXTURES)
    assert finding.complete and finding.documents > 0
    assert finding.absent == 0 and (finding.videos or 0) == len(videos(bench))
    # a few documents are not the published split, and the user is told
    assert bool(finding.warnings) == (bench.documents is not None)


def videos(bench, data: Path = FIXTURES) -> set[Path]:
    if bench.media is None:
        return set()
    folder = data / "home" / bench.media
    clips = {p for p in folder.rglob("*.mp4")}
    return clips | {p.parent for p in folder.rglob("*.jpg")}


@pytest.mark.parametrize("bench", [b for b in HUB if b.media], ids=lambda b: b.name)
def test_check_misses_a_video(bench, data) -> None:
    gone = sorted(p for p in videos(bench, data) if p.is_file())[0]
    gone.unlink()
    finding = check(bench, data)
    assert not finding.complete and finding.absent == 1
    assert str(gone) in finding.missing[0]


def test_check_misses_annotations(data, capsys) -> None:
    (data / "lmms-lab-encoder/GQA/testdev_balanced_images/testdev-00000-of-00001.parquet").unlink()
    (finding,) = check(benchmark("gqa"), data).missing
    assert "testdev_balanced_images/testdev-*.parquet" in finding
    shutil.rmtree(data / "lmms-eval/egoschema")
    assert main(["check", "--data", str(data), "gqa", "egoschema_subset", "mme"]) == 1
    out = capsys.readouterr().out
    assert str(data / "lmms-eval/egoschema") in out and "incomplete" in out
    assert main(["check", "--data", str(data), "mme"]) == 0
    assert "8 documents, the published split 2374" in capsys.readouterr().out


def test_missing_data_is_an_error_before_a_run(data) -> None:
    require(HUB, data)
    shutil.rmtree(data / "sy1998")
    with pytest.raises(MethodError, match=r"mlvu_dev: .*sy1998.*prepare.sh --data .* mlvu_dev$"):
        require([benchmark("mme"), benchmark("mlvu_dev")], data)


def test_environment_for_a_shell(capsys) -> None:
    assert main(["env", "--data", str(FIXTURES)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"export HF_HOME={FIXTURES / 'home'}" in lines and lines[-1] == f"cd {FIXTURES}"
    assert main(["env", "--data", str(FIXTURES / "nowhere")]) == 1


def test_check_names_a_wrong_name(capsys) -> None:
    assert main(["check", "videomm"]) == 2
    assert "Did you mean 'videomme'" in capsys.readouterr().err


def test_errors_of_the_command_are_one_line(tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "file").write_bytes(b"\xff\xfe\x00")
    for words in (["prepare", "--data", str(tmp_path / "file"), "videomme"], ["list", str(tmp_path / "file")],
                  ["list", str(tmp_path / "nowhere")]):  # fmt: skip
        assert main(words) == 1
        said = capsys.readouterr().err
        assert (said.startswith("error: ") and said.count("\n") == 1 and str(tmp_path) in said) or "decode" in said

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("lmms_eval_accelerate.benchmarks.command.prepare", interrupted)
    assert main(["prepare", "--data", str(tmp_path / "new"), "videomme"]) == 130
    assert "goes on where it stopped" in capsys.readouterr().err


def test_check_without_a_data_folder_looks_into_the_hubs_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    bench = benchmark("mvbench")
    assert "not in the hub's cache" in check(bench).missing
    repository = tmp_path / "hub" / "datasets--OpenGVLab--MVBench"
    shutil.copytree(FIXTURES / bench.dataset, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "video").write_text("abc")
    assert check(bench).absent == 20
    # as lmms-eval leaves it; it asks the hub at every start
    (tmp_path / bench.media).symlink_to(FIXTURES / "home" / bench.media)
    finding = check(bench)
    assert finding.complete and any("is a link" in warning for warning in finding.warnings)


def test_embedded_benchmarks_need_nothing() -> None:
    pytest.importorskip("lmms_eval_accelerate")
    for bench in (b for b in BENCHMARKS.values() if b.embedded):
        finding = check(bench, FIXTURES)
        assert finding.complete and finding.documents == bench.documents
        prepare(bench, FIXTURES / "never written", QUIET)


class Hub:
    """Stands for functions of ``huggingface_hub``: data sets as they are published, archives included."""

    def __init__(self, folder: Path):
        self.folder, self.calls = folder, []
        for bench in HUB:
            remote = folder / bench.dataset
            if not remote.exists():
                shutil.copytree(FIXTURES / bench.dataset, remote)
                # the hub's card names splits that nobody needs here
                block = "- config_name: default\n  data_files:\n  - {split: train, path: data/train-*}\n"
                (remote / "README.md").write_text(f"---\nconfigs:\n{block}---\n")
            if bench.media:
                self._archive(bench, FIXTURES / "home" / bench.media, remote)

    @staticmethod
    def _archive(bench, media: Path, remote: Path) -> None:
        files = sorted(p for p in media.rglob("*") if p.is_file())
        if bench.name == "longvideobench_val_v":  # one tar file in parts, as published
            with tarfile.open(remote / "videos.tar", "w") as archive:
                for file in files:
                    archive.add(file, file.relative_to(media))
            content = (remote / "videos.tar").read_bytes()
            (remote / "videos.tar").unlink()
            for n, letter in enumerate("abc"):
                third = len(content) // 3 + 1
                (remote / f"videos.tar.part.a{letter}").write_bytes(content[n * third : (n + 1) * third])
        elif bench.name == "mlvu_dev":  # not archived
            for file in files:
                shutil.copy(file, remote)
        else:
            for n in range(2):
                with zipfile.ZipFile(remote / f"videos_chunked_{n:02d}.zip", "w") as archive:
                    for file in files[n::2]:
                        # MVBench has some of its folders below another
                        inside = "data0613/" if bench.name == "mvbench" and "star" in file.parts else ""
                        archive.write(file, f"{inside}{file.relative_to(media)}")

    def info(self, dataset, revision):
        self.calls.append((dataset, revision))
        return SimpleNamespace(sha=COMMIT)

    def download(self, dataset, repo_type, revision, local_dir, allow_patterns):
        from huggingface_hub.utils import filter_repo_objects

        assert repo_type == "dataset" and revision == COMMIT
        names = [p.relative_to(self.folder / dataset).as_posix() for p in (self.folder / dataset).rglob("*")]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            source, target = self.folder / dataset / name, Path(local_dir) / name
            if source.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.dataset_info", hub.info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.download)
    return hub


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in files}


@pytest.mark.parametrize("bench", HUB, ids=lambda b: b.name)
def test_prepared_data_is_what_the_tasks_look_for(bench, hub, tmp_path) -> None:
    data = tmp_path / "data"
    prepare(bench, data, QUIET)
    finding = check(bench, data)
    assert finding.complete and finding.documents == check(bench, FIXTURES).documents
    assert set(hub.calls) == {(bench.dataset, bench.revision)}
    # annotations lie where `datasets` finds them, under a card that names nothing else
    card = (data / bench.dataset / "README.md").read_text()
    assert "data/train-*" not in card and bench.split in card and COMMIT in card
    assert not list((data / bench.dataset).rglob("*.zip")) + list((data / bench.dataset).rglob("*.mp4"))
    before = listing(data / "home") if bench.media else {}
    prepare(bench, data, QUIET)
    assert (listing(data / "home") if bench.media else {}) == before


def test_card_of_two_benchmarks_on_one_data_set(hub, tmp_path) -> None:
    data = tmp_path / "data"
    card = data / "lmms-lab-encoder/MMBench/README.md"
    prepare(benchmark("mmbench_cn_dev_static"), data, QUIET)
    assert "cn/dev-*" in card.read_text() and "en/dev-*" not in card.read_text()
    assert not check(benchmark("mmbench_en_dev_static"), data).complete
    prepare(benchmark("mmbench_en_dev_static"), data, QUIET)
    assert card.read_text().startswith((FIXTURES / "lmms-lab-encoder/MMBench/README.md").read_text())


def test_prepare_goes_on_after_an_interruption(hub, tmp_path, monkeypatch) -> None:
    bench, data = benchmark("videomme"), tmp_path / "data"
    extract, done = zipfile.ZipFile.extract, []

    def interrupted(self, member, *rest):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(member)
        return extract(self, member, *rest)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(zipfile.ZipFile, "extract", interrupted)
        prepare(bench, data, QUIET)
    finding = check(bench, data)
    assert finding.absent == 1
    # a video of which only a part was written
    half = next(p for p in videos(bench, data))
    half.write_bytes(half.read_bytes()[:100])
    (data / "home/videomme/.unpacked.json").unlink(missing_ok=True)
    prepare(bench, data, QUIET)
    assert check(bench, data).complete
    assert {p.name: p.read_bytes() for p in videos(bench, data)} == {p.name: p.read_bytes() for p in videos(bench)}


def test_damaged_archive(hub, tmp_path) -> None:
    bench, data = benchmark("videomme"), tmp_path / "data"
    broken = data / "archives" / bench.dataset / "videos_chunked_01.zip"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"PK half of a download")
    with pytest.raises(MethodError, match=r"videos_chunked_01.zip is damaged"):
        prepare(bench, data, QUIET)
    assert list(json.loads((data / "home/videomme/.unpacked.json").read_text())) == ["videos_chunked_00.zip"]
    broken.unlink()
    prepare(bench, data, QUIET)
    assert check(bench, data).complete


def test_numbered_tar_files_are_parts_or_archives(tmp_path) -> None:
    (tmp_path / "in").mkdir()
    for n in range(2):
        (tmp_path / f"{n}.mp4").write_bytes(b"video" * (n + 1))
        with tarfile.open(tmp_path / "in" / f"videos_{n}.tar", "w") as archive:
            archive.add(tmp_path / f"{n}.mp4", f"videos/{n}.mp4")
    unpack(tmp_path / "in", tmp_path / "out", QUIET)
    assert sorted(p.name for p in (tmp_path / "out" / "videos").iterdir()) == ["0.mp4", "1.mp4"]


def test_archives_stay_inside_their_folder(tmp_path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "evil.mp4").write_bytes(b"x")
    with tarfile.open(tmp_path / "in" / "videos.tar", "w") as archive:
        archive.add(tmp_path / "evil.mp4", "../../escaped.mp4")
    with pytest.raises(MethodError, match="damaged"):
        unpack(tmp_path / "in", tmp_path / "a" / "out", QUIET)
    assert not (tmp_path / "escaped.mp4").exists()


MEMBERS = {f"videos/{n}.mp4": os.urandom(3000) + bytes([n]) * 20000 for n in range(4)}
COMPRESSIONS = ["", ".gz", ".bz2", ".xz"]


def tar_of(path: Path, names=tuple(MEMBERS), compression: str = "") -> Path:
    with tarfile.open(path, f"w:{compression.removeprefix('.')}") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(MEMBERS[name])
            archive.addfile(member, io.BytesIO(MEMBERS[name]))
    return path


def unpacked(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".unpacked.json")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def refused(source: Path, target: Path, message: str = "is damaged") -> None:
    """An error that names the archive on one line; what is under its name is whole, and nothing counts as done."""
    with pytest.raises(MethodError, match=message) as caught:
        unpack(source, target, QUIET)
    assert str(source) in str(caught.value) and "\n" not in str(caught.value)
    assert not (target / ".unpacked.json").exists()
    assert all(MEMBERS[name] == content for name, content in unpacked(target).items())


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", ["whole", "parts", "archives"])
def test_tar_files(tmp_path, compression, kind) -> None:
    source, names = tmp_path / "in", list(MEMBERS)
    source.mkdir()
    if kind == "archives":
        tar_of(source / f"videos_1.tar{compression}", names[:2], compression)
        tar_of(source / f"videos_2.tar{compression}", names[2:], compression)
    else:
        whole = tar_of(source / f"videos.tar{compression}", compression=compression)
        if kind == "parts":
            content = whole.read_bytes()
            whole.unlink()
            for n, start in enumerate(range(0, len(content), 3000)):
                (source / f"{whole.name}.part{n:03d}").write_bytes(content[start : start + 3000])
    unpack(source, tmp_path / "out", QUIET)
    assert unpacked(tmp_path / "out") == MEMBERS
    before = listing(tmp_path / "out")
    unpack(source, tmp_path / "out", QUIET)
    assert listing(tmp_path / "out") == before


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("share", [0.999, 0.9, 0.5, 0.2, 0.01])
def test_cut_tar_files(tmp_path, compression, share) -> None:
    (tmp_path / "in").mkdir()
    path = tar_of(tmp_path / "in" / f"videos.tar{compression}", compression=compression)
    content = path.read_bytes()
    if not compression:
        content = content.rstrip(b"\0")  # the mark of the end is longer than it must be
    path.write_bytes(content[: int(len(content) * share)])
    refused(tmp_path / "in", tmp_path / "out")
    path.unlink()
    tar_of(path, compression=compression)
    unpack(tmp_path / "in", tmp_path / "out", QUIET)
    assert unpacked(tmp_path / "out") == MEMBERS


def test_tar_file_cut_between_two_members(tmp_path) -> None:
    (tmp_path / "in").mkdir()
    path = tar_of(tmp_path / "in" / "videos.tar")
    with tarfile.open(path) as archive:
        end = archive.getmembers()[2].offset
    path.write_bytes(path.read_bytes()[:end])
    refused(tmp_path / "in", tmp_path / "out", "is damaged .*it was cut")


@pytest.mark.parametrize("name", ["videos.tar.part1", "videos.tar.part2"])
def test_a_missing_part_is_damage(tmp_path, name) -> None:
    (tmp_path / "in").mkdir()
    content = tar_of(tmp_path / "whole.tar").read_bytes()
    for n in range(3):
        (tmp_path / "in" / f"videos.tar.part{n}").write_bytes(content[n * 30000 : (n + 1) * 30000 if n < 2 else None])
    (tmp_path / "in" / name).unlink()
    refused(tmp_path / "in", tmp_path / "out", r"videos.tar.part0 \(with 1 more parts, .*is damaged")


def test_damaged_header_of_a_tar_member(tmp_path) -> None:
    (tmp_path / "in").mkdir()
    path = tar_of(tmp_path / "in" / "videos.tar")
    with tarfile.open(path) as archive:
        at = archive.getmembers()[1].offset
    content = bytearray(path.read_bytes())
    content[at + 20] ^= 0xFF
    path.write_bytes(content)
    refused(tmp_path / "in", tmp_path / "out", f"is damaged .*at byte {at}")


@pytest.mark.parametrize("compression", COMPRESSIONS[1:])
@pytest.mark.parametrize("where", [0.3, 0.7, 0.9999])
def test_damaged_compressed_tar_file(tmp_path, compression, where) -> None:
    (tmp_path / "in").mkdir()
    path = tar_of(tmp_path / "in" / f"videos.tar{compression}", compression=compression)
    content = bytearray(path.read_bytes())
    place = min(int(len(content) * where), len(content) - 7)
    content[place : place + 3] = bytes(255 - value for value in content[place : place + 3])
    path.write_bytes(content)
    refused(tmp_path / "in", tmp_path / "out", rf"{path.name} is damaged")


def test_tar_file_of_an_unknown_compression(tmp_path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "videos.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    refused(tmp_path / "in", tmp_path / "out", "cannot be unpacked .*zstd")


def zip_of(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in MEMBERS.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("damage", ["content", "header", "cut"])
def test_damaged_zip_member(tmp_path, damage) -> None:
    (tmp_path / "in").mkdir()
    path = zip_of(tmp_path / "in" / "videos.zip")
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        at = archive.infolist()[2].header_offset
    if damage == "cut":
        content = content[: len(content) // 2]
    else:
        content[at + (500 if damage == "content" else 1)] ^= 0xFF
    path.write_bytes(content)
    refused(tmp_path / "in", tmp_path / "out")
    refused(tmp_path / "in", tmp_path / "out")  # what was written the first time does not count either
    zip_of(path)
    unpack(tmp_path / "in", tmp_path / "out", QUIET)
    assert unpacked(tmp_path / "out") == MEMBERS


def test_a_file_of_the_right_size_is_not_yet_the_member(tmp_path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out/videos").mkdir(parents=True)
    (tmp_path / "out/videos/1.mp4").write_bytes(bytes(len(MEMBERS["videos/1.mp4"])))
    zip_of(tmp_path / "in" / "videos.zip")
    unpack(tmp_path / "in", tmp_path / "out", QUIET)
    assert unpacked(tmp_path / "out") == MEMBERS


def test_zip_file_with_a_password_and_full_disk(tmp_path, monkeypatch) -> None:
    (tmp_path / "in").mkdir()
    path = zip_of(tmp_path / "in" / "videos.zip")
    content = path.read_bytes()
    flagged = bytearray(content)
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # member "0.mp4" is encrypted
        flagged[content.index(mark) + place] |= 1
    path.write_bytes(flagged)
    refused(tmp_path / "in", tmp_path / "out", "cannot be unpacked .*password")
    path.write_bytes(content)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "extract", full)
    refused(tmp_path / "in", tmp_path / "out", "cannot be unpacked .*No space left")


def test_half_a_copy_of_a_loose_video_is_replaced(tmp_path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(b"all of it")
    (tmp_path / "out" / "a.mp4").write_bytes(b"all")
    unpack(tmp_path / "in", tmp_path / "out", QUIET)
    assert unpacked(tmp_path / "out") == {"a.mp4": b"all of it"}


def test_an_empty_video_is_a_missing_one(data) -> None:
    bench = benchmark("videomme")
    sorted(videos(bench, data))[0].write_bytes(b"")
    assert check(bench, data).absent == 1


def test_prepare_says_why_it_cannot(hub, tmp_path, monkeypatch) -> None:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    bench = benchmark("longvideobench_val_v")

    def failing(error):
        def download(*_, **__):
            raise error

        return download

    monkeypatch.setattr("huggingface_hub.dataset_info", failing(ConnectionError("no route to host")))
    with pytest.raises(MethodError, match=r"cannot download https://.*LongVideoBench.*no route to host"):
        prepare(bench, tmp_path, QUIET)
    for kind, advice in ((GatedRepoError, "accept the conditions"), (RepositoryNotFoundError, "hf auth login")):
        # made without its constructor, which wants a response of the HTTP client of the day
        monkeypatch.setattr("huggingface_hub.dataset_info", failing(kind.__new__(kind)))
        with pytest.raises(MethodError, match=advice):
            prepare(bench, tmp_path, QUIET)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MethodError, match="HF_HUB_OFFLINE is set"):
        prepare(bench, tmp_path, QUIET)


def test_prepare_without_a_connection(tmp_path) -> None:
    """The hub's real client, on a port where nobody listens, with something in the folder as after an interruption."""
    (tmp_path / "lmms-lab-encoder/MME").mkdir(parents=True)
    (tmp_path / "lmms-lab-encoder/MME/part.incomplete").touch()
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "lmms_eval_accelerate.benchmarks", "prepare", "--data", tmp_path, "mme"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=FIXTURES.parents[1])
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: MME: cannot download https://huggingface.co/datasets/lmms-lab-encoder/MME" in done.stderr


def test_prepare_notices_another_layout(hub, tmp_path) -> None:
    bench = benchmark("mme")
    source = hub.folder / bench.dataset / "data"
    source.rename(source.with_name("moved_to"))
    for file in source.with_name("moved_to").iterdir():
        file.rename(file.with_name("all.parquet"))
    with pytest.raises(MethodError, match=r"has no file \*/test-\*.parquet or test-\*.parquet"):
        prepare(bench, tmp_path / "data", QUIET)


# -- what identifies the data ------------------------------------------------------------------------------------------


def changed_in_place(path: Path) -> None:
    """Another content of equal size and time."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("bench", HUB, ids=lambda b: b.name)
def test_annotations_count_by_content(bench, data) -> None:
    before = contents.facts(bench, data)
    assert contents.facts(bench, data) == before
    for config, _ in layout.configs(bench):
        changed_in_place(layout.annotations(data / bench.dataset, config, bench.split)[0])
        now = contents.facts(bench, data)
        assert now["hash"] != before["hash"] and now["files"] == before["files"]
        before = now


def test_media_count_by_size_and_time(data) -> None:
    bench = benchmark("videomme")
    seen, video = [contents.facts(bench, data)], min(videos(bench, data))
    os.utime(video, (1, 1))
    seen.append(contents.facts(bench, data))
    video.write_bytes(video.read_bytes() + b"more")
    os.utime(video, (1, 1))
    seen.append(contents.facts(bench, data))
    assert len({fact["hash"] for fact in seen}) == 3
    (data / "home/videomme/.unpacked.json").write_text("{}")  # what this project notes there is no data
    assert contents.facts(bench, data) == seen[2]


def test_embedded_data_count_by_content(tmp_path, monkeypatch) -> None:
    bench = benchmark("shapes_video")
    copy = shutil.copytree(contents.QUESTIONS[bench.task].parent, tmp_path / "shapes_video")
    monkeypatch.setitem(contents.QUESTIONS, bench.task, copy / contents.QUESTIONS[bench.task].name)
    before = contents.facts(bench, None)
    for path in (copy / "quick.jsonl", min((copy / "clips").glob("*.mp4"))):
        changed_in_place(path)
        assert contents.facts(bench, None) != before
        before = contents.facts(bench, None)
    assert list(contents.task_facts("shapes_video,of_another_project", None)) == ["shapes_video"]
