"""What a result file says, as a table on screen and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from accelerate_methods.bench.results import (
    compress_share,
    dense_row,
    flops_share,
    kept_share,
    middle,
    speed_up,
    spread,
)
from accelerate_methods.bench.steadiness import MARK, busy, told
from accelerate_methods.registry.settings import DENSE

NOTE = (
    "Medians (spread: half the interquartile range). compress: all that a method adds before the LLM, its signals "
    "included (share of the dense prefill). speed-up: (compress + prefill) of dense / of the method; allowed: the same "
    "by LLM FLOPs alone."
)

_HEADERS = (
    "setting", "visual tokens", "LLM FLOPs", "vision ms", "compress ms", "prefill ms", "first token ms",
    "decode tok/s", "speed-up (allowed)", "peak memory", "KV cache",
)  # fmt: skip


def _cells(row: Mapping[str, Any], dense: Mapping[str, Any] | None) -> list[str]:
    if row["status"] != "ok":
        return [row["label"], row["status"]]
    samples, tokens = row["samples"], row["visual_tokens"]
    faster, share = speed_up(row, dense), compress_share(row, dense)
    mark = f"{MARK} " if busy(row, dense) else ""
    own = row["label"] == DENSE
    compress = _time(samples["compress_ms"])
    return [
        mark + row["label"],
        f"{tokens['per_layer']:.0f} ({kept_share(row):.1%})",
        f"{flops_share(row):.1%}",
        _time(samples["vision_ms"]),
        compress if own or share is None else f"{compress} ({share:.1%})",
        _time(samples["prefill_ms"]),
        _time(samples["first_token_ms"]),
        _time(samples["decode_tokens_per_s"]),
        "" if own or faster is None else f"{mark}{faster:.2f}x ({1 / flops_share(row):.2f}x)",
        _size(row["peak_memory_bytes"]),
        _size(row["kv_cache_bytes"]),
    ]


def _time(samples: list[float]) -> str:
    value = middle(samples)
    if value is None:
        return "-"
    digits = 0 if value >= 1000 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} ±{spread(samples):.{digits}f}"


def _size(count: int | None) -> str:
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def title(content: Mapping[str, Any]) -> str:
    model, inputs, where = content["model"], content["input"], content["machine"]
    shown = f"{inputs['frames']} frames" if inputs["kind"] == "video" else "1 image"
    text = f"{model['shape']} ({model['weights']} weights, {model['dtype']}, {model['attention']}), {shown}"
    batch = f", batch {inputs['batch']}" if inputs["batch"] > 1 else ""
    threads = f", {where['threads']} threads" if where["gpu"] is None else ""
    return f"{text} ({_source(inputs)}){batch}; {where['name']}{threads}"


def _source(inputs: Mapping[str, Any]) -> str:
    """Where pixels and features come from, in words."""
    if inputs["source"] == "made up":
        return "made-up, video-like features"
    return f"{inputs['source']}, features {inputs['features']}"


def table(content: Mapping[str, Any]) -> Group:
    """The run on screen."""
    dense = dense_row(content)
    view = Table(title=Text(title(content)), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, header in enumerate(_HEADERS):
        wrap = {"no_wrap": True} if index else {"overflow": "fold"}
        view.add_column(header.replace(" ", "\n", 1), justify="right" if index else "left", **wrap)
    failed = []
    for row in content["rows"]:
        cells = _cells(row, dense)
        if row["status"].startswith("error"):  # too long for a column
            failed.append(f"{row['label']}: {row['status']}")
            cells = [row["label"], "error"]
        view.add_row(*map(Text, cells))
    extra = told(content["rows"], dense)
    if content.get("transformers"):
        extra.append(native_line(content["transformers"]))
    return Group(view, *map(Text, (NOTE, *failed, *extra)))


def native_line(native: Mapping[str, Any]) -> str:
    """Dense ours beside transformers' own class."""
    if native["status"] != "ok":
        return f"transformers-native: {native['status']}"
    parts = []
    for name in ("prefill_ms", "forward_ms"):
        ours, theirs = middle(native["samples"][f"ours_{name}"]), middle(native["samples"][f"native_{name}"])
        parts.append(f"{name[:-3]} {ours:.1f} ms against {theirs:.1f} ms ({ours / theirs:.2f} of its time)")
    difference = native["max_logit_difference"]
    return (
        f"dense against transformers' {native['class']}, same weights, {native['prompt_tokens']} tokens: "
        f"{'; '.join(parts)}; logits differ by at most {difference:.2g}"
    )


def markdown(content: Mapping[str, Any]) -> str:
    """The table as Markdown, for docs/results."""
    dense = dense_row(content)
    lines = [f"**{title(content)}**", "", "| " + " | ".join(_HEADERS) + " |"]
    lines.append("|---|" + "---:|" * (len(_HEADERS) - 1))
    for row in content["rows"]:
        cells = _cells(row, dense)
        lines.append("| " + " | ".join([*cells, *[""] * (len(_HEADERS) - len(cells))]) + " |")
    if content.get("transformers"):
        lines += ["", native_line(content["transformers"])]
    for line in told(content["rows"], dense):
        lines += ["", line]
    return "\n".join([*lines, "", NOTE, ""])
