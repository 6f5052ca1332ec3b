"""What a comparison would only find out after minutes: its checkpoint, data, output folder and picture."""

from __future__ import annotations

from pathlib import Path

from accelerate_methods.hosts.checkpoint_files import check_files, find_file, read_config
from accelerate_methods.stages.errors import MethodError, check_writable
from llava.media_kind import kind_of
from lmms_eval_accelerate.benchmarks.catalog import BENCHMARKS, offline_environment
from lmms_eval_accelerate.benchmarks.check import require


def check_checkpoint(pretrained: str, ask_the_hub: bool) -> None:
    """
    Args:
        pretrained: folder, or name on the hub.
        ask_the_hub: whether a name is looked up; printed commands may be for another machine.

    Raises:
        CheckpointError: it cannot be reached or read.
    """
    if Path(pretrained).is_dir():
        read_config(pretrained)
        check_files(pretrained)
    elif pretrained.startswith((".", "/", "~")):
        find_file(pretrained, "config.json")  # says that there is no such folder
    elif ask_the_hub:
        read_config(pretrained)


def check_data(tasks: str, data: Path | None) -> None:
    """
    Raises:
        MethodError: the data folder does not exist, or lacks what a task reads (of the tasks that are known here).
    """
    if data is None:
        return
    offline_environment(data)
    names = {name.strip() for name in tasks.split(",")}
    require([b for b in BENCHMARKS.values() if names & {b.name, b.task, *b.tasks}], data.expanduser().resolve())


def check_output(folder: Path) -> None:
    """
    Raises:
        MethodError: no folder can be made or written there, or lmms-eval could not read its name.
    """
    if "," in str(folder) or "=" in str(folder):
        raise MethodError(f"--output {folder}: lmms-eval cannot read a ',' or '=' in it; choose another name.")
    check_writable(folder, f"--output {folder}")


def check_picture(video: Path) -> None:
    """
    Raises:
        MethodError: it is no video that can be read.
    """
    if not video.is_file():
        raise MethodError(f"--picture {video}: no such file.")
    kind = kind_of(video)
    if kind not in ("video", "animation"):
        what = "a still picture" if kind == "picture" else "neither a video nor a picture"
        raise MethodError(f"--picture {video}: it is {what}; a video is drawn frame by frame.")
