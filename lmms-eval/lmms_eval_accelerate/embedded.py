"""The embedded model and tasks: where their files lie, and what to say if they do not."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from accelerate_methods.stages.errors import MethodError
from lmms_eval_accelerate import ASSETS

MODEL = ASSETS / "tiny-llava-onevision"
CLIPS = ASSETS / "shapes_video" / "clips"
#: families that the model can run as
FAMILIES = ("llava_onevision", "llava_video")
#: task -> file with its questions
QUESTIONS: dict[str, Path] = {
    f"{name}{suffix}": ASSETS / name / file
    for name in ("shapes_video", "easy_vqa")
    for suffix, file in (("", "quick.jsonl"), ("_full", "full.jsonl"))
}


def require_model() -> None:
    """
    Raises:
        MethodError: the model is not there.
    """
    if not (MODEL / "config.json").is_file():
        raise MethodError(f"the embedded model is missing ({MODEL}); {_WHY} name another checkpoint.")


def require_tasks(tasks: str | Iterable[str]) -> None:
    """For names of tasks as they are given to ``--tasks`` (with commas, or a list).

    Raises:
        MethodError: the first embedded one of which the questions are not there.
    """
    for task in tasks.split(",") if isinstance(tasks, str) else tasks:
        file = QUESTIONS.get(task.strip())
        if file is not None and not file.is_file():
            raise MethodError(f"the questions of task {task.strip()} are missing ({file}); {_WHY} choose other tasks.")


_WHY = (
    "the project's assets/ come with its checkout and with a wheel that was built in it: run "
    "`pip install -e lmms-eval` in a checkout, or"
)
