"""The HTML page: one file, Plotly and all data inside, no network needed."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmms_eval_accelerate.report import figures, overlays
from lmms_eval_accelerate.report.columns import Column, accuracy_columns, bench_columns
from lmms_eval_accelerate.report.figures import Style
from lmms_eval_accelerate.report.results import ReportError
from lmms_eval_accelerate.report.sections import BenchSection, Section, TaskTable
from lmms_eval_accelerate.report.tables import table_title
from lmms_eval_accelerate.runs.long_prompts import MARK

_HERE = Path(__file__).parent
_GLYPHS = {  # the plots' markers as text
    **{"circle": "●", "square": "■", "triangle-up": "▲", "cross": "✚", "triangle-down": "▼", "x": "✖"},
    **{"star": "★", "hexagon": "⬢", "pentagon": "⬟", "bowtie": "⧓", "diamond": "◆"},
}
_ANSWER = 400  # characters shown of a question or answer


def render(
    title: str,
    created: str,
    command: str,
    sections: Sequence[Section],
    benches: Sequence[BenchSection],
    left_out: Sequence[str],
    max_samples: int,
) -> str:
    """The whole page.

    Args:
        max_samples: documents per task in the table of answers; those that differ from dense come first.
    """
    methods = {e.method for s in sections for t in s.tables for e in t.entries}
    style = Style(methods | {r.method for s in benches for r in s.rows})
    data: dict[str, Any] = {"plots": {}, "tasks": {}}
    pictures = overlays.Pictures()
    body = [_header(title, created, command, sections, benches, left_out)]
    for number, section in enumerate(sections):
        body.append(_section(f"a{number}", section, style, data, pictures, max_samples))
    for number, bench in enumerate(benches):
        body.append(_bench(f"e{number}", bench, style, data))
    data["pictures"] = pictures.uris
    return _PAGE.format(
        title=_text(title),
        css=(_HERE / "page.css").read_text(encoding="utf-8"),
        body="\n".join(body),
        data=_json(data),
        plotly=plotly_source() if data["plots"] else "",
        js=(_HERE / "page.js").read_text(encoding="utf-8"),
    )


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
{css}</style></head>
<body>
{body}
<script type="application/json" id="data">{data}</script>
<script>{plotly}</script>
<script>
{js}</script>
</body></html>
"""


