"""The result file of a run, and which numbers follow from which."""

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

from accelerate_methods.registry.settings import DENSE
from accelerate_methods.stages.errors import MethodError, one_line

ROOT = Path(__file__).resolve().parents[2]
CONVENTION = "multiply-accumulates (a fused multiply-add counts once), decoder layers only, attention as full square"


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
    except (OSError, ValueError, RecursionError) as error:
        raise MethodError(f"cannot read {path}: {one_line(error)}") from None
    if not isinstance(content, dict) or content.get("kind") != "efficiency" or content.get("schema") != 1:
        raise MethodError(f"{path} is not a result of `python -m accelerate_methods.bench` (schema 1).")
    fault = fault_of(content)
    if fault:
        raise MethodError(f"cannot read {path}: {fault}.")
    return content


def fault_of(content: Mapping[str, Any]) -> str:
    """What is missing in a result, or of another kind than a run writes; empty if nothing."""
    for key in ("machine", "versions", "model", "input"):
        if not isinstance(content.get(key), dict):
            return f"{key!r} is not a mapping"
    rows = content.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return "'rows' is not a list of mappings"
    for row in rows:
        for key, kind in (("label", str), ("status", str), ("samples", dict)):
            if not isinstance(row.get(key), kind):
                return f"a row without {key!r}"
        if row["status"] == "ok":
            for key in ("tflops", "visual_tokens"):
                if not isinstance(row.get(key), dict):
                    return f"the row {row['label']} has no {key!r}"
    return ""


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
