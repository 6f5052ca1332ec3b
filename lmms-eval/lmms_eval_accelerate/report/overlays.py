"""Saved provenance as what the page draws: per document the frames, and per setting the state of every token."""

from __future__ import annotations

import base64
import hashlib
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from accelerate_methods.stages.errors import one_line
from lmms_eval_accelerate.report.results import ReportError, Run
from lmms_eval_accelerate.report.sections import TaskTable
from lmms_eval_accelerate.runs.files import PROVENANCE

#: what arrays that are cut or of another form raise
_DAMAGE = (OSError, ValueError, LookupError, AttributeError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)


class Pictures:
    """Film strips as data URIs, each once however many settings show it."""

    def __init__(self) -> None:
        self.uris: list[str] = []
        self._known: dict[str, int] = {}

    def add(self, path: Path) -> int:
        data = path.read_bytes()
        key = hashlib.sha256(data).hexdigest()
        if key not in self._known:
            self._known[key] = len(self.uris)
            self.uris.append("data:image/jpeg;base64," + base64.b64encode(data).decode())
        return self._known[key]


def of_table(table: TaskTable, pictures: Pictures) -> dict[str, list[dict[str, Any]]]:
    """Document -> its images and videos as each setting saw them (see :func:`_item`)."""
    documents: dict[str, list[dict[str, Any]]] = {}
    for entry in table.entries:
        for path in sorted((entry.run.folder / PROVENANCE / entry.task).glob("*.npz")):
            for item in _read(path, entry.run, pictures):
                documents.setdefault(path.stem, []).append({"setting": entry.label, **item})
    return dict(sorted(documents.items(), key=lambda pair: (len(pair[0]), pair[0])))


def _read(path: Path, run: Run, pictures: Pictures) -> list[dict[str, Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        meta = json.loads(str(arrays["meta"]))
        if meta.get("started") not in (None, run.started):
            return []  # a failed attempt in the same folder left it
        return [_item(number, facts, arrays, path, pictures) for number, facts in enumerate(meta["items"])]
    except _DAMAGE as error:
        raise ReportError(f"cannot read {path}: {type(error).__name__}: {one_line(error)}") from error


def _item(number: int, facts: dict[str, Any], arrays: dict[str, Any], path: Path, pictures: Pictures) -> dict[str, Any]:
    """One image or video.

    ``left`` and ``kept`` are base64 of [shown frames, rows, columns] bytes: the decoder layer before which the token
    left (0: not there at all), and whether an output token stands there. They are missing where tokens lie on no grid.
    ``alive`` has the number of content tokens that stand before each layer, over all frames.
    """
    owner, kept = arrays[f"owner_{number}"], arrays[f"kept_{number}"]
    layers = int(facts["num_layers"]) or 1
    left = arrays.get(f"left_at_{number}", (owner >= 0) * layers)
    merged = arrays.get(f"merged_at_{number}")
    if merged is not None:  # the row of a merged token is no more, whatever became of its content
        left = np.where(kept, np.minimum(left, merged), left)
    strip, shown = path.with_name(f"{path.stem}_{number}.jpg"), arrays.get(f"frames_{number}")
    item = {
        "item": number,
        "layers": layers,
        "before": facts["tokens_before"],
        "after": facts["tokens_after"],
        "alive": [int((kept & (left > layer)).sum()) for layer in range(layers)],
        "steps": sorted({0, *(int(v) for v in np.unique(left) if 0 < v < layers)}),
    }
    grid = facts["grid"]
    fits = grid is not None and owner.shape[1] == grid[0] * grid[1]
    if shown is None or not strip.is_file() or not fits or shown.max() >= len(owner) or layers > 255:
        return item
    item |= {"grid": grid, "frames": [int(f) for f in shown], "picture": pictures.add(strip)}
    item |= {"left": _bytes(left[shown]), "kept": _bytes(kept[shown])}
    return item


def _bytes(values: np.ndarray) -> str:
    return base64.b64encode(values.astype(np.uint8).tobytes()).decode()
