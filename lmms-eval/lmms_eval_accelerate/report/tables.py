"""The numbers as CSV (raw) and as Markdown (rounded, as on the page)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

from lmms_eval_accelerate.report.columns import Column, accuracy_columns, bench_columns
from lmms_eval_accelerate.report.sections import BenchSection, Entry, Section, TaskTable


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
            "mcnemar_p": entry.p_value,
            "n_lost": entry.lost,
            "n_won": entry.won,
            "n_paired": entry.paired or None,
            "same_answers": entry.same,
            **_loyalty(entry),
            "visual_tokens_share": entry.kept,
            "llm_flops_share": entry.flops_share,
            "speedup": entry.speedup,
            "kept_by_layer": entry.kept_by_layer and json.dumps([round(share, 6) for share in entry.kept_by_layer]),
            "no_op": entry.no_op,
            "not_comparable": entry.not_comparable,
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
            "not_comparable": row.not_comparable,
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


def _loyalty(entry: Entry) -> dict[str, Any]:
    """Columns of the first token's distribution; none for runs that logged none."""
    found = entry.loyalty
    if found is None or not found.distributions:
        return {}
    return {
        "first_token_kl_mean": found.first_token_kl_mean,
        "first_token_kl_median": found.first_token_kl_median,
        "first_token_top1_same": found.top1_agreement,
        "first_token_unresolved": found.unresolved,
        "n_first_token": found.distributions,
    }


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    fields = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