def plotly_source() -> str:
    """The library that draws the plots, from the installed package."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ReportError("the page needs plotly: pip install -c constraints.txt plotly") from None
    return get_plotlyjs()


def _header(
    title: str,
    created: str,
    command: str,
    sections: Sequence[Section],
    benches: Sequence[BenchSection],
    left_out: Sequence[str],
) -> str:
    links = [(f"a{i}", f"{s.name}: {Path(s.model).name}") for i, s in enumerate(sections)]
    links += [(f"e{i}", f"{s.name}: {s.facts.get('shape')}") for i, s in enumerate(benches)]
    contents = " · ".join(f'<a href="#{anchor}">{_text(name)}</a>' for anchor, name in links)
    missing = "".join(f"<li>{_text(reason)}</li>" for reason in left_out)
    return (
        f'<header><h1>{_text(title)}</h1><p class="when">{_text(created)} · <code>{_text(command)}</code></p>'
        f"<nav>{contents}</nav>"
        + (f'<div class="warning"><b>Not included</b><ul>{missing}</ul></div>' if missing else "")
        + "</header>"
    )


def _section(
    anchor: str, section: Section, style: Style, data: dict[str, Any], pictures: overlays.Pictures, max_samples: int
) -> str:
    dates = sorted(d for d in ((r.started or r.summary.get("date") or "")[:19] for r in section.runs) if d)
    shown = {
        "model": section.model,
        "family": section.facts.get("family"),
        "device": section.facts.get("device"),
        "dtype": section.facts.get("dtype"),
        "attention": section.facts.get("attn_implementation"),
        "frames": section.facts.get("max_frames_num"),
        "batch size": section.facts.get("batch_size"),
        "processes": section.facts.get("world_size"),
        "prompt": f"{section.facts.get('conv_template')}, task prompts of {section.facts.get('prompt_model')}",
        "limit": section.facts.get("limit"),
        "runs": f"{len(section.runs)}, {_when(dates)}",
        "versions": _versions(section.facts),
    }
    parts = [f'<section id="{anchor}"><h2>{_text(section.name)}: {_text(Path(section.model).name)}</h2>']
    parts += [_warnings(section.warnings), _facts(shown, section.facts)]
    parts += [f'<p class="note">{_text(note)}</p>' for note in section.notes]
    adaptations = {e.label: a for t in section.tables for e in t.entries if (a := e.run.settings.get("adaptations"))}
    if adaptations:
        listed = "; ".join(
            f"{label}: {', '.join(f'{k} ({v})' for k, v in a.items())}" for label, a in adaptations.items()
        )
        parts.append(f'<p class="note">Adaptations, not the authors\' work: {_text(listed)}.</p>')
    for number, table in enumerate(section.tables):
        parts.append(_task(f"{anchor}t{number}", table, style, data, pictures, max_samples))
    return "\n".join([*parts, "</section>"])


def _task(
    anchor: str, table: TaskTable, style: Style, data: dict[str, Any], pictures: overlays.Pictures, max_samples: int
) -> str:
    parts = [f'<h3 id="{anchor}">{_text(table_title(table))}</h3>']
    parts += [f'<p class="note">{_text(note)}</p>' for note in table.notes]
    marks = [_mark(style, e.method) for e in table.entries]
    parts.append(_table(accuracy_columns(table), table.entries, marks, {"95 % interval": _excludes_zero}))
    drawn = figures.pareto(table, style)
    if drawn:
        methods = dict.fromkeys(e.method for e in table.entries)
        legend = " ".join(f"<span>{_mark(style, m)} {_text(m)}</span>" for m in methods)
        names = {f"{anchor}_{axis}": figure for axis, figure in drawn.items()}
        data["plots"].update({name: json.loads(figure.to_json()) for name, figure in names.items()})
        more = ["framed: Pareto front", "dashed: dense"]
        if any(e.not_comparable for e in table.entries):
            more.append(f"hollow, {MARK}: not comparable")
        legend += "".join(f" <span>{_text(each)}</span>" for each in more)
        parts.append(f'<div class="legend">{legend}</div>')
        parts.append('<div class="plots">' + "".join(f'<div class="plot" id="{n}"></div>' for n in names) + "</div>")
    documents = overlays.of_table(table, pictures)
    samples, total = _samples(table, max_samples)
    if samples or documents:
        data["tasks"][anchor] = {
            "labels": [e.label for e in table.entries],
            "dense": None if table.dense is None else table.entries.index(table.dense),
            "samples": samples,
            "total": total,
            "documents": documents,
        }
    if samples:
        parts.append(f'<h4>Answers</h4><div class="answers" data-task="{anchor}"></div>')
    if documents:
        parts.append(f'<h4>Kept tokens</h4><div class="overlays" data-task="{anchor}"></div>')
    return "\n".join(parts)


def _samples(table: TaskTable, limit: int) -> tuple[list[dict[str, Any]], int]:
    """Documents with every setting's answer and score, at most ``limit``; how many there are."""
    documents = {doc: sample for e in reversed(table.entries) for doc, sample in e.samples.items()}
    order = sorted(documents, key=lambda doc: (not isinstance(doc, int), doc if isinstance(doc, int) else str(doc)))
    rows = []
    for doc in order:
        answers = [None if (s := e.samples.get(doc)) is None else [_cut(s.answer), s.score] for e in table.entries]
        rows.append({"d": doc, "q": _cut(documents[doc].question), "t": _cut(documents[doc].target), "a": answers})
    if len(rows) > limit and table.dense is not None:
        dense = table.entries.index(table.dense)
        differs = [any(a and r["a"][dense] and a[1] != r["a"][dense][1] for a in r["a"]) for r in rows]
        rows = [r for r, d in zip(rows, differs, strict=True) if d] + [
            r for r, d in zip(rows, differs, strict=True) if not d
        ]
    return rows[:limit], len(rows)


