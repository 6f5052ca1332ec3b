"""The columns of both tables: what each shows, how it is rounded, and what it sorts by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from lmms_eval_accelerate.report.loyalty import kl_text
from lmms_eval_accelerate.report.sections import BenchRow, BenchSection, Entry, TaskTable
from lmms_eval_accelerate.report.statistics import p_text
from lmms_eval_accelerate.runs import no_op
from lmms_eval_accelerate.runs.long_prompts import MARK, marked

#: beginnings of the headers of columns that are relative to the dense run of the same task
_RELATIVE = ("vs dense", "95 %", "McNemar", "same answers", "first-token KL", "top-1", "LLM", "speed-up")
_RELATIVE_BENCH = ("speed-up", "overhead", "first token speed-up")


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
    first = Column(
        "setting",
        f"method and its budget; {no_op.MARK}: no effect, see the warnings",
        lambda e: e.label,
        lambda e: no_op.marked(e.label, e.no_op),
    )
    columns = [
        Column("accuracy", f"{table.entries[0].metric}", lambda e: e.score, lambda e: f"{scale * e.score:.1f}"),
        Column(
            "too long",
            "prompts longer than the model's context, whose end with the question was not read",
            lambda e: e.long_prompts.harmed,
            lambda e: e.long_prompts.count,
        ),
        Column("vs dense", "difference to the dense run", lambda e: e.change, _signed(lambda e: e.change, scale)),
        Column(
            "95 % interval",
            "paired bootstrap of the difference, documents resampled independently; bold where it excludes 0",
            lambda e: e.low,
            lambda e: None if e.low is None else f"{scale * e.low:+.1f} to {scale * e.high:+.1f}",
        ),
        Column(
            "McNemar p",
            "exact paired test where documents are right or wrong; in brackets those right in dense alone : here alone",
            lambda e: e.p_value,
            lambda e: None if e.p_value is None else f"{p_text(e.p_value)} ({e.lost} : {e.won})",
        ),
        Column("same answers", "share of answers equal to the dense run's", lambda e: e.same, _share(lambda e: e.same)),
        Column(
            "first-token KL",
            "divergence of the first token's distribution from the dense run's, in nats: mean per document of a lower "
            "bound (docs/loyalty.md)",
            _loyal("first_token_kl_mean"),
            lambda e: kl_text(_loyal("first_token_kl_mean")(e)),
        ),
        Column(
            "top-1 same",
            "share of documents whose most likely first token is the dense run's",
            _loyal("top1_agreement"),
            _share(_loyal("top1_agreement")),
        ),
        Column(
            "visual tokens",
            "mean over the LLM's layers, and the share of the uncompressed number",
            lambda e: e.costs.get("visual_tokens_per_layer"),
            lambda e: _with_share(e.costs.get("visual_tokens_per_layer"), e.kept, ".0f"),
        ),
        Column(
            "prompt tokens",
            "of a served model, which does not say how many of them are visual",
            lambda e: _of_server(e, "prompt_tokens"),
            lambda e: _number(_of_server(e, "prompt_tokens"), ".0f"),
        ),
        Column(
            "kept per sample",
            "least and most of the visual tokens that a document kept, mean over the LLM's layers",
            lambda e: e.costs.get("kept_least"),
            _range_kept,
        ),
        Column(
            "kept by layer",
            "share of the visual tokens that each LLM layer worked on, from the first to the last",
            lambda e: e.kept_by_layer and e.kept_by_layer[-1],
            lambda e: None if e.kept_by_layer is None else no_op.layers_text(e.kept_by_layer),
        ),
        Column(
            f"LLM {letter}FLOPs",
            "prefill of the LLM in multiply-accumulates, and the share of the uncompressed work",
            lambda e: e.costs.get("llm_tflops"),
            lambda e: _with_share(_over(e.costs.get("llm_tflops"), unit), e.flops_share, ".3g", ".1%"),
        ),
        Column(
            f"own {letter}FLOPs",
            "a trained architecture's modules between vision tower and LLM layers, in multiply-accumulates",
            lambda e: e.costs.get("architecture_tflops"),
            lambda e: _number(_over(e.costs.get("architecture_tflops"), unit), ".3g"),
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
            "first token ms",
            "of a served model, from the request to the first token, mean per sample",
            lambda e: _of_server(e, "first_token_ms"),
            lambda e: _number(_of_server(e, "first_token_ms"), ".1f"),
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
    columns = [_doubted(column) if column.header.startswith(_RELATIVE) else column for column in columns]
    return [first, *_filled(columns, table.entries)]


def _doubted(column: Column) -> Column:
    """The column with a mark behind numbers that are relative to a dense run that is no baseline."""

    def text(row: Entry | BenchRow) -> str | None:
        return marked(column.text(row) or "", row.not_comparable) or None

    return dataclasses.replace(column, text=text, help=f"{column.help}; {MARK}: not comparable, see the warnings")


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
    columns = [_doubted(column) if column.header in _RELATIVE_BENCH else column for column in columns]
    return [first, *_filled(columns, section.rows)]


def _filled(columns: Sequence[Column], rows: Sequence[Any]) -> list[Column]:
    return [c for c in columns if any(c.text(row) for row in rows)]


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _signed(value: Callable[[Entry], float | None], scale: float) -> Callable[[Entry], str | None]:
    return lambda row: None if value(row) is None else f"{scale * value(row):+.1f}"


def _share(value: Callable[[Any], float | None], digits: int = 0) -> Callable[[Any], str | None]:
    return lambda row: _number(value(row), f".{digits}%")


def _loyal(name: str) -> Callable[[Entry], float | None]:
    return lambda entry: None if entry.loyalty is None else getattr(entry.loyalty, name)


def _times(value: Callable[[Any], float | None]) -> Callable[[Any], str | None]:
    return lambda row: None if value(row) is None else f"{value(row):.2f}x"


def _with_share(value: float | None, share: float | None, form: str, share_form: str = ".0%") -> str | None:
    if value is None:
        return None
    return format(value, form) + ("" if share is None else f" ({share:{share_form}})")


def _range_kept(entry: Entry) -> str | None:
    least, most = (entry.costs.get(f"kept_{end}") for end in ("least", "most"))
    return None if least is None or most is None else f"{least:.1%} to {most:.1%}"


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _of_server(entry: Entry, key: str) -> float | None:
    return entry.costs.get(key) if "first_token_ms" in entry.costs else None


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
