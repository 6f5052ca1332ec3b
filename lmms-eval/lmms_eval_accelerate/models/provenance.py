"""Which visual tokens a method kept in the first documents of each task, saved for the report (``save_provenance=N``).

A run's folder gets ``provenance/<task>/<doc id>.npz`` with, for the document's image or video number i:

* ``owner_i``, ``left_at_i``, ``merged_at_i`` [F, N] integers and ``kept_i`` [F, N] bool, as in the ``ItemRecord`` of
  ``accelerate_methods.engine.recording`` (``left_at_i`` and ``merged_at_i`` are missing where the decoder loop did not
  run);
* ``frames_i``: the frames (or views of an image) of which ``<doc id>_<i>.jpg`` shows thumbnails, side by side;
* ``meta``: JSON with task, document, method, start of the run, tokens that a prompt longer than the context lost and,
  per item, modality, counts, grid, layers, ``info``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from accelerate_methods.engine.recording import ItemRecord, RequestRecord
from accelerate_methods.stages.errors import MethodError
from lmms_eval_accelerate import session

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance

    from lmms_eval_accelerate.runs.folder import RunFolder

THUMBNAILS, SIDE = 16, 168  # frames per video, pixels


class Provenance:
    """Saves the first ``count`` documents of each task; does nothing if ``count`` is 0.

    Args:
        mean, std: per colour, that the questions' pictures were normalised with.
    """

    def __init__(self, count: int, method: str, mean: Sequence[float], std: Sequence[float]):
        self.count, self.method = count, method
        self._mean = torch.tensor(mean)[:, None, None]
        self._std = torch.tensor(std)[:, None, None]
        self._open: set[tuple[str, Any]] = set()
        self._run = run_folder() if count else None

    def choose(self, requests: Iterable[Instance]) -> None:
        """The documents with the lowest numbers, whatever the order in which they are answered."""
        if not self.count:
            return
        documents: dict[str, set[Any]] = {}
        for request in requests:
            documents.setdefault(request.metadata["task"], set()).add(request.metadata["doc_id"])
        self._open = {(task, number) for task, all_ in documents.items() for number in sorted(all_)[: self.count]}

    def save(self, questions: Sequence[Any], record: RequestRecord) -> None:
        """Write those of the ``questions`` of one call that were chosen and not saved yet."""
        for question, sample in zip(questions, record.samples, strict=False):
            if question.document not in self._open:
                continue
            self._open.remove(question.document)
            items = [item for item in sample.items if item.owner is not None]
            if items:
                self._write(*question.document, items, question.pictures, sample.cut)

    def _write(
        self, task: str, doc_id: Any, items: list[ItemRecord], pictures: Sequence[torch.Tensor], lost: int
    ) -> None:
        folder = self._run.provenance / task
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, np.ndarray] = {}
        for number, item in enumerate(items):
            for name in ("owner", "kept", "left_at", "merged_at"):
                value = getattr(item, name)
                if value is not None:
                    arrays[f"{name}_{number}"] = _small(value.cpu().numpy())
            picture = pictures[number] if number < len(pictures) else None
            # an item of Qwen-VL holds pairs of frames; of tiled images transformers' processors keep no views
            if picture is not None and len(picture) % len(item.owner) == 0:
                shown = picture[:: len(picture) // len(item.owner)]
                arrays[f"frames_{number}"] = self._draw(shown, folder / f"{doc_id}_{number}.jpg")
        meta = {"task": task, "doc_id": doc_id, "method": self.method, "started": self._run.started}
        meta["items"], meta["prompt_tokens_cut"] = [_describe(item) for item in items], lost
        np.savez_compressed(folder / f"{doc_id}.npz", meta=np.array(json.dumps(meta, default=_plain)), **arrays)

    def _draw(self, pixels: torch.Tensor, path: Path) -> np.ndarray:
        """Thumbnails of ``pixels`` [F, 3, H, W] (normalised) side by side; returns which frames they show."""
        count = len(pixels)
        shown = np.unique(np.linspace(0, count - 1, min(count, THUMBNAILS)).round().astype(int))
        strip = Image.new("RGB", (SIDE * len(shown), SIDE))
        for place, index in enumerate(shown):
            frame = (pixels[index].float().cpu() * self._std + self._mean).clamp(0, 1) * 255
            picture = Image.fromarray(frame.round().byte().permute(1, 2, 0).numpy())
            strip.paste(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (SIDE * place, 0))
        strip.save(path, quality=85)
        return shown


def run_folder() -> RunFolder:
    """The folder of the run that this process belongs to.

    Raises:
        MethodError: it has none: another command than ``lmms-eval-accelerate``, or library use.
    """
    folder = session.current().folder
    if folder is None:
        raise MethodError("save_provenance= needs a run's own folder; start the run with lmms-eval-accelerate.")
    return folder


def _describe(item: ItemRecord) -> dict[str, Any]:
    return {
        "modality": item.modality,
        "tokens_before": item.tokens_before,
        "tokens_after": item.tokens_after,
        "grid": item.grid,
        "num_layers": item.num_layers,
        "info": item.info,
    }


def _small(values: np.ndarray) -> np.ndarray:
    if values.dtype == bool:
        return values
    return values.astype(np.int16 if values.max(initial=0) < 2**15 else np.int32)


def _plain(value: Any) -> Any:
    """JSON for what a method may say in ``info``."""
    return value.tolist() if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) else str(value)
