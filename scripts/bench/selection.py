"""Time and memory of each method's own work (compression, selection), without any model around it.

    python scripts/bench/selection.py                     # one CPU thread, float32
    python scripts/bench/selection.py --device cuda --dtype bfloat16
    python scripts/bench/selection.py --only prunevid fastv --json out.json

Beside a method's time stand those of two things without any cleverness, measured in the same process and in turn with
it: "random", a random selection of as many tokens, and "copy", a copy of as many rows, which is the least that a
selection costs. Inputs are made up with the statistics of a video. Every case runs in a process of its own. How the
authors' released code compares, run side by side: docs/efficiency.md.
"""

# Nothing is imported here but what parsing the arguments takes: -h answers at once.
from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if TYPE_CHECKING:
    from rich.table import Table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="only the work of these methods")
    parser.add_argument("--json", type=Path, help="also write everything that was measured to this file")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)  # child process: run one case, print its JSON
    args = parser.parse_args(argv)
    import torch
    from rich.console import Console
    from rich.progress import track

    from accelerate_methods.bench.selection import CASES, measure
    from accelerate_methods.stages.errors import UnknownNameError

    methods = {case.method for case in CASES}
    for name in args.only or ():
        if name not in methods:
            parser.error(str(UnknownNameError("method", name, methods)))
    if args.case is not None:
        result = measure(
            CASES[args.case], torch.device(args.device), getattr(torch, args.dtype), args.threads, args.repeats
        )
        print(json.dumps(result))
        return
    if args.json is not None and args.json.exists():
        parser.error(f"{args.json} exists; results are never overwritten.")
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(width=110, markup=False, emoji=False)
    chosen = [i for i, case in enumerate(CASES) if args.only is None or case.method in args.only]
    results = {i: _child(i, args) for i in track(chosen, "measuring", console=console, transient=True)}
    console.print(_table(results, args))
    if args.json is not None:
        content = {
            "command": sys.argv,
            "machine": platform.platform(),
            "processor": _processor(args.device),
            "torch": torch.__version__,
            "device": args.device,
            "dtype": args.dtype,
            "threads": args.threads,
            "cases": [
                {"method": CASES[i].method, "case": CASES[i].what, **result} for i, result in results.items()
            ],
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _child(index: int, args: argparse.Namespace) -> dict[str, object]:
    from accelerate_methods.bench.selection import CASES

    command = [sys.executable, __file__, "--case", str(index), "--device", args.device, "--dtype", args.dtype]
    command += ["--threads", str(args.threads), "--repeats", str(args.repeats)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{CASES[index].method}, {CASES[index].what} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _table(results: dict[int, dict[str, object]], args: argparse.Namespace) -> Table:
    from rich import box
    from rich.table import Table

    from accelerate_methods.bench.selection import CASES

    where = f"{_processor(args.device)}, {args.threads} thread(s), {args.dtype}"
    title = f"{where}; median (fastest) in ms; extra memory (in sizes of the input)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    table.add_column("case", no_wrap=True)
    for name in ("ms", "random", "copy", "extra memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for index, result in results.items():
        case, extra = CASES[index], result["extra_bytes"]
        table.add_row(
            case.method,
            case.what,
            f"{statistics.median(result['ms']):.2f} ({min(result['ms']):.2f})",
            *(f"{statistics.median(result[k]):.2f}" if k in result else "" for k in ("random_ms", "copy_ms")),
            f"{extra / 2**20:.0f} MiB ({extra / result['input_bytes']:.1f}x)",
        )
    return table


def _processor(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next(
        (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.processor() or "CPU"
    )


if __name__ == "__main__":
    main()
