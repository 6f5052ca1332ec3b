"""Run the dense model and methods one after the other through the lmms-eval command line, and compare them.

The weights are loaded once; every setting is a run of its own with its own output folder, and a failure names it. The
same ``--output`` goes on where an interrupted comparison stopped. Ends with a table, ``comparison.json`` /
``comparison.md`` and two pictures. ``--dry-run`` prints the commands.
"""

from __future__ import annotations

import argparse

from lmms_eval_accelerate.runs.options import (
    Parser,
    add_machine_options,
    add_on_long_prompt,
    documents,
    path,
    positive,
    share,
    text,
)


def parser() -> argparse.ArgumentParser:
    """The command line of ``compare``. This file loads nothing, so that ``-h`` is quick."""
    made = Parser(prog="python -m lmms_eval_accelerate.compare", description=__doc__)
    add = made.add_argument
    add("--config", type=text, default="fastvid/llava_onevision", help="config whose method and setting are run")
    add("--pretrained", type=text, help="checkpoint; default: the embedded model and benchmark")
    add("--tasks", type=text, help="comma-separated lmms-eval tasks")
    add("--methods", type=text, help='e.g. "dense fastvid@0.25 dycoke(k=0.3)"; "levels"; "all"')
    add("--retention-ratio", type=share, help="for methods given without one (default: the config's)")
    add("--match", type=text, help='equal budgets: "tokens=0.25", "layer_tokens=0.25" or "flops=0.25"')
    add("--limit", type=documents, help="documents per task; below 1: their share")
    add("--batch-size", type=positive, default=1)
    add("--model-args", default="", help="further model arguments, k=v,k=v")
    add_on_long_prompt(made)
    add("--output", type=path, help="a new folder, or that of an interrupted comparison to go on with")
    add("--picture", type=path, help="video on which the kept tokens are drawn")
    add_machine_options(made)
    add("--full", action="store_true", help="embedded benchmark: the full sets")
    add("--dry-run", action="store_true", help="print the commands only")
    return made
