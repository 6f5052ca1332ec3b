"""examples/quickstart.py as a notebook: a cell per paragraph."""

from __future__ import annotations

import json
from pathlib import Path

_SOURCE = Path("examples/quickstart.py")
_FIRST = "import os\n\nif not os.path.isdir(\"assets\"):  # the notebook's own folder\n    os.chdir(\"..\")"


def files() -> dict[Path, str]:
    text = (Path(__file__).resolve().parents[2] / _SOURCE).read_text(encoding="utf-8")
    _, words, code = text.split('"""', 2)
    title = words.strip().split("\n")[0]
    intro = f"# Quick start\n\n{title} Run it from a checkout, after `bash scripts/test.sh` or an install."
    cells = [_cell("markdown", intro)]
    cells += [_cell("code", part.strip("\n")) for part in (_FIRST, *code.strip("\n").split("\n\n"))]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    content = {
        "cells": cells,
        "metadata": {"language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return {_SOURCE.with_suffix(".ipynb"): json.dumps(content, indent=1) + "\n"}


def _cell(kind: str, text: str) -> dict:
    cell = {"cell_type": kind, "metadata": {}, "source": text.splitlines(keepends=True)}
    return cell if kind == "markdown" else {**cell, "execution_count": None, "outputs": []}
