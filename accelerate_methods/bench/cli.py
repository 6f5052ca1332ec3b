"""Measure what methods cost on a model of a given shape: time per stage, memory, KV cache, work.

    python -m accelerate_methods.bench --model llava-onevision-7b --methods "dense fastvid@0.1 fastv dycoke(k=0.3)"
    python -m accelerate_methods.bench --pretrained lmms-lab/llava-onevision-qwen2-7b-ov --video clip.mp4
    python -m accelerate_methods.bench --model tiny --methods all@0.25 --plots
    python -m accelerate_methods.bench --show outputs/efficiency/*.json

Methods are written as in comparisons: "dense", "fastvid", "fastvid@0.25", "dycoke(k=0.3,p=0.7)", "visionzip+fastv",
"all", "all@0.1". The dense model is always measured, in turn with the others. docs/efficiency.md says what is measured.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from accelerate_methods.stages.errors import MethodError

DEFAULT_METHODS = "dense fastvid@0.25 fastvid@0.1 fastv dycoke prunevid visionzip@0.1"
IMAGE_METHODS = "dense fastv visionzip@0.25 visionzip@0.1 fastervlm@0.1"


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
    request = parser.add_argument_group("request")
    request.add_argument("--input", choices=["video", "image"], help="video where the model is one for videos")
    request.add_argument("--frames", type=_count, help="frames of the video (default: the official evaluation's)")
    request.add_argument("--image-size", type=_size, metavar="WxH", help="size of the image (any-resolution models)")
    request.add_argument("--video", metavar="CLIP", help="a real clip instead of made-up features")
    request.add_argument("--text-tokens", type=_count, default=50, help="length of the prompt beside the visual tokens")
    request.add_argument("--new-tokens", type=_whole, default=16, help="tokens generated after the first")
    request.add_argument("--batch", type=_count, default=1)
    measure = parser.add_argument_group("measurement")
    measure.add_argument("--methods", metavar="WORDS", help=f"default for videos: {DEFAULT_METHODS}")
    measure.add_argument("--retention", type=float, default=0.1, help="ratio of methods named without one")
    measure.add_argument("--repeats", type=_count, default=7)
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


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write e.g. 672x672")
    return int(found[1]), int(found[2])


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=150)


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    console = _console()
    try:
        if args.show:
            _show(args, console)
            return 0
        if args.list_models:
            from accelerate_methods.bench.shapes import SHAPES

            for name, shape in SHAPES.items():
                console.print(f"{name:22} {shape.family}, {shape.frames or 1} {'frames' if shape.frames else 'image'}")
            return 0
        return run(args, console)
    except (MethodError, OSError, ImportError, ValueError) as error:
        if os.environ.get("ACCELERATE_METHODS_TRACEBACK"):
            raise
        parser.exit(2, f"error: {error}\n")
    return 0


def _show(args: argparse.Namespace, console: Console) -> None:
    from accelerate_methods.bench import results

    for path in args.show:
        content = results.read(path)
        if args.markdown:
            print(results.markdown(content))
        else:
            console.print(results.table(content))


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure and write; 1 if a setting failed for another reason than memory, 0 otherwise."""
    import torch

    from accelerate_methods.bench import plots, results
    from accelerate_methods.bench.measure import Bench, Row
    from accelerate_methods.registry.settings import DENSE

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise MethodError("--device cuda: torch sees no CUDA device on this machine.")
    if args.check_sync and device.type != "cuda":
        raise MethodError("--check-sync needs CUDA: only there can the host run ahead of the device.")
    if args.video and not args.pretrained:
        console.print("random weights: features of the clip are those of a random tower", style="yellow")
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        with console.status("building the model"):
            model, inputs, described = _model_and_inputs(args, device, Path(folder))
        words = args.methods or (DEFAULT_METHODS if inputs.modality == "video" else IMAGE_METHODS)
        family = _family(model)
        settings = chosen(words, args.retention, family, inputs.modality)
        bench = Bench(model, inputs, args.new_tokens, family)
        rows = [Row(setting) for setting in settings]
        extra = measure(bench, rows, args, console)
        found = {
            "kind": inputs.modality, "frames": inputs.frames, "source": inputs.source, "features": inputs.features,
            "text_tokens": inputs.text_tokens, "batch": inputs.batch, "new_tokens": args.new_tokens,
        }  # fmt: skip
        if inputs.sizes:
            found["image_size"] = list(inputs.sizes[0])
        content = {**results.report(device, described, found, [row.to_dict() for row in rows]), **extra}
        path = results.write(content, args.output)
    console.print(results.table(content))
    for label, places in content.get("synchronisations", {}).items():
        console.print(f"{label}: {', '.join(places) or 'no synchronisation'}")
    drawn = plots.draw(content, path) if args.plots else []
    console.print("written:", *(str(p) for p in (path, *drawn)), soft_wrap=True)
    if not any(row.ok for row in rows if row.setting.label == DENSE):
        console.print("the dense model could not be measured: there are no speed-ups", style="yellow")
    return int(any(row.status.startswith("error") for row in rows))


