"""What ``scripts/prune/efficient_llava.py`` does: load, search, prune, save."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from accelerate_methods.hosts.checkpoint_files import CheckpointError
from accelerate_methods.stages.errors import UnknownNameError, check_writable
from llava.eval.asking import Assistant
from llava.model.pruning.masks import METHODS, check_pattern
from llava.model.pruning.policy import Policy, sizes_of, zeros_of
from llava.model.pruning.pruner import Pruner
from llava.model.pruning.samples import make_samples, read_entries
from llava.model.pruning.saving import changed_weights, save_checkpoint
from llava.model.pruning.search import Evolution, Found, search

#: beside the pruned weights: the policy, and how it was found
POLICY_FILE = "pruning_policy.json"


def prune_checkpoint(args: Any) -> str:
    """Prune as the options of the script say; returns a line on what came of it.

    Raises:
        MethodError: (and kinds of it) options, samples, a checkpoint or policy that cannot be used. Options are looked
            at before anything is loaded.
    """
    evolution = Evolution(
        share=args.share, spread=args.spread, generations=args.generations, candidates=args.candidates,
        parents=max(1, min(4, args.candidates)), seed=args.seed,
    )  # fmt: skip
    if args.mask not in METHODS:
        raise UnknownNameError("pruning method", args.mask, METHODS)
    check_pattern(args.pattern, args.share if args.policy is None else 0)
    check_writable(Path(args.output), f"--output {args.output}")
    if Path(args.output).exists() and any(Path(args.output).iterdir()):
        raise CheckpointError(f"{args.output!r} is there already; give a folder that is new or empty.")
    entries = read_entries(args.samples, args.num_samples)
    assistant = Assistant(args)
    model, sizes = assistant.model, sizes_of(assistant.model)
    pruner = Pruner(
        model, make_samples(assistant, entries, args.image_folder), method=args.mask, pattern=args.pattern,
        gap_weight=args.gap_weight, projector_rate=args.projector_rate,
    )  # fmt: skip
    dense = pruner.loss()
    found, fitted = _found(args, pruner, sizes, evolution)
    pruner.prune(found.policy)
    loss, zeros = pruner.loss(), zeros_of(model)
    share = sum(zeros[name] * size for name, size in sizes.items()) / sum(sizes.values())
    save_checkpoint(args.model_path, args.output, changed_weights(model, projector=fitted))
    found.policy.write(
        Path(args.output) / POLICY_FILE, mask=args.mask, pattern=args.pattern, share=round(share, 6),
        loss={"dense": dense, "pruned": loss}, fitness=found.history, projector_fitted=fitted,
        samples=len(pruner.samples), seed=args.seed,
    )  # fmt: skip
    return f"{args.output}: {share:.1%} of the decoder's weights are zero; loss {dense:.4f} -> {loss:.4f}"


def _found(args: Any, pruner: Pruner, sizes: dict[str, int], evolution: Evolution) -> tuple[Found, bool]:
    """The policy, and whether the projector has changed."""
    if args.policy is not None:
        return Found(Policy.read(args.policy, sizes), float("nan"), []), False
    if args.generations == 0 or args.pattern not in ("unstructured", "columns"):  # nothing to choose
        return Found(Policy.uniform(sizes, args.share), float("nan"), []), False
    fitted = False

    def between(policy: Policy) -> bool:
        nonlocal fitted
        helped = args.projector_steps > 0 and pruner.fit_projector(policy, args.projector_steps)
        fitted = fitted or helped
        return helped

    found = search(sizes, evolution, pruner.fitness, between, lambda line: print(line, file=sys.stderr, flush=True))
    return found, fitted
