"""Where the files of a data set are, in a data folder and in the hub's cache."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from lmms_eval_accelerate.benchmarks.catalog import BENCHMARKS, Benchmark, Part

_NOTE = "Written by lmms_eval_accelerate.benchmarks: which files of this folder are which split, for `datasets`.\n"


def patterns(config: str | None, split: str) -> tuple[str, ...]:
    """Where a split's files can be below a data set's folder (as ``push_to_hub`` and MVBench lay them out)."""
    if config is None:
        return f"*/{split}-*.parquet", f"{split}-*.parquet"
    return f"{config}/{split}-*.parquet", f"json/{config}.json"


def annotations(folder: Path, config: str | None, split: str) -> list[Path]:
    """The files of a split, sorted; empty if there are none."""
    for pattern in patterns(config, split):
        found = sorted(folder.glob(pattern))
        if found:
            return found
    return []


def configs(benchmark: Benchmark) -> list[tuple[str | None, Part | None]]:
    """The data set's configurations that a benchmark reads, each with the part whose documents it holds."""
    images = [(benchmark.image_config, None)] if benchmark.image_config else []
    return [*((part.config, part) for part in benchmark.parts), *images]


def write_card(folder: Path, splits: dict[str, dict[str, str]], note: str = "") -> None:
    """``README.md`` that tells ``datasets`` the files (a pattern) of each split of each configuration."""
    blocks = [
        {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in files.items()]}
        for name, files in splits.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    head = yaml.safe_dump({"configs": blocks}, sort_keys=False)
    (folder / "README.md").write_text(f"---\n{head}---\n{_NOTE}{note}", encoding="utf-8")


def refresh_card(folder: Path, dataset: str, note: str = "") -> None:
    """A card that names what the folder holds of a data set: the splits that our benchmarks read, and no others.

    The hub's own card names all splits, and ``datasets`` fails on a card whose files are not all there.
    """
    splits: dict[str, dict[str, str]] = {}
    for benchmark in (b for b in BENCHMARKS.values() if b.dataset == dataset):
        for config, _ in configs(benchmark):
            found = annotations(folder, config, benchmark.split)
            if found:
                first = found[0].relative_to(folder)
                name = first.name if first.suffix == ".json" else f"{benchmark.split}-*"
                splits[config or "default"] = {benchmark.split: first.with_name(name).as_posix()}
    write_card(folder, splits, note)


def dataset_folder(benchmark: Benchmark, data: Path | None) -> Path | None:
    """The folder with a benchmark's annotations; None where the hub's cache does not know the data set."""
    if data is not None:
        return data / benchmark.dataset
    cache = Path(os.environ.get("HF_HUB_CACHE") or home(None) / "hub")
    repository = cache / f"datasets--{benchmark.dataset.replace('/', '--')}"
    reference = repository / "refs" / (benchmark.revision or "main")
    if not reference.is_file():
        return None
    return repository / "snapshots" / reference.read_text(encoding="utf-8").strip()


def home(data: Path | None) -> Path:
    """``HF_HOME`` of a run."""
    if data is not None:
        return data / "home"
    return Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
