"""The benchmarks of the papers' tables: which task of lmms-eval 0.7.3, how its score is printed, where its data lies.

The table is ``catalog.yaml``. Everything runs through lmms-eval's stock task definitions, but for the two embedded
benchmarks and two stock tasks that are scored without a judge: ``mmbench_cn_dev_static`` as the stock English static
one, ``hallusion_bench_image_static`` as the stock file says in comments.

    python -m lmms_eval_accelerate.benchmarks list
    python -m lmms_eval_accelerate.benchmarks check --data DIR [names...]
    python -m lmms_eval_accelerate.benchmarks prepare --data DIR names...
    eval "$(python -m lmms_eval_accelerate.benchmarks env --data DIR)"     # then run offline from this shell

Nothing here imports lmms-eval; tests/lmms_eval/benchmarks compares what is said of its tasks with the installed ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from accelerate_methods.stages.errors import MethodError, UnknownNameError


@dataclasses.dataclass(frozen=True)
class Part:
    """A task that has documents: a benchmark's own, or a subtask of a group."""

    task: str
    config: str | None = None  # of the data set
    documents: int | None = None  # of the published split
    files: tuple[str, ...] = ()  # a document's video below ``media``, as the task tries them; {column} is filled in


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One benchmark and the task of lmms-eval that runs it."""

    name: str
    title: str  # as printed in tables
    task: str  # task or group
    kind: str  # "image" or "video"
    metric: str  # key in the task's results; "a+b" is the sum of two
    scale: float  # factor to the unit that papers print
    dataset: str  # hub name; for the embedded tasks the folder of the task
    split: str
    config: str | None = None  # of the data set; None: it has none, or one per subtask
    image_config: str | None = None  # a second configuration that holds the images
    documents: int | None = None  # of the published split (all subtasks); None if not known for certain
    needs_judge: bool = False
    media: str | None = None  # folder below HF_HOME that holds the videos
    revision: str | None = None  # of the data set
    files: tuple[str, ...] = ()  # see Part
    subtasks: tuple[Part, ...] = ()  # of a group
    notes: str = ""

    @property
    def parts(self) -> tuple[Part, ...]:
        """What has documents of its own: the subtasks of a group, or the benchmark itself."""
        return self.subtasks or (Part(self.task, self.config, self.documents, self.files),)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that have samples: the task itself, or the subtasks of a group."""
        return tuple(part.task for part in self.parts)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The keys that ``metric`` adds up."""
        return tuple(self.metric.split("+"))

    @property
    def embedded(self) -> bool:
        """Whether the data comes with our plugin."""
        return "/" not in self.dataset


_TABLE = Path(__file__).with_name("catalog.yaml")


def _read(path: Path) -> dict[str, Benchmark]:
    found = {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, ten times as fast: every command waits for it
    for name, fields in yaml.load(path.read_text(encoding="utf-8"), loader).items():
        parts = (
            Part(task=task, **{**part, "files": tuple(part["files"])})
            for task, part in fields.pop("subtasks", {}).items()
        )
        files = tuple(fields.pop("files", ()))
        found[name] = Benchmark(name=name, task=name, files=files, subtasks=tuple(parts), **fields)
    return found


BENCHMARKS: dict[str, Benchmark] = _read(_TABLE)

#: further stock tasks that ask a judge for some answers, and what runs without one
_HALF_JUDGED = {
    **{"mmbench_en_dev": "mmbench_en_dev_static", "mmbench_cn_dev": "mmbench_cn_dev_static"},
    "hallusion_bench_image": "hallusion_bench_image_static",
}


def benchmark(name: str) -> Benchmark:
    """The benchmark called ``name``.

    Raises:
        UnknownNameError: there is none, with the nearest name.
    """
    if name not in BENCHMARKS:
        raise UnknownNameError("benchmark", name, BENCHMARKS)
    return BENCHMARKS[name]


def group_metrics(benchmark: Benchmark, tasks: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Metrics of a benchmark out of those of all tasks (``summary["tasks"]``); for a group the means over its subtasks.

    lmms-eval 0.7.3 gives no number for the groups used here. A subtask without a metric of the group (Video-ChatGPT:
    each has its own) does not enter that metric's mean.

    Raises:
        MethodError: a task of the benchmark is missing.
    """
    missing = [task for task in benchmark.tasks if task not in tasks]
    if missing:
        raise MethodError(
            f"{benchmark.title}: no result of {', '.join(missing)}; found results of {', '.join(tasks) or 'no task'}."
        )
    if not benchmark.subtasks:
        return dict(tasks[benchmark.task])
    values: dict[str, list[float]] = {}
    for task in benchmark.tasks:
        for key, value in tasks[task].items():
            values.setdefault(key, []).append(value)
    return {key: statistics.fmean(numbers) for key, numbers in values.items()}


