"""The result file of a run, what it says in a table, and which numbers follow from which."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from accelerate_methods.registry.settings import DENSE
from accelerate_methods.stages.errors import MethodError

ROOT = Path(__file__).resolve().parents[2]
CONVENTION = "multiply-accumulates (a fused multiply-add counts once), decoder layers only, attention as full square"
NOTE = (
    "Medians (spread: half the interquartile range). compress: all that a method adds before the LLM, its signals "
    "included (share of the dense prefill). speed-up: (compress + prefill) of dense / of the method; allowed: the same "
    "by LLM FLOPs alone."
)


def machine(device: Any) -> dict[str, Any]:
    """What the run was made on."""
    import torch

    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu, memory = properties.name, properties.total_memory
    else:
        found = re.search(r"MemTotal:\s+(\d+)", _read("/proc/meminfo"))
        memory = int(found[1]) * 1024 if found else None
    model = re.search(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo"))
    return {
        "name": gpu or (model[1] if model else platform.processor() or "CPU"),
        "device": str(device),
        "cpu": model[1] if model else platform.processor() or "unknown",
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "memory_bytes": memory,
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def versions() -> dict[str, str]:
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate_methods": _own_version(),
    }


def _own_version() -> str:
    """The commit of this checkout, or the version of the installed package."""
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    try:
        return importlib.metadata.version("mllm-accelerate")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def report(device: Any, model: Mapping[str, Any], inputs: Mapping[str, Any], rows: list[dict[str, Any]]) -> dict:
    """The content of a result file."""
    return {
        "kind": "efficiency",
        "schema": 1,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "machine": machine(device),
        "versions": versions(),
        "tflops_convention": CONVENTION,
        "model": dict(model),
        "input": dict(inputs),
        "rows": rows,
    }


def write(content: Mapping[str, Any], folder: Path) -> Path:
    """``<timestamp>_<model>.json`` in ``folder``; a name that is taken gets a number."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.fromisoformat(content["created"]).strftime("%Y%m%d-%H%M%S")
    name = re.sub(r"[^\w.-]+", "-", str(content["model"]["shape"])).strip("-")
    text = json.dumps(content, indent=1) + "\n"
    for number in range(1, 1000):
        path = folder / f"{stamp}_{name}{f'_{number}' if number > 1 else ''}.json"
        try:
            with path.open("x", encoding="utf-8") as target:  # never over an older result
                target.write(text)
        except FileExistsError:
            continue
        return path
    raise FileExistsError(f"{folder} holds too many results called {stamp}_{name}")


def read(path: str | Path) -> dict[str, Any]:
    """A result file; an error says what is wrong with another one."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MethodError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict) or content.get("kind") != "efficiency" or content.get("schema") != 1:
        raise MethodError(f"{path} is not a result of `python -m accelerate_methods.bench` (schema 1).")
    return content


# -- numbers ----------------------------------------------------------------------------------------------------------


def middle(samples: list[float]) -> float | None:
    return statistics.median(samples) if samples else None


def spread(samples: list[float]) -> float:
    """Half the interquartile range."""
    if len(samples) < 2:
        return 0.0
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return (third - first) / 2


def work_ms(row: Mapping[str, Any]) -> list[float]:
    """Compression + prefill of every sample."""
    samples = row["samples"]
    return [a + b for a, b in zip(samples["compress_ms"], samples["prefill_ms"], strict=True)]


def dense_row(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The dense row, if it was measured."""
    return next((r for r in content["rows"] if r["label"] == DENSE and r["status"] == "ok"), None)


def flops_share(row: Mapping[str, Any]) -> float:
    """LLM prefill work relative to the uncompressed prompt."""
    return row["tflops"]["llm_prefill"] / row["tflops"]["llm_prefill_dense"]


def kept_share(row: Mapping[str, Any]) -> float:
    """Visual tokens relative to the uncompressed prompt, mean over the LLM's layers."""
    return row["visual_tokens"]["per_layer"] / row["visual_tokens"]["before"]


def speed_up(row: Mapping[str, Any], dense: Mapping[str, Any] | None) -> float | None:
    """Compression + prefill of the dense run over those of ``row``: a method has to pay for itself."""
    if dense is None or not row["samples"]["prefill_ms"]:
        return None
    return middle(work_ms(dense)) / middle(work_ms(row))


def compress_share(row: Mapping[str, Any], dense: Mapping[str, Any] | None) -> float | None:
    """The method's work before the LLM, relative to the dense prefill."""
    if dense is None or not row["samples"]["compress_ms"]:
        return None
    return middle(row["samples"]["compress_ms"]) / middle(dense["samples"]["prefill_ms"])


# -- table ------------------------------------------------------------------------------------------------------------

_HEADERS = (
    "setting", "visual tokens", "LLM FLOPs", "vision ms", "compress ms", "prefill ms", "first token ms",
    "decode tok/s", "speed-up (allowed)", "peak memory", "KV cache",
)  # fmt: skip


def _cells(row: Mapping[str, Any], dense: Mapping[str, Any] | None) -> list[str]:
    if row["status"] != "ok":
        return [row["label"], row["status"]]
    samples, tokens = row["samples"], row["visual_tokens"]
    faster, share = speed_up(row, dense), compress_share(row, dense)
    own = row["label"] == DENSE
    compress = _time(samples["compress_ms"])
    return [
        row["label"],
        f"{tokens['per_layer']:.0f} ({kept_share(row):.1%})",
        f"{flops_share(row):.1%}",
        _time(samples["vision_ms"]),
        compress if own or share is None else f"{compress} ({share:.1%})",
        _time(samples["prefill_ms"]),
        _time(samples["first_token_ms"]),
        _time(samples["decode_tokens_per_s"]),
        "" if own or faster is None else f"{faster:.2f}x ({1 / flops_share(row):.2f}x)",
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
    view = Table(title=title(content), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, header in enumerate(_HEADERS):
        wrap = {"no_wrap": True} if index else {"overflow": "fold"}
        view.add_column(header.replace(" ", "\n", 1), justify="right" if index else "left", **wrap)
    failed = []
    for row in content["rows"]:
        cells = _cells(row, dense)
        if row["status"].startswith("error"):  # too long for a column
            failed.append(f"{row['label']}: {row['status']}")
            cells = [row["label"], "error"]
        view.add_row(*cells)
    extra = []
    if content.get("transformers"):
        extra.append(native_line(content["transformers"]))
    return Group(view, NOTE, *failed, *extra)


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
    return "\n".join([*lines, "", NOTE, ""])
