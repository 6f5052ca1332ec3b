"""``python -m lmms_eval_accelerate.reproduce TABLE``: a paper's table with our numbers beside it.

Runs the dense model and the table's rows in the same setting, every row and task once, with one loading of the weights,
and prints measured, published, difference and relative to dense with paired intervals. Everything is stored; the same
command goes on where it stopped. ``leaderboard`` in TABLE's place makes the leaderboard from stored outcomes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from accelerate_methods.registry.configs import CONFIG_DIR
from lmms_eval_accelerate.runs.options import Parser, add_machine_options, add_on_long_prompt, path, positive, text

FOLDER = CONFIG_DIR / "reproduce"


def available() -> list[str]:
    """Names of the tables that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def own_and_extra(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments before ``--``, and those behind it, which go to lmms-eval."""
    argv = list(argv)
    return (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])


def parser() -> argparse.ArgumentParser:
    """The command line of ``reproduce``. This file loads next to nothing, so that ``-h`` is quick."""
    made = Parser(
        prog="python -m lmms_eval_accelerate.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Arguments after -- go to lmms-eval. Tables: " + ", ".join(available()),
        allow_abbrev=False,
    )
    add = made.add_argument
    add("table", nargs="?", help="name of a file of configs/reproduce/, or a path; or 'leaderboard'")
    add("--list", action="store_true", help="the tables, or the parts, rows and columns of TABLE")
    add("--part", type=text, help="one part (model) of the table; default: all")
    add("--rows", nargs="+", type=text, metavar="ROW", help="row names, or methods for all their rows; dense always")
    add("--columns", nargs="+", type=text, metavar="COLUMN", help="column titles; default: all that can be measured")
    add("--match", type=text, help='equal budgets for all methods: "tokens=0.25", "layer_tokens=...", "flops=..."')
    add("--limit", type=positive, help="first N documents per task; not the paper's numbers then")
    add("--pretrained", type=text, help="another checkpoint (folder or hub name), or 'embedded': the tiny model")
    add("--output", type=path, help="default: outputs/reproduce/<table>_<hash of the choices>")
    add("--batch-size", type=positive, default=1)
    add("--model-args", default="", help="further model arguments of all rows, k=v,k=v")
    add_on_long_prompt(made)
    add_machine_options(made)
    add("--dry-run", action="store_true", help="print the commands and what would be used again")
    return made