def score(
    benchmark: Benchmark, metrics: Mapping[str, float], metric: str | None = None, scale: float | None = None
) -> float:
    """The benchmark's score in the unit that papers print.

    Args:
        metrics: of the task (``summary["tasks"][task]``), for a group from :func:`group_metrics`.
        metric, scale: in place of the benchmark's own.

    Raises:
        MethodError: the metric is not there.
    """
    keys = (metric or benchmark.metric).split("+")
    missing = [key for key in keys if key not in metrics]
    if missing:
        raise MethodError(
            f"{benchmark.title}: no metric {', '.join(missing)} in the results of {benchmark.task}; "
            f"found: {', '.join(metrics) or 'none'}."
        )
    return sum(metrics[key] for key in keys) * (benchmark.scale if scale is None else scale)


def score_unit(benchmark: Benchmark, metric: str) -> str:
    """Unit of a score: "points" (MME, OCRBench), "of 5" (a judge's marks) or "%"."""
    if benchmark.name in ("mme", "ocrbench"):
        return "points"
    return "of 5" if benchmark.needs_judge and metric.startswith("gpt_eval_score") else "%"


def require_judge(benchmark: Benchmark, environ: Mapping[str, str]) -> None:
    """Nothing if the benchmark can be scored in this environment.

    Raises:
        MethodError: it is scored by a judge and there is no key, with what to set.
    """
    if benchmark.needs_judge:
        _require_key(f"{benchmark.title} ({benchmark.task})", environ, "")


def require_judges(tasks: str | Iterable[str], environ: Mapping[str, str]) -> None:
    """:func:`require_judge` for names of tasks and groups as they are given to ``--tasks`` (with commas, or a list).

    The stock MMBench tasks without ``_static`` are refused as well: without a key they replace an answer that they
    cannot read by a random option, after minutes of retries; the stock HallusionBench asks about every answer.

    Raises:
        MethodError: for the first task that cannot be scored.
    """
    for task in tasks.split(",") if isinstance(tasks, str) else tasks:
        task = task.strip()
        owner = next((b for b in BENCHMARKS.values() if task in (b.task, *b.tasks)), None)
        if owner is not None and owner.needs_judge:
            _require_key(f"{owner.title} ({task})", environ, "")
        elif task in _HALF_JUDGED:
            _require_key(task, environ, f" {_HALF_JUDGED[task]} needs none.")


def _require_key(what: str, environ: Mapping[str, str], hint: str) -> None:
    kind = environ.get("API_TYPE", "openai")
    if kind != "openai":
        raise MethodError(f"{what} is scored by a judge; its task only works with API_TYPE=openai, not {kind!r}.{hint}")
    if environ.get("OPENAI_API_KEY", "").strip() in ("", "YOUR_API_KEY"):
        raise MethodError(
            f"{what} is scored by a judge: set OPENAI_API_KEY, and where needed OPENAI_API_URL (default: "
            f"https://api.openai.com/v1/chat/completions) and MODEL_VERSION (default: gpt-4o-2024-11-20).{hint}"
        )


def offline_environment(data: Path, cache: Path | None = None) -> tuple[Path, dict[str, str]]:
    """Working directory and environment with which the stock tasks find everything in a local data folder.

    ``datasets`` takes a folder ``./<org>/<name>`` of the working directory for the hub's data set of that name; videos
    are looked for below ``HF_HOME``, which is ``<data>/home``. Nothing is written to ``data``, so that it may be
    read-only. The environment holds only what has to be set, to be put over the caller's. Relative paths of the command
    (a checkpoint, an output folder) have to be made absolute, since it runs elsewhere.

    Args:
        data: see docs/benchmarks.md for its layout.
        cache: where data sets are kept after their first reading, several times the size of small files; default
            ``HF_DATASETS_CACHE`` of this process if it is set, else a folder per data folder in the user's cache.

    Raises:
        MethodError: the folder does not exist, or its videos would be looked for on the hub.
    """
    data = Path(data).expanduser().resolve()
    if not data.is_dir():
        raise MethodError(f"data folder {data} does not exist; docs/benchmarks.md says what it must hold.")
    link = data / "home" / BENCHMARKS["mvbench"].media
    if link.is_symlink():
        raise MethodError(f"{link} is a link, which lmms-eval replaces by one into a fresh download; make it a folder.")
    hub = _absolute(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    writable = _cache_folder(data, cache)
    environment = {
        "HF_HOME": str(data / "home"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        # weights stay where they were before HF_HOME moved
        "HF_HUB_CACHE": _absolute(os.environ.get("HF_HUB_CACHE") or hub / "hub"),
        "HF_MODULES_CACHE": _absolute(os.environ.get("HF_MODULES_CACHE") or hub / "modules"),
        "HF_DATASETS_CACHE": str(writable),
        # lmms-eval's own name for the same; it wins there
        "LMMS_EVAL_DATASETS_CACHE": str(writable),
    }
    return data, {name: str(value) for name, value in environment.items()}


def _absolute(path: str | Path) -> Path:
    """The run has another working directory than this process."""
    return Path(os.path.abspath(Path(path).expanduser()))


def _cache_folder(data: Path, cache: Path | None) -> Path:
    if cache is None and os.environ.get("HF_DATASETS_CACHE"):
        cache = Path(os.environ["HF_DATASETS_CACHE"])
    if cache is None:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser()
        cache = base / "mllm-accelerate" / f"datasets-{hashlib.sha256(str(data).encode()).hexdigest()[:12]}"
    return Path(cache).expanduser().resolve()
