"""Prune the weights of a LLaVA's decoder by a searched policy, in the manner of EfficientLLaVA, and save the result.

    python scripts/prune/efficient_llava.py --model-path liuhaotian/llava-v1.5-7b --output pruned \\
        --samples scienceqa.json --image-folder images --share 0.5
    python scripts/prune/efficient_llava.py ... --policy policy.json       (no search: the ratios of a file)

A few samples say how much every matrix may lose; between the rounds of the search the projector is fitted to them. The
result loads like any checkpoint; dense kernels run it no faster. What is the paper's and what is ours: docs/pruning.md
"""

# Nothing is imported here but what parsing the arguments takes: -h answers at once.
from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # works without installing the package


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model-path", required=True, help="folder or hub name of a checkpoint in LLaVA's format")
    made.add_argument("--output", required=True, help="folder of the pruned checkpoint, new or empty")
    made.add_argument("--samples", required=True, help="JSON list or lines: LLaVA's training data, or question, answer")
    made.add_argument("--image-folder", default=".", help="where the samples' images lie (default: here)")
    made.add_argument("--num-samples", type=int, default=64, help="the first N are used (default: 64)")
    made.add_argument("--share", type=float, default=0.5, help="of the weights that become zero (default: 0.5)")
    made.add_argument("--mask", default="sparsegpt", help="magnitude, wanda or sparsegpt (default)")
    made.add_argument("--pattern", default="unstructured", help="unstructured (default), columns, or n:m such as 2:4")
    made.add_argument("--policy", default=None, help="JSON of ratios; instead of a search")
    made.add_argument("--conv-mode", default=None, help="conversation template (default: that of the checkpoint)")
    made.add_argument("--device", default=None, help="cuda, cuda:1, cpu ... (default: cuda if there is one)")
    search = made.add_argument_group("search")
    search.add_argument("--generations", type=int, default=10, help="0: every matrix loses the same share")
    search.add_argument("--candidates", type=int, default=16, help="policies that are tried in each")
    search.add_argument("--spread", type=float, default=0.3, help="how far a matrix may be from --share")
    search.add_argument("--gap-weight", type=float, default=0.01, help="of the weights' norm beside the loss")
    search.add_argument("--projector-steps", type=int, default=16, help="on the projector after each; 0: none")
    search.add_argument("--projector-rate", type=float, default=1e-4, help="learning rate")
    search.add_argument("--seed", type=int, default=0)
    return made


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from accelerate_methods.stages.errors import MethodError, one_line
    from llava.model.pruning.command import prune_checkpoint

    try:
        print(prune_checkpoint(args))
    except (MethodError, OSError, ImportError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what --output holds, if anything, is not complete", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
