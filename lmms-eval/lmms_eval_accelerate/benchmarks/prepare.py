"""Downloading data sets into a data folder, and unpacking their videos where the stock tasks look for them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from accelerate_methods.stages.errors import MethodError, one_line
from lmms_eval_accelerate.benchmarks import archives as reading
from lmms_eval_accelerate.benchmarks import layout
from lmms_eval_accelerate.benchmarks.catalog import Benchmark

_ARCHIVES = ("*.zip", "*.tar", "*.tar.*", "*.tgz")
_VIDEOS = ("*.mp4", "*.MP4", "*.mkv", "*.webm", "*.avi", "*.mov")
_STAMPS = ".unpacked.json"


def prepare(benchmark: Benchmark, data: Path, console: Console) -> None:
    """Download and unpack one benchmark. What is there is not fetched or unpacked again, so that it can be repeated.

    Raises:
        MethodError: no connection, no access, or a data set that is laid out in another way than expected.
    """
    if benchmark.embedded:
        console.print(f"{benchmark.title}: comes with the plugin, nothing to download")
        return
    folder = data / benchmark.dataset
    files = {config: layout.patterns(config, benchmark.split) for config, _ in layout.configs(benchmark)}
    console.print(f"{benchmark.title}: annotations of {benchmark.dataset} -> {folder}", soft_wrap=True)
    commit = _download(benchmark, folder, [pattern for patterns in files.values() for pattern in patterns])
    for config, patterns in files.items():
        if not layout.annotations(folder, config, benchmark.split):
            raise MethodError(
                f"{benchmark.title}: {benchmark.dataset} has no file {' or '.join(patterns)}; it is laid out in "
                f"another way than expected. Put its files into {folder} so named."
            )
    layout.refresh_card(folder, benchmark.dataset, f"Last download: revision {commit} of {benchmark.dataset}.\n")
    if benchmark.media:
        archives = data / "archives" / benchmark.dataset
        target = data / "home" / benchmark.media
        console.print(f"{benchmark.title}: videos -> {target}", soft_wrap=True)
        _download(benchmark, archives, [*_ARCHIVES, *_VIDEOS])
        unpack(archives, target, console)


def _download(benchmark: Benchmark, folder: Path, patterns: list[str]) -> str:
    """``snapshot_download`` into a folder, which resumes by itself; the revision (a commit) that was downloaded."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise MethodError(
            "HF_HUB_OFFLINE is set, so that nothing can be downloaded; unset it, or copy the data folder."
        )
    page = f"https://huggingface.co/datasets/{benchmark.dataset}"
    try:
        # asked first: without a connection snapshot_download is content with what the folder holds
        commit = huggingface_hub.dataset_info(benchmark.dataset, revision=benchmark.revision).sha
        huggingface_hub.snapshot_download(
            benchmark.dataset, repo_type="dataset", revision=commit, local_dir=folder, allow_patterns=patterns
        )
    except GatedRepoError as error:
        raise MethodError(f"{benchmark.title}: accept the conditions at {page}, then `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        raise MethodError(f"{benchmark.title}: {page} does not exist or needs a login (`hf auth login`).") from error
    except (
        Exception
    ) as error:  # the errors of a connection have another class with every HTTP client of the hub's library
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise MethodError(f"{benchmark.title}: cannot download {page}: {reason}") from error
    return commit


def unpack(archives: Path, target: Path, console: Console) -> None:
    """Everything in ``archives`` (zip files, tar files in one or several parts, loose videos) into ``target``.

    As lmms-eval does it when it downloads by itself, except that an interruption or damage does no harm: an archive
    counts as unpacked when all of it is (``.unpacked.json``), and only then. MVBench's ``data0613`` is merged into the
    folders beside it, where alone the stock task looks.

    Raises:
        MethodError: there is nothing to unpack, or an archive is damaged.
    """
    units = _units(archives)
    if not units:
        raise MethodError(f"nothing to unpack in {archives}: neither archives nor videos.")
    target.mkdir(parents=True, exist_ok=True)
    stamps = target / _STAMPS
    done: dict[str, Any] = _stamped(stamps)
    for name, files in units.items():
        sizes = [file.stat().st_size for file in files]
        if done.get(name) == sizes:
            continue
        with reading.naming(files):
            _unpack_unit(name, files, archives, target, console)
        done[name] = sizes
        # replaced in one step: an interruption must not leave half a file
        fresh = stamps.with_suffix(".new")
        fresh.write_text(json.dumps(done, indent=1), encoding="utf-8")
        fresh.replace(stamps)
    _merge(target / "data0613", target)


def _stamped(stamps: Path) -> dict[str, Any]:
    """What was unpacked; nothing if the file says nothing that can be read: it is unpacked again."""
    try:
        found = json.loads(stamps.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _units(archives: Path) -> dict[str, list[Path]]:
    """Name -> files to be unpacked together; loose videos are one unit each."""
    units: dict[str, list[Path]] = {}
    for file in sorted(p for p in archives.rglob("*") if p.is_file() and ".cache" not in p.relative_to(archives).parts):
        relative = file.relative_to(archives).as_posix()
        if file.suffix == ".zip":
            units[relative] = [file]
        elif ".tar" in file.name or file.suffix == ".tgz":
            # parts: videos.tar.part.aa, videos_1.tar, ...; in sorted order they are one archive
            base = re.sub(r"_\d+$", "", relative.split(".tar")[0].removesuffix(".tgz"))
            units.setdefault(f"{base}.tar", []).append(file)
        elif any(PurePosixPath(relative).match(pattern) for pattern in _VIDEOS):
            units[relative] = [file]
    return units


def _unpack_unit(name: str, files: list[Path], archives: Path, target: Path, console: Console) -> None:
    if not name.endswith((".zip", ".tar")):
        reading.place(files[0], target / files[0].relative_to(archives))
        return
    with _bar(console) as bar:
        task = bar.add_task(name, total=sum(file.stat().st_size for file in files))
        if name.endswith(".zip"):
            reading.unpack_zip(
                files[0], target, lambda size: bar.update(task, total=size), lambda size: bar.advance(task, size)
            )
        else:
            reading.unpack_tar(files, target, lambda size: bar.advance(task, size))


def _merge(source: Path, target: Path) -> None:
    if source.is_dir():
        for file in (p for p in source.rglob("*") if p.is_file()):
            reading.place(file, target / file.relative_to(source))


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)
