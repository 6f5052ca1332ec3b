"""One run of the bench: the model and its input, all settings in turn, the result file and the table."""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from accelerate_methods.bench import (
    IMAGE_METHODS,
    VIDEO_METHODS,
    against_transformers,
    plots,
    results,
    steadiness,
    sync,
    table,
)
from accelerate_methods.bench.architecture_shapes import ALL_SHAPES
from accelerate_methods.bench.inputs import Inputs, make_inputs, read_clip
from accelerate_methods.bench.measure import Bench, Row
from accelerate_methods.bench.shapes import build, shape_of
from accelerate_methods.engine.devices import named_device
from accelerate_methods.registry.families import FAMILIES
from accelerate_methods.registry.pipeline import resolve
from accelerate_methods.registry.settings import DENSE, Setting, settings_of
from accelerate_methods.stages.errors import MethodError, check_writable

_MORE = 3  # times --repeats, until the spread is small
RETENTION = 0.1  # of methods that are named without a ratio


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure and write; 1 if a setting failed for another reason than memory, 0 otherwise."""
    device = named_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check_writable(args.output, f"--output {args.output}")
    if args.plots:
        plots.require()
    if args.check_sync and device.type != "cuda":
        raise MethodError("--check-sync needs CUDA: only there can the host run ahead of the device.")
    if args.video and not args.pretrained:
        console.print("random weights: features of the clip are those of a random tower", style="yellow")
    if args.threads:
        torch.set_num_threads(args.threads)
    _check_words(args)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        with console.status("building the model"):
            model, inputs, described = _model_and_inputs(args, device, Path(folder))
        inputs.call = run_parameters(model, args.model_args)
        words = args.methods
        if words is None:
            words = VIDEO_METHODS if inputs.modality == "video" else IMAGE_METHODS
        family = family_key(model)
        settings = chosen(words, RETENTION, family, inputs.modality, args.retention)
        bench = Bench(model, inputs, args.new_tokens, family)
        rows = [Row(setting) for setting in settings]
        extra = measure(bench, rows, args, console)
        found = {
            "kind": inputs.modality, "frames": inputs.frames, "source": inputs.source, "features": inputs.features,
            "text_tokens": inputs.text_tokens, "batch": inputs.batch, "new_tokens": args.new_tokens, **inputs.call,
        }  # fmt: skip
        if inputs.sizes:
            found["image_size"] = list(inputs.sizes[0])
        content = {**results.report(device, described, found, [row.to_dict() for row in rows]), **extra}
        path = results.write(content, args.output)
    console.print(table.table(content))
    for label, places in content.get("synchronisations", {}).items():
        console.print(f"{label}: {', '.join(places) or 'no synchronisation'}", markup=False)
    drawn = plots.draw(content, path) if args.plots else []
    console.print("written:", *(str(p) for p in (path, *drawn)), soft_wrap=True, markup=False)
    if not any(row.ok for row in rows if row.setting.label == DENSE):
        console.print("the dense model could not be measured: there are no speed-ups", style="yellow")
    return int(any(row.status.startswith("error") for row in rows))


def _check_words(args: argparse.Namespace) -> None:
    """Refuse methods that cannot be read before a model is built or loaded, which may take minutes."""
    if args.methods is None:
        return
    if args.pretrained:
        from llava.model.architectures import architecture_of
        from llava.model.checkpoint import read_config

        trained = architecture_of(read_config(args.pretrained), args.pretrained)
        family = "llava_onevision" if trained is None else trained.about.key  # what the words mean is the same for all
    else:
        family = shape_of(args.model, ALL_SHAPES).family
    settings_of(args.methods, RETENTION, {}, family, args.retention)


def chosen(words: str, retention: float, family: str, modality: str, asked: float | None = None) -> list[Setting]:
    """The settings of ``words``, dense first. "all" leaves out methods that do nothing with this kind of input, and
    those that need the words of a question, which it has not.

    Args:
        asked: a retention ratio that the user gave, see :func:`settings_of`.
    """
    settings = [Setting(), *settings_of(words, retention, {}, family, asked)]
    retention = retention if asked is None else asked
    rest = re.sub(r"(?<![^\s,])all(@\S+)?(?![^\s,])", "", words)
    named = settings_of(rest, retention, {}, family) if rest.strip(" ,\t\n") else []

    def acts(setting: Setting) -> bool:
        if setting.method is None:
            return True
        methods = resolve(setting.method, **dict(setting.params)).methods
        asking = any(m.needs_question or "question_rows" in m.signals for m in methods)
        return not asking and any(modality in m.modalities for m in methods)

    return list(dict.fromkeys(s for s in settings if s in named or acts(s)))


def run_parameters(model: Any, words: str) -> dict[str, Any]:
    """``k=v,k=v`` of a trained architecture as arguments of ``generate``.

    Raises:
        MethodError: the model has none, one is not known or out of range, or changes prompts and pictures, which the
            bench makes up.
    """
    pairs = [word.partition("=") for word in words.split(",") if word.strip()]
    given = {name.strip(): value.strip() for name, _, value in pairs}
    if model.about is None:
        if given:
            raise MethodError(f"--model-args {words}: the model has no run parameters; it is a plain LLaVA model.")
        return {}
    values = model.about.checked(given)
    other = [name for name in given if not model.about.argument(name).call]
    if other:
        raise MethodError(f"--model-args {', '.join(other)}: of prompts and pictures, which the bench makes up.")
    return model.about.for_generate(values)


def family_key(model: Any) -> str:
    """Key of the model family (``registry.families``) that a model of the llava package belongs to."""
    from llava.model.acceleration import facts_of

    name = facts_of(model).name
    return next(family.key for family in FAMILIES if family.name == name)


def _model_and_inputs(
    args: argparse.Namespace, device: torch.device, folder: Path
) -> tuple[Any, Inputs, dict[str, Any]]:
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    image_processor = None
    if args.pretrained:
        from llava.model.builder import load_pretrained_model

        _, model, image_processor, _ = load_pretrained_model(
            args.pretrained, device_map=str(device), torch_dtype=dtype, attn_implementation=args.attention
        )
        family, shape_name, weights = family_key(model), Path(args.pretrained).name, args.pretrained
        frames, image_size = (64 if family == "llava_video" else 32), (672, 672)
        video = family != "llava"
        if model.about is not None:  # evaluated on videos or on images, whatever else it reads
            video, frames = "videomme" in model.about.tasks, min(model.about.frames, frames)
    else:
        shape = shape_of(args.model, ALL_SHAPES)
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


def measure(bench: Bench, rows: list[Row], args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All settings in turn, round after round, so that a slow minute of the machine hits them alike."""
    extra: dict[str, Any] = {}
    columns = (
        TextColumn("{task.description:32}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    rounds = args.warmup + args.repeats
    most = args.warmup + _MORE * args.repeats
    began = time.monotonic()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(rows) * (1 + rounds))
        for row in rows:
            progress.update(task, description=f"{row.setting.label}: tokens and work")
            bench.prepare(row)
            if row.ok:
                bench.find_facts(row)
            progress.advance(task)
        index = 0
        while index < rounds or (index < most and steadiness.unsteady(row.to_dict() for row in rows)):
            spent = time.monotonic() - began
            # one kept round at least
            if args.time_limit and index > args.warmup and spent * (index + 1) / max(index, 1) > args.time_limit:
                break
            if index >= rounds:
                progress.update(task, total=len(rows) * (2 + index))
            name = "warm-up" if index < args.warmup else f"repeat {index - args.warmup + 1}"
            for row in rows:
                progress.update(task, description=f"{row.setting.label}: {name}")
                if row.ok:
                    bench.sample(row, keep=index >= args.warmup)
                progress.advance(task)
            index += 1
        if args.check_sync:
            extra["synchronisations"] = {r.setting.label: sync.synchronisations(bench, r) for r in rows if r.ok}
        if args.compare_transformers:
            other = progress.add_task("against transformers' class", total=rounds)
            extra["transformers"] = against_transformers.compare(
                bench.model, bench.inputs, args.repeats, args.warmup, lambda: progress.advance(other)
            )
    left = steadiness.unsteady(row.to_dict() for row in rows)
    if left:
        repeats = max(len(row.samples["prefill_ms"]) for row in rows)
        console.print(f"after {repeats} repeats the times still spread too much: {', '.join(left)}", style="yellow")
    return extra
