"""The pictures of a comparison: accuracy against what was kept, and what a method keeps of one clip."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate_methods.registry.settings import Setting
from lmms_eval_accelerate.compare.comparison import Comparison
from lmms_eval_accelerate.compare.table import TaskResult, cut_tasks
from lmms_eval_accelerate.report.results import DENSE
from lmms_eval_accelerate.runs.long_prompts import MARK


def draw_curve(found: list[TaskResult], path: Path) -> Path:
    """Accuracy against the share of visual tokens kept; a line per method, a panel per task of :func:`cut_tasks`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = cut_tasks(found)
    with matplotlib.rc_context({"text.parse_math": False}):  # a dollar sign in a name is one
        figure = _curves(plt, panels)
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _curves(plt: Any, panels: Mapping[str, list[TaskResult]]) -> Any:
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.8), squeeze=False)
    for axis, (task, here) in zip(axes[0], panels.items(), strict=True):
        for row in here:
            if row.setting == DENSE:
                harmed = f" ({row.long_prompts.count} prompts too long)" if row.long_prompts.harmed else ""
                axis.axhline(100 * row.score, color="0.5", linestyle="--", linewidth=1, label=DENSE + harmed)
        methods = dict.fromkeys(_method(row) for row in here if row.setting != DENSE)
        for method in methods:
            rows = sorted((r for r in here if _method(r) == method), key=lambda r: (r.kept, r.score))
            points = [(100 * r.kept, 100 * r.score) for r in rows]
            # a line between points of one run each: no more is claimed
            (line,) = axis.plot(*zip(*points, strict=True), marker="o", label=method)
            harmed = [point for row, point in zip(rows, points, strict=True) if row.not_comparable]
            if harmed:
                look = {"linestyle": "", "marker": "o", "markerfacecolor": "white", "color": line.get_color()}
                axis.plot(*zip(*harmed, strict=True), **look, label=f"{MARK} not comparable")
        axis.set(title=task, xlabel="visual tokens kept (%)", ylabel="accuracy (%)")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.tight_layout()
    return figure


def _method(row: TaskResult) -> str:
    """The method of ``name``, ``name@ratio`` or ``name(parameters)``."""
    return re.split(r"[@(]", row.setting)[0]


def _changes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of the model's config that its arguments set, as in the runs: they decide what a video's tokens are."""
    wanted = {k: v for k, v in values.items() if k.startswith("mm_") and v is not None}
    return wanted if values.get("overwrite", True) else {}


def draw_clip(comparison: Comparison, setting: Setting, video: Path, path: Path) -> Path:
    """Which visual tokens of ``video`` the method of ``setting`` keeps, drawn over its frames."""
    import torch
    from transformers.utils import logging

    import accelerate_methods
    from accelerate_methods.visualize import draw_kept_tokens
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.model.builder import load_pretrained_model
    from llava.video_utils import load_video

    logging.disable_progress_bar()
    arguments = comparison.parsed(setting)
    _, model, processor, _ = load_pretrained_model(
        comparison.pretrained,
        device_map="auto",
        torch_dtype="auto" if torch.cuda.is_available() else "float32",
        overwrite_config=_changes(arguments.values),
    )
    with (
        accelerate_methods.accelerate(model, arguments.pipeline) as acceleration,
        accelerate_methods.record() as requests,
        torch.no_grad(),
    ):
        sampler = acceleration.frame_sampler
        if sampler is not None and sampler.selects:
            sampler = None  # by a question, of which a picture has none
        frames = load_video(str(video), num_frames=arguments.max_frames_num, sampler=sampler).frames
        pixels = processor.preprocess(frames, return_tensors="pt")["pixel_values"]
        model(torch.tensor([[IMAGE_TOKEN_INDEX, 0]], device=model.device), images=[pixels], modalities=["video"])
    item = requests[0].samples[0].items[0]
    title = f"{setting.label}: {item.tokens_after} of {item.tokens_before} visual tokens of {Path(video).name}"
    return draw_kept_tokens(frames, item, path, title)
