"""Measure what methods cost on a model of a given shape: time per stage, memory, KV cache, work.

    python -m accelerate_methods.bench --model llava-onevision-7b --methods "dense fastvid@0.1 fastv dycoke(k=0.3)"
    python -m accelerate_methods.bench --pretrained lmms-lab/llava-onevision-qwen2-7b-ov --video clip.mp4
    python -m accelerate_methods.bench --model tiny --methods all@0.25 --plots
    python -m accelerate_methods.bench --show outputs/efficiency/*.json

Methods are written as in comparisons: "dense", "fastvid", "fastvid@0.25", "dycoke(k=0.3,p=0.7)", "visionzip+fastv",
"all", "all@0.1". The dense model is always measured, in turn with the others. docs/efficiency.md says what is measured.
"""

# Nothing is imported here but what parsing the arguments takes: -h answers at once.
from __future__ import annotations

import argparse
import contextlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate_methods.bench import VIDEO_METHODS

if TYPE_CHECKING:
    from rich.console import Console


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m accelerate_methods.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="llava-onevision-7b", help="shape with random weights (--list-models)")
    model.add_argument("--list-models", action="store_true", help="print the shapes")
    model.add_argument("--pretrained", metavar="PATH", help="a LLaVA checkpoint instead of random weights")
    model.add_argument("--device", help='"cuda" where there is one, otherwise "cpu"')
    model.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="bfloat16 on CUDA, float32 on a CPU")
    model.add_argument("--attention", default="sdpa", choices=["sdpa", "flash_attention_2", "eager"])
    model.add_argument("--threads", type=_count, help="CPU threads of torch")
    model.add_argument("--model-args", default="", help="run parameters of a trained architecture: k=v,k=v")
    request = parser.add_argument_group("request")
    request.add_argument("--input", choices=["video", "image"], help="video where the model is one for videos")
    request.add_argument("--frames", type=_count, help="frames of the video (default: the official evaluation's)")
    request.add_argument("--image-size", type=_size, metavar="WxH", help="size of the image (any-resolution models)")
    request.add_argument("--video", metavar="CLIP", help="a real clip instead of made-up features")
    request.add_argument("--text-tokens", type=_count, default=50, help="length of the prompt beside the visual tokens")
    request.add_argument("--new-tokens", type=_whole, default=16, help="tokens generated after the first")
    request.add_argument("--batch", type=_count, default=1)
    measure = parser.add_argument_group("measurement")
    measure.add_argument("--methods", metavar="WORDS", help=f"default for videos: {VIDEO_METHODS}")
    measure.add_argument("--retention", type=_share, help="ratio of methods named without one (default: 0.1)")
    measure.add_argument(
        "--repeats", type=_count, default=7, help="rounds (default: 7); up to three times as many if times spread a lot"
    )
    measure.add_argument("--warmup", type=_whole, default=2)
    measure.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop repeating after this long")
    measure.add_argument("--compare-transformers", action="store_true", help="dense against transformers' own class")
    measure.add_argument("--check-sync", action="store_true", help="list host-device synchronisations (CUDA)")
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, default=Path("outputs/efficiency"), metavar="FOLDER")
    output.add_argument("--plots", action="store_true", help="PNGs beside the JSON")
    output.add_argument("--show", nargs="+", metavar="FILE", help="only print the tables of earlier results")
    output.add_argument("--markdown", action="store_true", help="with --show: as Markdown")
    return parser


def _count(text: str) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _whole(text: str) -> int:
    if not re.fullmatch(r"\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def _share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and up to 1")


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write e.g. 672x672")
    return int(found[1]), int(found[2])


def _console() -> Console:
    from rich.console import Console

    console = Console(markup=False, emoji=False)
    return console if console.is_terminal else Console(width=150, markup=False, emoji=False)


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    from accelerate_methods.stages.errors import MethodError, one_line

    console = _console()
    try:
        if args.show:
            _show(args, console)
            return 0
        if args.list_models:
            from accelerate_methods.bench.architecture_shapes import ALL_SHAPES

            for name, shape in ALL_SHAPES.items():
                console.print(f"{name:22} {shape.family}, {shape.frames or 1} {'frames' if shape.frames else 'image'}")
            return 0
        from accelerate_methods.bench.run import run

        return run(args, console)
    except (MethodError, OSError, ImportError, ValueError) as error:
        if os.environ.get("ACCELERATE_METHODS_TRACEBACK"):
            raise
        parser.exit(2, f"error: {one_line(error)}\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; nothing was written, start the same command again.\n")
    return 0


def _show(args: argparse.Namespace, console: Console) -> None:
    from accelerate_methods.bench import results, table

    for path in args.show:
        content = results.read(path)
        if args.markdown:
            print(table.markdown(content))
        else:
            console.print(table.table(content))
