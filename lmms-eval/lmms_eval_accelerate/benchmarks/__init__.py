"""The data of the benchmarks on disk: what is there, and how it gets there.

A *data folder* holds everything in the layout in which lmms-eval's stock tasks find it offline (docs/benchmarks.md):

* ``<org>/<name>/``: the annotations of a data set (parquet or JSON files) and a card ``README.md`` that names them;
* ``home/``: ``HF_HOME`` of a run, with the videos in the folders where the tasks look for them;
* ``archives/``: what was downloaded to get there; can be deleted.
"""

from __future__ import annotations

from lmms_eval_accelerate.benchmarks.check import Finding, check, require
from lmms_eval_accelerate.benchmarks.layout import annotations, write_card
from lmms_eval_accelerate.benchmarks.prepare import prepare

__all__ = ["Finding", "annotations", "check", "prepare", "require", "write_card"]
