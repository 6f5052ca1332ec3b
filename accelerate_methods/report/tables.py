"""The numbers: columns of both tables, as CSV (raw) and as Markdown (rounded, as on the page)."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .sections import BenchRow, BenchSection, Entry, Section, TaskTable


@dataclasses.dataclass(frozen=True)
class Column:
    """A column: its header, what it means, the number it sorts by and the text it shows (None: an empty cell)."""

    header: str
    help: str
    value: Callable[[Any], Any]
    text: Callable[[Any], str | None]


def accuracy_columns(table: TaskTable) -> list[Column]:
    """Columns for one task; those without any number are left out."""
    scale = table.scale
    unit, letter = (1e-3, "G") if table.small else (1.0, "T")
    first = Column("setting", "method and its budget", lambda e: e.label, lambda e: e.label)
    columns = [
        Column("accuracy", f"{table.entries[0].metric}", lambda e: e.score, lambda e: f"{scale * e.score:.1f}"),
        Column("vs dense", "difference to the dense run", lambda e: e.change, _signed(lambda e: e.change, scale)),
        Column(
            "95 % interval",
            "paired bootstrap of the difference, documents resampled independently; bold where it excludes 0",
            lambda e: e.low,
            lambda e: None if e.low is None else f"{scale * e.low:+.1f} to {scale * e.high:+.1f}",
        ),
        Column("same answers", "share of answers equal to the dense run's", lambda e: e.same, _share(lambda e: e.same)),
        Column(
            "visual tokens",
            "mean over the LLM's layers, and the share of the uncompressed number",
            lambda e: e.costs.get("visual_tokens_per_layer"),
            lambda e: _with_share(e.costs.get("visual_tokens_per_layer"), e.kept, ".0f"),
        ),
        Column(
            f"LLM {letter}FLOPs",
            "prefill of the LLM in multiply-accumulates, and the share of the uncompressed work",
            lambda e: e.costs.get("llm_tflops"),
            lambda e: _with_share(_over(e.costs.get("llm_tflops"), unit), e.flops_share, ".3g", ".1%"),
        ),
        _cost("vision ms", "vision tower and projector, mean per sample", "vision_ms"),
        _cost("compress ms", "the method's own work before the LLM, mean per sample", "compress_ms"),
        _cost("prefill ms", "prefill of the LLM with the method's work inside it, mean per sample", "prefill_ms"),
        Column(
            "speed-up",
            "(compress + prefill) of dense / that of this setting",
            lambda e: e.speedup,
            _times(lambda e: e.speedup),
        ),
        Column(
            "decode ms/token",
            "per generated token after the first",
            lambda e: e.decode_ms,
            lambda e: None if e.decode_ms is None else f"{e.decode_ms:.2f}",
        ),
        Column(
            "bench ms",
            "compress + prefill in the efficiency bench of this model shape (median)",
            lambda e: e.measured and e.measured.work_ms,
            lambda e: None if e.measured is None else _number(e.measured.work_ms, ".1f"),
        ),
        Column(
            "bench speed-up",
            "the same relative to the bench's dense run",
            lambda e: e.measured and e.measured.speedup,
            _times(lambda e: e.measured and e.measured.speedup),
        ),
    ]
    return [first, *_filled(columns, table.entries)]


def bench_columns(section: BenchSection) -> list[Column]:
    """Columns for one efficiency section."""
    gib, mib = 1 / 2**30, 1 / 2**20
    small = all((r.tflops("llm_prefill") or 0.0) < 0.1 for r in section.rows)
    first = Column("setting", "method and its budget", lambda r: r.label, lambda r: r.label)
    columns = [
        Column("status", "", lambda r: r.content.get("status"), lambda r: None if r.ok else r.content["status"]),
        Column(
            "visual tokens",
            "mean over the LLM's layers, and the share of the uncompressed number",
            lambda r: r.tokens("per_layer"),
            lambda r: _with_share(r.tokens("per_layer"), _over(r.tokens("per_layer"), r.tokens("before")), ".0f"),
        ),
        _work("LLM {}FLOPs", "prefill of the LLM, multiply-accumulates, three-matrix FFN", "llm_prefill", small),
        _work("papers' {}FLOPs", "prefill of the LLM by the papers' two-matrix formula", "llm_prefill_papers", small),
        _work("tower {}FLOPs", "vision tower", "tower", small),
        _work("method {}FLOPs", "the method's own work", "method", small),
        _stage("vision ms", "vision tower and projector", "vision_ms"),
        _stage("compress ms", "the method's own work before the LLM", "compress_ms"),
        _stage("prefill ms", "prefill of the LLM with the method's work inside it", "prefill_ms"),
        Column(
            "speed-up",
            "(compress + prefill) of dense / that of this setting, medians of one process",
            lambda r: r.speedup,
            _times(lambda r: r.speedup),
        ),
        Column("overhead", "compress ms / prefill ms of dense", lambda r: r.overhead, _share(lambda r: r.overhead, 1)),
        _stage("first token ms", "from pixels to the first token", "first_token_ms"),
        Column(
            "first token speed-up",
            "dense / this setting",
            lambda r: r.first_token_speedup,
            _times(lambda r: r.first_token_speedup),
        ),
        _stage("decode tokens/s", "", "decode_tokens_per_s"),
        _bytes("peak memory GiB", "most memory allocated on the device", "peak_memory_bytes", gib, ".2f"),
        _bytes("KV cache MiB", "keys and values after prefill", "kv_cache_bytes", mib, ".1f"),
    ]
    return [first, *_filled(columns, section.rows)]


def accuracy_csv(sections: Sequence[Section]) -> str:
    """A row per setting and task, raw numbers."""
    rows = [
        {
            "section": section.name,
            "model": section.model,
            "task": table.task,
            "variant": table.variant.strip(" ()"),
            "setting": entry.label,
            "methods": json.dumps(entry.run.methods),
            "metric": entry.metric,
            "n": entry.documents,
            "score": entry.score,
            "change": entry.change,
            "interval_low": entry.low,
            "interval_high": entry.high,
            "n_paired": entry.paired or None,
            "same_answers": entry.same,
            "visual_tokens_share": entry.kept,
            "llm_flops_share": entry.flops_share,
            "speedup": entry.speedup,
            "decode_ms_per_token": entry.decode_ms,
            "bench_work_ms": entry.measured and entry.measured.work_ms,
            "bench_speedup": entry.measured and entry.measured.speedup,
            **{f"pareto_{axis}": entry.front.get(axis) for axis in entry.front},
            **entry.costs,
            "folder": str(entry.run.folder),
        }
        for section in sections
        for table in section.tables
        for entry in table.entries
    ]
    return _csv(rows)


def bench_csv(sections: Sequence[BenchSection]) -> str:
    """A row per setting, medians of the measured times; the raw samples stay in the efficiency files."""
    stages = ("vision_ms", "compress_ms", "prefill_ms", "first_token_ms", "decode_tokens_per_s")
    rows = [
        {
            "section": section.name,
            "model": section.facts.get("shape"),
            "machine": section.facts.get("name"),
            "setting": row.label,
            "method": row.method,
            "params": json.dumps(row.content.get("params") or {}),
            "status": row.content.get("status"),
            **{f"visual_tokens_{name}": row.tokens(name) for name in ("before", "after", "per_layer")},
            **{f"tflops_{name}": value for name, value in (row.content.get("tflops") or {}).items()},
            **{name: row.median(name) for name in stages},
            "repetitions": len(row.times("prefill_ms")),
            "speedup": row.speedup,
            "first_token_speedup": row.first_token_speedup,
            "overhead": row.overhead,
            "peak_memory_bytes": row.content.get("peak_memory_bytes"),
            "kv_cache_bytes": row.content.get("kv_cache_bytes"),
        }
        for section in sections
        for row in section.rows
    ]
    return _csv(rows)


def markdown(title: str, sections: Sequence[Section], benches: Sequence[BenchSection], left_out: Sequence[str]) -> str:
    """The tables of the page."""
    lines = [f"# {title}", ""]
    lines += [f"> Not included: {reason}" for reason in left_out] + ([""] if left_out else [])
    for section in sections:
        lines += _heading(section.name + ": " + section.model, section.warnings, section.facts)
        lines += [*(f"* {note}" for note in section.notes), ""] if section.notes else []
        for table in section.tables:
            lines += [f"### {table_title(table)}", "", *_grid(accuracy_columns(table), table.entries)]
            lines += [*(f"* {note}" for note in table.notes), ""]
    for section in benches:
        shape = section.facts.get("shape", "")
        lines += _heading(f"{section.name}: {shape} on {section.facts.get('name')}", section.warnings, section.facts)
        lines += [*_grid(bench_columns(section), section.rows), *(f"* {note}" for note in section.notes), ""]
    return "\n".join(lines)


def table_title(table: TaskTable) -> str:
    counts = sorted({e.documents for e in table.entries})
    before = sorted(
        {round(e.costs["visual_tokens_before"]) for e in table.entries if "visual_tokens_before" in e.costs}
    )
    tokens = f", {_span(before)} visual tokens per document" if before else ""
    return f"{table.task}{table.variant}: {table.entries[0].metric}, n = {_span(counts)}{tokens}"


def _span(values: Sequence[int]) -> str:
    return f"{values[0]}" if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _heading(title: str, warnings: Iterable[str], facts: dict[str, str]) -> list[str]:
    listed = ", ".join(f"{key}: {value}" for key, value in facts.items() if value not in ("null", ""))
    return [f"## {title}", "", *(f"> **Warning.** {warning}" for warning in warnings), f"({listed})", ""]


def _grid(columns: Sequence[Column], rows: Sequence[Any]) -> list[str]:
    lines = ["| " + " | ".join(c.header for c in columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    for row in rows:
        lines.append("| " + " | ".join((c.text(row) or "").replace("|", "\\|") for c in columns) + " |")
    return [*lines, ""]


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    fields = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _filled(columns: Sequence[Column], rows: Sequence[Any]) -> list[Column]:
    return [c for c in columns if any(c.text(row) for row in rows)]


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _signed(value: Callable[[Entry], float | None], scale: float) -> Callable[[Entry], str | None]:
    return lambda row: None if value(row) is None else f"{scale * value(row):+.1f}"


def _share(value: Callable[[Any], float | None], digits: int = 0) -> Callable[[Any], str | None]:
    return lambda row: _number(value(row), f".{digits}%")


def _times(value: Callable[[Any], float | None]) -> Callable[[Any], str | None]:
    return lambda row: None if value(row) is None else f"{value(row):.2f}x"


def _with_share(value: float | None, share: float | None, form: str, share_form: str = ".0%") -> str | None:
    if value is None:
        return None
    return format(value, form) + ("" if share is None else f" ({share:{share_form}})")


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _cost(header: str, help_: str, key: str) -> Column:
    return Column(header, help_, lambda e: e.costs.get(key), lambda e: _number(e.costs.get(key), ".1f"))


def _work(header: str, help_: str, key: str, small: bool) -> Column:
    """Of the bench's tera multiply-accumulates, in giga for a small model."""

    def text(row: BenchRow) -> str | None:
        value = row.tflops(key)
        if value is None:
            return None
        shown = value * 1000 if small else value
        return "<0.001" if 0 < shown < 0.001 else f"{shown:.3g}"

    return Column(header.format("G" if small else "T"), help_, lambda r: r.tflops(key), text)


def _stage(header: str, help_: str, key: str) -> Column:
    help_ = f"{help_}; median, and the range of all repetitions".lstrip("; ")
    return Column(header, help_, lambda r: r.median(key), lambda r: _median_and_range(r, key))


def _median_and_range(row: BenchRow, key: str) -> str | None:
    values = row.times(key)
    if not values:
        return None
    spread = f" ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else ""
    return f"{row.median(key):.1f}{spread}"


def _bytes(header: str, help_: str, key: str, unit: float, form: str) -> Column:
    def value(row: BenchRow) -> float | None:
        raw = row.content.get(key)
        return None if raw is None else raw * unit

    return Column(header, help_, value, lambda r: _number(value(r), form))
