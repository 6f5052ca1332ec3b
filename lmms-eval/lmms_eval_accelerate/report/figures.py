"""Plots as Plotly figures. Dense is black; a method has one colour and one marker in the whole report."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from accelerate_methods.registry import available
from lmms_eval_accelerate.report.accuracy import is_baseline
from lmms_eval_accelerate.report.results import DENSE
from lmms_eval_accelerate.report.sections import AXES, BenchRow, BenchSection, Entry, TaskTable
from lmms_eval_accelerate.runs.long_prompts import MARK

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Okabe and Ito's colours without yellow and black, then Paul Tol's; markers differ as well, for print without colours
_COLOURS = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"),
    *("#999933", "#882255", "#44AA99", "#332288", "#7F7F7F", "#661100"),
)
_MARKERS = ("circle", "square", "triangle-up", "cross", "triangle-down", "x", "star", "hexagon", "pentagon", "bowtie")
_STAGES = {  # greys and hatching: colours are the methods'
    "vision_ms": ("vision", "#d4d7dc", ""),
    "compress_ms": ("compress", "#ffffff", "/"),
    "prefill_ms": ("prefill", "#5b6470", ""),
}


class Style:
    """Colour and marker per method: the registered ones in a fixed order, then what else the results name."""

    def __init__(self, methods: Iterable[str]):
        known = sorted(available(), key=lambda name: (is_baseline(name), name))  # papers get the clearest colours
        self._order = known + sorted({m for m in methods if m != DENSE} - set(known))

    def colour(self, method: str) -> str:
        return "#000000" if method == DENSE else _COLOURS[self._order.index(method) % len(_COLOURS)]

    def marker(self, method: str) -> str:
        return "diamond" if method == DENSE else _MARKERS[self._order.index(method) % len(_MARKERS)]


def pareto(table: TaskTable, style: Style) -> dict[str, go.Figure]:
    """Score against each of ``sections.AXES``: name of the axis -> figure."""
    figures = {}
    for axis, title in AXES.items():
        entries = [e for e in table.entries if e.cost(axis) is not None]
        if len(entries) > 1:
            figures[axis] = _pareto(table, entries, axis, title, style)
    return figures


def _pareto(table: TaskTable, entries: Sequence[Entry], axis: str, title: str, style: Style) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    scale, unit = table.scale, 1.0
    if axis == "llm_tflops" and table.small:
        unit, title = 1000.0, title.replace("tera", "giga")
    front = sorted((e for e in entries if e.front[axis]), key=lambda e: e.cost(axis))
    figure.add_scatter(
        x=[unit * e.cost(axis) for e in front],
        y=[scale * e.score for e in front],
        mode="lines",
        line={"color": "#555555", "width": 1, "shape": "hv", "dash": "dot"},
        name="Pareto front",
        hoverinfo="skip",
    )
    for method in dict.fromkeys(e.method for e in entries):
        here = [e for e in entries if e.method == method]
        figure.add_scatter(
            x=[unit * e.cost(axis) for e in here],
            y=[scale * e.score for e in here],
            mode="markers+text",
            name=_plain(method),
            text=[MARK if e.not_comparable else "" for e in here],
            textposition="top center",
            hovertext=[_named(e) for e in here],
            hovertemplate="%{hovertext}<br>%{y:.1f} at %{x:.4g}<extra></extra>",
            marker={
                "color": style.colour(method),
                "symbol": [_symbol(style.marker(method), e) for e in here],
                "size": [13 if e.front[axis] else 9 for e in here],
                "opacity": [1.0 if e.front[axis] else 0.65 for e in here],
                "line": {"color": "#000000", "width": [1.5 if e.front[axis] else 0 for e in here]},
            },
        )
    dense = table.dense
    if dense is not None:
        figure.add_hline(y=scale * dense.score, line={"color": "#000000", "width": 1, "dash": "dash"}, opacity=0.5)
    percent = " (%)" if scale == 100 else ""
    return _finish(figure, title, f"{table.entries[0].metric}{percent}", legend=False)


def stages(section: BenchSection, style: Style) -> go.Figure:
    """Stacked medians per setting."""
    import plotly.graph_objects as go

    rows = [r for r in section.rows if r.ok]
    figure = go.Figure()
    for key, (name, colour, pattern) in _STAGES.items():
        figure.add_bar(
            y=[_plain(r.label) for r in rows],
            x=[r.median(key) or 0.0 for r in rows],
            name=name,
            orientation="h",
            marker={"color": colour, "line": {"color": "#333333", "width": 0.6}, "pattern": {"shape": pattern}},
            hovertemplate="%{y}: %{x:.2f} ms<extra>" + name + "</extra>",
        )
    figure.update_layout(barmode="stack", bargap=0.35)
    figure.update_yaxes(autorange="reversed")
    return _finish(figure, "milliseconds, medians", "", height=max(260, 34 * len(rows) + 120), top=True)


def speedups(section: BenchSection, style: Style) -> go.Figure | None:
    """Speed-up against the share of the dense FLOPs that is left, with what the FLOPs alone would allow."""
    dense = section.dense
    if dense is None or not dense.tflops("llm_prefill"):
        return None
    points = [
        (r, 100 * r.tflops("llm_prefill") / dense.tflops("llm_prefill"), r.speedup)
        for r in section.rows
        if r.speedup is not None and r.tflops("llm_prefill")
    ]
    if not points:
        return None
    figure = _by_method(points, style, "%{hovertext}<br>%{y:.2f}x at %{x:.1f} % of the FLOPs<extra></extra>")
    low = min(x for _, x, _ in points)
    line = [low * (100 / low) ** (i / 60) for i in range(61)]
    figure.add_scatter(
        x=line,
        y=[100 / x for x in line],
        mode="lines",
        line={"color": "#555555", "width": 1, "dash": "dot"},
        name="what FLOPs allow",
        hoverinfo="skip",
    )
    return _finish(figure, "LLM FLOPs, % of dense", "speed-up of compress + prefill")


def against_tokens(section: BenchSection, value: str, style: Style) -> go.Figure | None:
    """``work_ms`` or ``peak_memory_bytes`` (shown in GiB) against visual tokens."""
    points = []
    for row in section.rows:
        y = row.work_ms if value == "work_ms" else row.content.get("peak_memory_bytes")
        if row.ok and y is not None and row.tokens("per_layer") is not None:
            points.append((row, row.tokens("per_layer"), y if value == "work_ms" else y / 2**30))
    if not points:
        return None
    figure = _by_method(points, style, "%{hovertext}<br>%{y:.4g} at %{x:.0f} tokens<extra></extra>")
    title = "compress + prefill, ms" if value == "work_ms" else "peak memory, GiB"
    figure.update_yaxes(rangemode="tozero")
    return _finish(figure, "visual tokens, mean over LLM layers", title)


def _by_method(points: Sequence[tuple[BenchRow, float, float]], style: Style, hover: str) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    for method in dict.fromkeys(row.method for row, _, _ in points):
        here = sorted((p for p in points if p[0].method == method), key=lambda p: p[1])
        figure.add_scatter(
            x=[x for _, x, _ in here],
            y=[y for _, _, y in here],
            mode="lines+markers+text" if len(here) > 1 else "markers+text",
            line={"color": style.colour(method), "width": 1},
            marker={
                "color": style.colour(method),
                "symbol": [_symbol(style.marker(method), row) for row, _, _ in here],
                "size": 10,
            },
            text=[MARK if row.not_comparable else "" for row, _, _ in here],
            textposition="top center",
            hovertext=[_named(row) for row, _, _ in here],
            name=_plain(method),
            hovertemplate=hover,
        )
    return figure


def _named(row: Entry | BenchRow) -> str:
    """A setting as a point says it when it is pointed at, with the mark that the tables give it."""
    return _plain(row.label) + (f"<br>{MARK}: not comparable, see the warnings" if row.not_comparable else "")


def _symbol(marker: str, row: Entry | BenchRow) -> str:
    """Hollow where the numbers are not comparable."""
    return f"{marker}-open" if row.not_comparable else marker


def _plain(text: str) -> str:
    """A name as Plotly shows it as it is: it reads tags and entities."""
    return html.escape(text, quote=False)


def _finish(figure: go.Figure, x: str, y: str, height: int = 340, legend: bool = True, top: bool = False) -> go.Figure:
    grid: dict[str, Any] = {"gridcolor": "#e6e6e6", "linecolor": "#888888", "zeroline": False, "automargin": True}
    figure.update_layout(
        template=None,
        height=height,
        margin={"l": 55, "r": 12, "t": 30 if top else 12, "b": 48},
        font={"family": "system-ui, sans-serif", "size": 12, "color": "#222222"},
        plot_bgcolor="#ffffff",
        paper_bgcolor="#ffffff",
        showlegend=legend,
        legend={
            "traceorder": "normal",
            "orientation": "h",
            "y": 1.02,
            "yanchor": "bottom",
            "x": 0,
            "font": {"size": 11},
        },
        xaxis={**grid, "title": {"text": x}},
        yaxis={**grid, "title": {"text": y}},
    )
    return figure
