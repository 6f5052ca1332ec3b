"""Task functions of ``easy_vqa``: questions lie in assets/, images in the installed package ``easy-vqa``."""

from __future__ import annotations

import functools
import string
from typing import Any

from PIL import Image


@functools.cache
def _paths() -> dict[int, str]:
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError("the easy_vqa tasks read their images from a package: pip install easy-vqa") from error
    return {int(key): str(path) for key, path in easy_vqa.get_test_image_paths().items()}


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    with Image.open(_paths()[int(doc["image"])]) as image:
        return [image.convert("RGB")]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, str] | None = None) -> str:
    extra = lmms_eval_specific_kwargs or {}
    return f"{extra.get('pre_prompt', '')}{doc['question']}{extra.get('post_prompt', '')}"


def normalise(text: str) -> str:
    """Lower case, no punctuation at the ends, single spaces."""
    return " ".join(text.lower().split()).strip(string.punctuation + " ")


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """One exact-match score, filed under all questions and under the kind of answer."""
    hit = float(normalise(results[0]) == normalise(doc["answer"]))
    return {"exact_match": hit, doc["type"]: hit}
