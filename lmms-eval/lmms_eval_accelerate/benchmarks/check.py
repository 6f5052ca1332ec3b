"""What a run would find on disk."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import string
from collections.abc import Iterable, Iterator
from pathlib import Path

from accelerate_methods.stages.errors import MethodError, one_line
from lmms_eval_accelerate.benchmarks import layout
from lmms_eval_accelerate.benchmarks.catalog import Benchmark, Part
from lmms_eval_accelerate.embedded import QUESTIONS

_EASY_VQA = "easy_vqa"  # dataset and package


@dataclasses.dataclass
class Finding:
    """What is there of one benchmark."""

    benchmark: Benchmark
    documents: int = 0
    videos: int | None = None  # different ones that the documents name; None: none, or no documents to name them
    absent: int = 0  # of them
    missing: list[str] = dataclasses.field(default_factory=list)  # what a run lacks
    warnings: list[str] = dataclasses.field(default_factory=list)  # what makes a score another benchmark's
    places: list[Path] = dataclasses.field(default_factory=list)  # where was looked

    @property
    def complete(self) -> bool:
        return not self.missing


def check(benchmark: Benchmark, data: Path | None = None) -> Finding:
    """Look for annotations and videos.

    Args:
        data: data folder; None: the hub's cache and ``HF_HOME`` of this environment, where lmms-eval downloads to.

    Raises:
        MethodError: pyarrow is not installed, or a file cannot be read.
    """
    finding = Finding(benchmark)
    if benchmark.embedded:
        _check_embedded(finding)
        return finding
    folder = layout.dataset_folder(benchmark, data)
    if folder is None or not folder.is_dir():
        finding.missing.append(f"{benchmark.dataset}: no folder {folder}" if folder else "not in the hub's cache")
    finding.places += [place for place in (folder,) if place is not None]
    media = layout.home(data) / benchmark.media if benchmark.media else None
    if media is not None:
        finding.places.append(media)
        if media.is_symlink():
            finding.warnings.append(f"{media} is a link: lmms-eval asks the hub again for MVBench, offline that fails")
    if folder is not None and folder.is_dir():
        _check_split(finding, folder, media)
    return finding


def require(benchmarks: Iterable[Benchmark], data: Path) -> None:
    """Nothing if a data folder holds all that runs on these benchmarks need.

    Raises:
        MethodError: something is missing, with what and where; without this lmms-eval fails after five attempts to
            reach the hub, or at the first document whose video is not there.
    """
    findings = [finding for finding in (check(each, data) for each in benchmarks) if not finding.complete]
    if findings:
        lines = "; ".join(f"{f.benchmark.name}: {', '.join(f.missing)}" for f in findings)
        names = " ".join(f.benchmark.name for f in findings)
        raise MethodError(f"data is missing: {lines}. bash scripts/data/prepare.sh --data {data} {names}")


def _check_split(finding: Finding, folder: Path, media: Path | None) -> None:
    """Documents and videos of all parts."""
    split, other = finding.benchmark.split, []
    videos: dict[tuple[str, ...], Path] = {}  # where a video can be -> where it was named
    for config, part in layout.configs(finding.benchmark):
        files = layout.annotations(folder, config, split)
        if not files:
            wanted = " or ".join(layout.patterns(config, split))
            finding.missing.append(f"split {split}{f' of {config}' if config else ''}: no {wanted} in {folder}")
        if part is None or not files:
            continue
        count = sum(_rows(file) for file in files)
        finding.documents += count
        if part.documents not in (None, count):
            other.append(f"{part.task} has {count} documents, the published split {part.documents}")
        if media is not None:
            videos.update(dict.fromkeys(_videos(files, part), files[0]))
    if other:
        more = f" (and {len(other) - 1} more)" if len(other) > 1 else ""
        finding.warnings.append(f"{other[0]}{more}: not the published set, no number to compare")
    if videos:
        absent = sorted(v for v in videos if not any(_holds_something(media / path) for path in v))
        finding.videos, finding.absent = len(videos), len(absent)
        if absent:
            finding.missing.append(f"{len(absent)} of {len(videos)} videos, as {media / absent[0][0]}")


def _videos(files: list[Path], part: Part) -> Iterator[tuple[str, ...]]:
    """For every document the places where its video can be."""
    columns = sorted({field for text in part.files for _, field, _, _ in string.Formatter().parse(text) if field})
    for file in files:
        for row in _read(file, columns):
            yield tuple(text.format(**row) for text in part.files)


def _holds_something(path: Path) -> bool:
    """A file that is not empty, or a folder (of frames) that is not."""
    try:
        return any(path.iterdir()) if path.is_dir() else path.stat().st_size > 0
    except OSError:
        return False


def _rows(file: Path) -> int:
    if file.suffix == ".json":
        return len(_read(file, []))
    try:
        return _parquet().read_metadata(file).num_rows
    except (OSError, ValueError) as error:
        raise MethodError(f"cannot read {file}: {type(error).__name__}: {one_line(error)}") from error


def _read(file: Path, columns: list[str]) -> list[dict]:
    try:
        if file.suffix == ".json":
            rows = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise ValueError("it is no list of documents")
            return rows
        return _parquet().read_table(file, columns=columns).to_pylist()
    except (OSError, ValueError, KeyError) as error:
        raise MethodError(f"cannot read {file}: {type(error).__name__}: {one_line(error)}") from error


def _parquet():
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MethodError("pyarrow is needed to read the data sets; it comes with lmms-eval (datasets).") from error
    return pyarrow.parquet


def _check_embedded(finding: Finding) -> None:
    file = QUESTIONS[finding.benchmark.task]
    finding.places.append(file.parent)
    if file.is_file():
        finding.documents = sum(1 for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    else:
        finding.missing.append(f"documents ({file})")
    if finding.benchmark.dataset == _EASY_VQA and importlib.util.find_spec(_EASY_VQA) is None:
        finding.missing.append("the package easy-vqa: pip install easy-vqa")
