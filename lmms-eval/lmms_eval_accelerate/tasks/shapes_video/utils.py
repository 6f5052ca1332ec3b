"""Task functions of ``shapes_video``: clips lie in assets/, answers are compared after light normalisation."""

from __future__ import annotations

import string
from collections import defaultdict
from typing import Any

from lmms_eval_accelerate.embedded import CLIPS


def doc_to_visual(doc: dict[str, Any]) -> list[str]:
    """Path of the clip, as lmms-eval's video models expect it."""
    path = CLIPS / doc["video"]
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; write it with scripts/train/tiny/build_tasks.py")
    return [str(path)]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, str] | None = None) -> str:
    extra = lmms_eval_specific_kwargs or {}
    return f"{extra.get('pre_prompt', '')}{doc['question']}{extra.get('post_prompt', '')}"


def normalise(text: str) -> str:
    """Lower case, no punctuation at the ends, single spaces."""
    return " ".join(text.lower().split()).strip(string.punctuation + " ")


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """One exact-match score, filed under all questions and under the question's type."""
    hit = float(normalise(results[0]) == normalise(doc["answer"]))
    return {"exact_match": hit, "type_mean": (doc["type"], hit), doc["type"]: hit}


def type_mean(items: list[tuple[str, float]]) -> float:
    """Mean over question types of the accuracy within the type."""
    groups: dict[str, list[float]] = defaultdict(list)
    for kind, hit in items:
        groups[kind].append(hit)
    return sum(sum(hits) / len(hits) for hits in groups.values()) / len(groups)