def _bench(anchor: str, section: BenchSection, style: Style, data: dict[str, Any]) -> str:
    facts = section.facts
    source = facts.get("input source")
    shown = {
        "model": f"{facts.get('shape')}, weights: {facts.get('weights')}",
        "dtype": facts.get("dtype"),
        "attention": facts.get("attention"),
        "machine": facts.get("name"),
        "device": facts.get("gpu") if facts.get("gpu") not in (None, "null") else facts.get("cpu"),
        "threads": facts.get("threads"),
        "input": f"{facts.get('input kind')}, {facts.get('input frames')} frames, {source}",
        "measured": _when(sorted(str(b.content.get("created", ""))[:19] for b in section.files)),
        "versions": _versions(facts),
    }
    parts = [f'<section id="{anchor}"><h2>{_text(section.name)}: {_text(facts.get("shape"))}</h2>']
    parts += [_warnings(section.warnings), _facts(shown, facts)]
    parts += [f'<p class="note">{_text(note)}</p>' for note in section.notes]
    marks = [_mark(style, r.method) for r in section.rows]
    parts.append(_table(bench_columns(section), section.rows, marks, {}, wrap=True))
    drawn = {
        "stages": figures.stages(section, style) if any(r.ok for r in section.rows) else None,
        "speedups": figures.speedups(section, style),
        "work": figures.against_tokens(section, "work_ms", style),
        "memory": figures.against_tokens(section, "peak_memory_bytes", style),
    }
    names = {f"{anchor}_{name}": figure for name, figure in drawn.items() if figure is not None}
    data["plots"].update({name: json.loads(figure.to_json()) for name, figure in names.items()})
    parts.append('<div class="plots two">' + "".join(f'<div class="plot" id="{n}"></div>' for n in names) + "</div>")
    return "\n".join([*parts, "</section>"])


def _table(
    columns: Sequence[Column], rows: Sequence[Any], marks: Sequence[str], strong: dict[str, Any], wrap: bool = False
) -> str:
    head = "".join(f'<th title="{_text(c.help)}">{_text(c.header)}</th>' for c in columns)
    lines = []
    for row, mark in zip(rows, marks, strict=True):
        cells = []
        for index, column in enumerate(columns):
            value, bold = column.value(row), column.header in strong and strong[column.header](row)
            order = "" if value is None else f' data-v="{_text(value)}"'
            text = _text(column.text(row) or "")
            if wrap and text.endswith(")") and index:  # the range, or the share, below the number
                text = text.replace(" (", "<br><small>(", 1) + "</small>"
            cells.append(f"<td{order}>{mark + ' ' if index == 0 else ''}{f'<b>{text}</b>' if bold else text}</td>")
        lines.append("<tr>" + "".join(cells) + "</tr>")
    kind = "sortable wrap" if wrap else "sortable"
    inside = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="wide"><table class="{kind}">{inside}</table></div>'


def _excludes_zero(entry: Any) -> bool:
    return entry.low is not None and (entry.low > 0 or entry.high < 0)


def _mark(style: Style, method: str) -> str:
    return f'<span class="mark" style="color:{style.colour(method)}">{_GLYPHS[style.marker(method)]}</span>'


def _warnings(warnings: Sequence[str]) -> str:
    return "".join(f'<p class="warning">⚠ {_text(warning)}</p>' for warning in warnings)


def _facts(shown: dict[str, Any], everything: dict[str, str]) -> str:
    cells = "".join(
        f"<div><dt>{_text(key)}</dt><dd>{_text(value)}</dd></div>"
        for key, value in shown.items()
        if value not in (None, "null", "")
    )
    full = "".join(f"<tr><td>{_text(k)}</td><td>{_text(v)}</td></tr>" for k, v in everything.items())
    return f'<dl>{cells}</dl><details class="all"><summary>all settings</summary><table>{full}</table></details>'


def _versions(facts: dict[str, str]) -> str:
    names = {k.removeprefix("version of "): v for k, v in facts.items() if k.startswith("version of ")}
    return ", ".join(f"{name} {version}" for name, version in names.items())


def _when(dates: Sequence[str]) -> str:
    stamps = [d.replace("T", " ") for d in dates if d]
    return "" if not stamps else stamps[0] if stamps[0] == stamps[-1] else f"{stamps[0]} to {stamps[-1]}"


def _cut(text: str) -> str:
    return text if len(text) <= _ANSWER else text[:_ANSWER] + " …"


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _json(value: Any) -> str:
    """JSON that can stand inside a script element."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
