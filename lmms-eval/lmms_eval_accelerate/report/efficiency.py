"""Efficiency sections: files of the bench on one machine, model, input and software; and what joins them to runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from statistics import median

from accelerate_methods.bench.steadiness import busy
from accelerate_methods.registry.pipeline import resolve
from accelerate_methods.stages.errors import MethodError
from lmms_eval_accelerate.report.results import DENSE, Bench
from lmms_eval_accelerate.report.sections import BenchRow, BenchSection, Entry, Section, plain, ratio, warn_apart
from lmms_eval_accelerate.runs.long_prompts import MARK


def bench_sections(benches: Iterable[Bench]) -> list[BenchSection]:
    """Efficiency files grouped by machine, model, input and software."""
    groups: dict[str, list[Bench]] = {}
    for bench in benches:
        groups.setdefault(json.dumps(_bench_facts(bench), sort_keys=True), []).append(bench)
    sections = []
    for number, (key, files) in enumerate(groups.items(), 1):
        section = BenchSection(f"Efficiency {number}" if len(groups) > 1 else "Efficiency", json.loads(key), [], files)
        for index, bench in enumerate(files, 1):
            section.rows += _bench_rows(bench, f" #{index}" if index > 1 else "", section.notes)
            section.notes += _beside_transformers(bench)
        sections.append(section)
    warn_apart(sections, "measurements")
    return sections


def _bench_facts(bench: Bench) -> dict[str, str]:
    content = bench.content
    facts = {k: content["model"].get(k) for k in ("shape", "weights", "dtype", "attention")}
    facts |= {f"input {k}": v for k, v in content["input"].items()}
    facts |= {k: v for k, v in content["machine"].items()}
    facts |= {f"version of {k}": v for k, v in content["versions"].items()}
    return {k: plain(v) for k, v in facts.items()}


def _bench_rows(bench: Bench, suffix: str, notes: list[str]) -> list[BenchRow]:
    rows = [BenchRow(row["label"] + suffix, row.get("method") or DENSE, row) for row in bench.content["rows"]]
    dense = next((row for row in rows if row.method == DENSE and row.ok), None)
    if dense is None:
        notes.append(f"{bench.path.name} has no dense measurement: nothing in it is relative.")
        return rows
    over = max(((row.content.get("prompt_tokens") or {}).get("over_dense") or 0 for row in rows if row.ok), default=0)
    reason = None
    if over:
        reason = f"the uncompressed prompt is {over} tokens longer than the model's context, the dense run is of a part"
        notes.append(f"{MARK}: not comparable ({bench.path.name}): {reason}.")
    for row in rows:
        if row.ok and row is not dense:
            row.not_comparable = reason or _busy(row, dense, bench, notes)
            row.speedup = ratio(dense.work_ms, row.work_ms)
            row.first_token_speedup = ratio(dense.median("first_token_ms"), row.median("first_token_ms"))
            row.overhead = ratio(row.median("compress_ms"), dense.median("prefill_ms"))
    return rows


def _busy(row: BenchRow, dense: BenchRow, bench: Bench, notes: list[str]) -> str | None:
    """Why the row's times are not to be believed; told in the notes."""
    try:
        why = busy(row.content, dense.content)
    except (KeyError, TypeError, ZeroDivisionError):  # a file of somebody else's bench has less in it
        return None
    if why is None:
        return None
    notes.append(f"{MARK}: not comparable ({bench.path.name}): {row.label}: the machine was busy, {why}.")
    return f"the machine was busy: {why}"


def _beside_transformers(bench: Bench) -> list[str]:
    """The bench's comparison of the dense model with the same model in transformers, if it made one."""
    other = bench.content.get("transformers") or {}
    times = {key: median(values) for key, values in (other.get("samples") or {}).items() if values}
    if not {"ours_prefill_ms", "native_prefill_ms"} <= times.keys():
        return []
    text = f"dense prefill {times['ours_prefill_ms']:.1f} ms, {other.get('class')} {times['native_prefill_ms']:.1f} ms"
    if {"ours_forward_ms", "native_forward_ms"} <= times.keys():
        text += f"; with the tower {times['ours_forward_ms']:.1f} and {times['native_forward_ms']:.1f} ms"
    return [
        f"Beside transformers (medians): {text}; largest difference of a logit {other.get('max_logit_difference')}."
    ]


def join(sections: list[Section], benches: list[BenchSection]) -> None:
    """Give each entry the bench's row of the same model, number of frames, method and parameters."""
    for section in sections:
        for bench in benches:
            if not _same_model(section, bench):
                continue
            for table in section.tables:
                for entry in table.entries:
                    entry.measured = entry.measured or next((r for r in bench.rows if _same_setting(entry, r)), None)


def _same_model(section: Section, bench: BenchSection) -> bool:
    weights, shape = bench.facts["weights"], bench.facts["shape"]
    words = set(re.split(r"[^a-z0-9.]+", section.model.rsplit("/", 1)[-1].lower()))
    named = set(re.split(r"[^a-z0-9.]+", shape.lower())) <= words
    frames = section.facts.get("max_frames_num")
    video = bench.facts.get("input kind") == "video"
    if video and frames is not None and frames != bench.facts.get("input frames"):
        return False
    same = section.model == weights or section.model.endswith(f"/{weights}")  # the bench may name a path from its root
    return same or (weights == "random" and named)


def _same_setting(entry: Entry, row: BenchRow) -> bool:
    """Same method and parameters; the bench may name only those that differ from the defaults."""
    if not row.ok or entry.method != row.method:
        return False
    if row.method == DENSE:
        return True
    try:
        full = resolve(row.method, **(row.content.get("params") or {})).to_dict()
    except MethodError:  # a method of another version
        return False
    return json.loads(json.dumps(full, default=str)) == entry.run.methods