def chosen(words: str, retention: float, family: str, modality: str) -> list[Any]:
    """The settings of ``words``, dense first. "all" leaves out methods that do nothing with this kind of input."""
    from accelerate_methods.registry.pipeline import resolve
    from accelerate_methods.registry.settings import Setting, settings_of

    settings = [Setting(), *settings_of(words, retention, {}, family)]
    named = settings_of(re.sub(r"(?<![^\s,])all(@\S+)?(?![^\s,])", "", words), retention, {}, family)

    def acts(setting: Setting) -> bool:
        return setting.method is None or any(
            modality in m.modalities for m in resolve(setting.method, **dict(setting.params)).methods
        )

    return list(dict.fromkeys(s for s in settings if s in named or acts(s)))


def _family(model: Any) -> str:
    """Key of ``compatibility.FAMILIES``."""
    tower = model.get_vision_tower().config.model_type
    if tower != "siglip_vision_model":
        return "llava"
    grid = getattr(model.config, "mm_newline_position", "one_token") == "grid"
    return "llava_video" if grid else "llava_onevision"


def _model_and_inputs(args: argparse.Namespace, device: Any, folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    import torch

    from accelerate_methods.bench.inputs import make_inputs, read_clip
    from accelerate_methods.bench.shapes import build, shape_of

    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    image_processor = None
    if args.pretrained:
        from llava.model.builder import load_pretrained_model

        _, model, image_processor, _ = load_pretrained_model(
            args.pretrained, device_map=str(device), torch_dtype=dtype, attn_implementation=args.attention
        )
        family, shape_name, weights = _family(model), Path(args.pretrained).name, args.pretrained
        frames, image_size = (64 if family == "llava_video" else 32), (672, 672)
        video = family != "llava"
    else:
        shape = shape_of(args.model)
        model = build(shape, device, dtype, args.attention, folder)
        weights = "random"
        shape_name = args.model
        frames, image_size, video = shape.frames, shape.image_size, shape.frames > 0
    modality = args.input or ("video" if video else "image")
    if modality == "video" and not video:
        raise MethodError(f"{shape_name} is a model for images; --input video is not possible.")
    if args.video and modality != "video":
        raise MethodError(f"--video: {shape_name} is measured on images.")
    frames = args.frames or frames
    pixels = None
    if args.video:
        pixels = read_clip(args.video, frames, model, image_processor or model.get_vision_tower().image_processor)
    inputs = make_inputs(
        model,
        modality=modality,
        frames=frames,
        image_size=args.image_size or image_size,
        text_tokens=args.text_tokens,
        batch=args.batch,
        pixels=pixels,
        source=args.video,
    )
    described = {
        "shape": shape_name,
        "weights": weights,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "attention": model.config._attn_implementation,
    }
    return model, inputs, described


def measure(bench: Any, rows: list[Any], args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All settings in turn, round after round, so that a slow minute of the machine hits them alike."""
    from accelerate_methods.bench import native, sync

    extra: dict[str, Any] = {}
    columns = (
        TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    rounds = args.warmup + args.repeats
    began = time.monotonic()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(rows) * (1 + rounds))
        for row in rows:
            progress.update(task, description=f"{row.setting.label}: tokens and work")
            bench.prepare(row)
            if row.ok:
                bench.find_facts(row)
            progress.advance(task)
        for index in range(rounds):
            spent = time.monotonic() - began
            # one kept round at least
            if args.time_limit and index > args.warmup and spent * (index + 1) / max(index, 1) > args.time_limit:
                break
            name = "warm-up" if index < args.warmup else f"repeat {index - args.warmup + 1}"
            for row in rows:
                progress.update(task, description=f"{row.setting.label}: {name}")
                if row.ok:
                    bench.sample(row, keep=index >= args.warmup)
                progress.advance(task)
        if args.check_sync:
            extra["synchronisations"] = {r.setting.label: sync.synchronisations(bench, r) for r in rows if r.ok}
        if args.compare_transformers:
            other = progress.add_task("against transformers' class", total=rounds)
            extra["transformers"] = native.compare(
                bench.model, bench.inputs, args.repeats, args.warmup, lambda: progress.advance(other)
            )
    return extra
