"""Made-up runs for the tests of ``reproduce``: a table file, and what finished runs leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lmms_eval_accelerate.distributions import pack
from lmms_eval_accelerate.reproduce.plan import Unit

DATE = "20260101_000000"

TABLE = """
table: {name}
title: "A made-up table"
paper: "nobody (2026)"
source: tests
parts:
  - name: seven
    model: {{family: llava_onevision, pretrained: {pretrained}, max_frames_num: 8, conv_template: qwen_1_5}}
    checkpoint: {{hidden_size: 3584, num_hidden_layers: 28}}
    columns:
{columns}
    rows:
      - {{name: dense, published: {{{dense}}}}}
      - {{name: FastV 50 %, method: fastv, params: {{k: 2, retention_ratio: 0.5}}, published: {{{fastv}}}, tflops: 1.5}}
      - {{name: Random, method: random, params: {{retention_ratio: 0.25}}, secondary: true}}
      - {{name: Lost, not_run: its code was never released, published: {{{lost}}}}}
"""


def write_table(
    folder: Path,
    columns: dict[str, str] | None = None,
    published: dict[str, dict[str, float]] | None = None,
    pretrained: str = "org/llava-onevision-qwen2-7b-ov",
) -> Path:
    """A table with a dense row, FastV, a baseline and a row that cannot be run. ``columns``: title -> YAML."""
    columns = columns or {"Video": "{benchmark: shapes_video}", "VideoMME": "{benchmark: videomme}"}
    published = published or {
        "dense": {"Video": 50.0, "VideoMME": 40.0},
        "fastv": {"Video": 45.0, "VideoMME": 40.0},
        "lost": {"Video": 10.0},
    }

    def numbers(row: str) -> str:
        return ", ".join(f"{title}: {value}" for title, value in published.get(row, {}).items() if title in columns)

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "made_up.yaml"
    content = TABLE.format(
        name="made_up",
        pretrained=pretrained,
        columns="\n".join(f"      {title}: {column}" for title, column in columns.items()),
        **{row: numbers(row) for row in ("dense", "fastv", "lost")},
    )
    path.write_text(content, encoding="utf-8")
    return path


def documents(scores: list[float], metric: str = "exact_match", **more: Any) -> list[dict[str, Any]]:
    """Lines of a samples file whose metric is a number; the answer is "yes" where it is not 0."""
    return [
        {
            "doc_id": n,
            "input": f"question {n}?",
            "target": "yes",
            "filtered_resps": ["yes" if score else "no"],
            metric: score,
        }
        | more
        for n, score in enumerate(scores)
    ]


def with_first_tokens(lines: list[dict[str, Any]], logprobs: list[float]) -> list[dict[str, Any]]:
    """The lines with the same distribution of the first token each: tokens 0, 1, ... and nothing else."""
    packed = pack(range(len(logprobs)), logprobs, float("-inf"))
    return [{**line, "token_counts": [{"first_token": packed, "prompt_tokens": 10}]} for line in lines]


def write_run(
    unit: Unit,
    lines: dict[str, list[dict[str, Any]]],
    metrics: dict[str, dict[str, float]],
    kept: float = 1.0,
    **changes: Any,
) -> Path:
    """What the plugin leaves of a finished ``unit``; ``lines``, ``metrics`` by (sub)task, ``kept`` share of tokens."""
    identity = unit.identity
    arguments = {k: v for k, v in identity["model_args"].items() if k not in ("method", "k", "retention_ratio")}
    settings = {
        "methods": identity["methods"],
        "method": "+".join(m["method"] for m in identity["methods"]) or "dense",
        "config": None,
        "batch_size": identity["batch_size"],
        "world_size": identity["processes"] * identity["machines"],
        "dtype": "torch.float32",
        "adaptations": {},
        **arguments,
    }
    costs = {
        task: {
            "samples": len(own),
            "skipped": 0,
            "measured": len(own),
            "visual_tokens_before": 100.0,
            "visual_tokens_after": 100.0 * kept,
            "visual_tokens_per_layer": 100.0 * kept,
            "llm_tflops_dense": 2.0,
            "llm_tflops": 2.0 * kept,
            "vision_ms": 5.0,
            "compress_ms": 0.0 if unit.dense else 1.0,
            "prefill_ms": 10.0 * kept,
            "decode_ms": 6.0,
            "generated_tokens": 3.0,
        }
        for task, own in lines.items()
    }
    summary = {
        "model": identity["model"],
        "methods": identity["methods"],
        "tasks": metrics,
        "n_samples": {task: len(own) for task, own in lines.items()},
        "costs": {"overall": next(iter(costs.values())), "by_task": costs},
        "settings": settings,
        "limit": None if identity["limit"] is None else float(identity["limit"]),
        "date": DATE,
        "versions": identity["versions"],
        "code": identity["code"],
        "checkpoint": {"hidden_size": 3584, "num_hidden_layers": 28},
        "warnings": [],
    } | changes
    (unit.folder / "model").mkdir(parents=True)
    for task, own in lines.items():
        text = "".join(json.dumps(line) + "\n" for line in own)
        (unit.folder / "model" / f"{DATE}_samples_{task}.jsonl").write_text(text, encoding="utf-8")
    path = unit.folder / "summary.json"
    path.write_text(json.dumps(summary), encoding="utf-8")
    return path
