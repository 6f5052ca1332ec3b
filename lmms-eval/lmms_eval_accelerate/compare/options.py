"""Run the dense model and methods one after the other through the lmms-eval command line, and compare them.

The weights are loaded once; every setting is a run of its own with its own output folder, and a failure names it. The
same ``--output`` goes on where an interrupted comparison stopped. Ends with a table, ``comparison.json`` /
``comparison.md`` and two pictures. ``--dry-run`` prints the commands.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lmms_eval_accelerate.runs.options import add_machine_options


def parser() -> argparse.ArgumentParser:
    """The command line of ``compare``. This file loads nothing, so that ``-h`` is quick."""
    made = argparse.ArgumentParser(prog="python -m lmms_eval_accelerate.compare", description=__doc__)
    made.add_argument("--config", default="fastvid/llava_onevision", help="config whose method and setting are run")
    made.add_argument("--pretrained", help="checkpoint; default: the embedded model and benchmark")
    made.add_argument("--tasks", help="comma-separated lmms-eval tasks")
    made.add_argument("--methods", help='e.g. "dense fastvid@0.25 dycoke(k=0.3)"; "levels"; "all"')
    made.add_argument("--retention-ratio", type=float, help="for methods given without one (default: the config's)")
    made.add_argument("--limit", help="documents per task")
    made.add_argument("--batch-size", default="1")
    made.add_argument("--model-args", default="", help="further model arguments, k=v,k=v")
    made.add_argument("--output", type=Path, help="a new folder, or that of an interrupted comparison to go on with")
    made.add_argument("--picture", type=Path, help="video on which the kept tokens are drawn")
    add_machine_options(made)
    made.add_argument("--full", action="store_true", help="embedded benchmark: the full sets")
    made.add_argument("--dry-run", action="store_true", help="print the commands only")
    return made
