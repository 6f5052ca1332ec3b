"""Pictures of a run (needs matplotlib)."""

from __future__ import annotations

import importlib.util
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate_methods.bench.results import dense_row, flops_share, kept_share, middle, speed_up, work_ms
from accelerate_methods.bench.steadiness import busy
from accelerate_methods.bench.table import title
from accelerate_methods.registry.settings import DENSE
from accelerate_methods.stages.errors import MethodError


def require() -> None:
    """
    Raises:
        MethodError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MethodError("plots need matplotlib: pip install 'mllm-accelerate[plots]'")


def draw(content: Mapping[str, Any], path: Path) -> list[Path]:
    """``<path>_retention.png``, ``_stages.png`` and ``_speedup.png`` of the rows that could be measured."""
    require()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in content["rows"] if r["status"] == "ok" and r["samples"]["prefill_ms"]]
    drawn = []
    for name, panels, draw_panels in (
        ("retention", 2, _retention),
        ("stages", 1, _stages),
        ("speedup", 1, _speed_up),
    ):
        if name == "speedup":
            if dense_row(content) is None:
                continue
            rows = [row for row in rows if busy(row, dense_row(content)) is None]  # a wrong point is worse than none
        with matplotlib.rc_context({"text.parse_math": False}):  # a dollar sign in a name is one
            figure, axes = plt.subplots(1, panels, figsize=(6.0 * panels + 1.6, 4.4), squeeze=False)
            draw_panels(axes[0], rows, dense_row(content))
            figure.suptitle("\n".join(textwrap.wrap(title(content), 75 * panels)), fontsize=8)
            figure.tight_layout()
            target = path.with_name(f"{path.stem}_{name}.png")
            figure.savefig(target, dpi=150)
            plt.close(figure)
        drawn.append(target)
    return drawn


#: a marker per method: there are more methods than colours
_MARKERS = "osD^vP<>X*ph"


def _style(number: int) -> dict[str, Any]:
    return {"marker": _MARKERS[number % len(_MARKERS)], "alpha": 0.85}


def _legend(axis: Any) -> None:
    """Beside the axis, where it covers no point."""
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _groups(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of the same method, whatever their parameters."""
    out: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        out.setdefault(re.split(r"[@(]", row["label"])[0], []).append(row)
    return out


def _lines(axis: Any, rows: list[dict[str, Any]], value: Any) -> None:
    for number, (method, group) in enumerate(_groups(rows).items()):
        points = sorted((100 * kept_share(r), value(r)) for r in group if value(r) is not None)
        if not points:
            continue
        if method == DENSE:
            axis.axhline(points[0][1], color="0.5", linestyle="--", linewidth=1, label=DENSE)
        else:
            axis.plot(*zip(*points, strict=True), label=method, **_style(number))


def _retention(axes: Any, rows: list[dict[str, Any]], dense: dict[str, Any] | None) -> None:
    _lines(axes[0], rows, lambda r: middle(work_ms(r)))
    _lines(axes[1], rows, lambda r: None if r["peak_memory_bytes"] is None else r["peak_memory_bytes"] / 2**30)
    for axis, label in zip(axes, ("compression + prefill (ms)", "peak memory (GiB)"), strict=True):
        axis.set(xlabel="visual tokens kept (%), mean over the LLM's layers", ylabel=label)
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
        axis.grid(alpha=0.3)
    _legend(axes[-1])


def _stages(axes: Any, rows: list[dict[str, Any]], dense: dict[str, Any] | None) -> None:
    axis, left = axes[0], [0.0] * len(rows)
    for stage in ("vision", "compress", "prefill"):
        here = [middle(r["samples"][f"{stage}_ms"]) for r in rows]
        axis.barh([r["label"] for r in rows], here, left=left, label=stage)
        left = [a + b for a, b in zip(left, here, strict=True)]
    # what no stage accounts for: splicing, and generate's own work
    rest = [max(0.0, middle(r["samples"]["first_token_ms"]) - a) for r, a in zip(rows, left, strict=True)]
    axis.barh([r["label"] for r in rows], rest, left=left, color="0.8", label="rest, to the first token")
    axis.invert_yaxis()
    axis.set(xlabel="ms (medians)")
    _legend(axis)


def _speed_up(axes: Any, rows: list[dict[str, Any]], dense: dict[str, Any]) -> None:
    axis, highest = axes[0], 1.0
    groups = _groups([r for r in rows if r["label"] != DENSE])
    for number, (method, group) in enumerate(groups.items(), start=1):
        points = sorted((1 / flops_share(r), speed_up(r, dense)) for r in group)
        highest = max(highest, *(max(p) for p in points))
        axis.plot(*zip(*points, strict=True), label=method, **_style(number))
    axis.plot([1, highest], [1, highest], color="0.5", linestyle="--", linewidth=1, label="as FLOPs allow")
    axis.set(xlabel="speed-up by LLM FLOPs alone", ylabel="measured speed-up of compression + prefill")
    axis.grid(alpha=0.3)
    _legend(axis)
