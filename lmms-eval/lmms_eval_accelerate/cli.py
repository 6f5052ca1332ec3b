"""``lmms-eval-accelerate``: the command line of lmms-eval with an honest exit code and a folder of its own per run.

All arguments are lmms-eval's own, their names written in full, and go through to it. What this command adds:

* every run writes into a fresh folder (``--output_path``, or ``logs/<time>_<model>_<hash>``), samples included;
* our tasks are found (``--include_path`` of the user comes on top);
* a run that fails, on any rank, ends with exit code 1 and the reason (lmms-eval prints it and exits 0);
* a run that succeeds leaves ``summary.json`` and ``efficiency.json``: metrics, mean costs over all ranks, settings;
* on a machine without CUDA, several processes work (``torchrun --nproc_per_node 2 -m lmms_eval_accelerate ...``);
* a task that yields no number is a failure, unless ``--allow_no_score`` says it is a submission task;
* ``--use_cache`` is refused (cached answers have no costs) unless ``--allow_cache`` is given as well;
* ``--resume`` goes on with a run that was interrupted: the answers that it gave are kept in its folder;
* ``--runs PLAN.json`` does a series of runs with one loading of the weights, see ``runs/series.py``.
"""

from __future__ import annotations

import os
import sys
import textwrap

from lmms_eval_accelerate.manifest import ANY_METHOD, TRAINED, model_ids
from lmms_eval_accelerate.runs.command_line import own_parser
from lmms_eval_accelerate.runs.evaluation import run_evaluation, stock_command
from lmms_eval_accelerate.runs.fingerprint import code_hash
from lmms_eval_accelerate.session import session

_SUBCOMMANDS = ("tasks", "models", "ui", "serve", "power", "version", "tui", "mcp")
_HELP = {"-h", "--help"}
_INDENT = {"initial_indent": "    ", "subsequent_indent": "    ", "break_on_hyphens": False}


def main(argv: list[str] | None = None) -> None:
    """Entry point; always ends with ``SystemExit`` of the right code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in _HELP:
        show_help()
        sys.exit(0)
    if argv[0] in _SUBCOMMANDS:
        stock_command(argv)
        if argv[0] == "models" and not _HELP & set(argv):
            show_models()
        sys.exit(0)
    if argv[0] == "eval":
        argv = argv[1:] or ["--help"]  # not lmms-eval's wizard, whose runs would have no folder
    if argv[0] != "--runs" and _HELP & set(argv):
        stock_command(["eval", *argv])
        sys.exit(0)
    _prepare_environment()
    code_hash()  # of the code that is imported now: what is edited while runs go on is not what makes them
    if argv[0] == "--runs":
        from lmms_eval_accelerate.runs.series import main as series

        series(argv[1:])
    else:
        with session() as shared:
            run_evaluation(argv, shared)
    sys.exit(0)


def show_help() -> None:
    """What this command adds to lmms-eval. lmms-eval's own help takes seconds to make: it loads torch."""
    print(__doc__)
    parser = own_parser()
    parser.prog = "lmms-eval-accelerate"
    parser.usage = "%(prog)s --model ID --model_args k=v,... --tasks NAME,... [options]"
    parser.epilog = f"All options of lmms-eval: {parser.prog} eval --help. Other commands: {', '.join(_SUBCOMMANDS)}."
    parser.print_help()


def show_models() -> None:
    """This plugin's model ids, by family and in full: the list of lmms-eval cuts names and says nothing about them."""
    from accelerate_methods.registry import method_class
    from accelerate_methods.registry.architectures import ARCHITECTURES
    from accelerate_methods.registry.compatibility import why_not
    from accelerate_methods.registry.families import keys

    print(f"Models of this plugin: FAMILY_METHOD, or FAMILY_{ANY_METHOD} with method= or config= (neither: dense).\n")
    for family, declared in keys().items():
        if family in TRAINED:
            continue
        methods = [method for known, method in model_ids().values() if known == family and method is not None]
        fit = [name for name in methods if any(why_not(method_class(name), one) is None for one in declared)]
        print(f"{family}: {', '.join(one.name for one in declared)}")
        print(textwrap.fill(", ".join(f"{family}_{name}" for name in (ANY_METHOD, *fit)), 118, **_INDENT) + "\n")
    print("Trained architectures, which take method= or config= as well:\n")
    for entry in ARCHITECTURES:
        more = [f"{argument.name}={argument.default}" for argument in entry.arguments]
        print(f"{entry.key}: {entry.name}" + (f" ({', '.join(more)})" if more else ""))


def _prepare_environment() -> None:
    # read when torch is loaded: threads that wait for each other otherwise spin, and beside other work on the same
    # cores a small model then takes many times its share
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    # several tasks read it while they are imported, and fail or look into a folder called "~" without it
    os.environ.setdefault("HF_HOME", os.path.expanduser("~/.cache/huggingface"))
    if not torch.cuda.is_available():
        # without it, accelerate sees one process where torchrun started several
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
