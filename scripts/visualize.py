"""See what methods do with the visual tokens of your own picture or video.

    python scripts/visualize.py --input clip.mp4 --question "what moves?" --method fastvid@0.1 --output out.png
    python scripts/visualize.py --input photo.jpg --question "what is this?" --pretrained liuhaotian/llava-v1.5-7b \\
        --method fastv@0.25 --method "visionzip(dominant=54,contextual=10)" --output out.html
    python scripts/visualize.py --input clip.mp4 --question "what moves?" --method "dycoke(k=0.7)" --output out.mp4

Runs the dense model and every method once, and draws for every method what became of each visual token: kept (clear,
framed), merged into another (dim), dropped before the language model (dark), or dropped inside it (coloured by decoder
layer). Input: a video file, a folder with the frames of a video, an image, or several images. More: docs/visualize.md
"""

# Nothing is imported here but what parsing the arguments takes: -h answers at once.
from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # works without installing the package

EMBEDDED = ROOT / "assets" / "tiny-llava-onevision"
OUTPUTS = (".png", ".html", ".mp4")
ALL_AT = 0.25  # retention ratio of a bare "all"
_ALL = re.compile(r"(?<![^\s,])all(@[^\s,]+)?(?![^\s,])")
_BARE = re.compile(r"[^\s,@()]+")


class InputError(ValueError):
    """Something that the user gave cannot be used; the message is for them."""


@dataclasses.dataclass
class Input:
    """What the model is asked about: the frames of one video [F, H, W, 3] uint8, or images."""

    name: str
    frames: np.ndarray | None = None
    seconds: list[float] | None = None
    images: list[Image.Image] = dataclasses.field(default_factory=list)

    @property
    def is_video(self) -> bool:
        return self.frames is not None


def read_input(paths: list[str], num_frames: int, **choosing: Any) -> Input:
    """Read one video, one folder of frames, or images; ``choosing``: ``sampler`` and ``question`` of ``load_video``."""
    missing = [p for p in paths if not Path(p).exists()]
    if missing:
        raise InputError(f"no such file: {missing[0]}")
    names = ", ".join(Path(p).name for p in paths)
    if len(paths) == 1 and Path(paths[0]).is_dir():
        return _read_folder(Path(paths[0]), num_frames)
    from llava.media_kind import is_picture

    if all(is_picture(p) for p in paths):
        return Input(names, images=[_open(p) for p in paths])
    if len(paths) > 1:
        raise InputError(f"several inputs must all be images, got {names}; give one video at a time.")
    from llava.video_utils import load_video

    try:
        video = load_video(paths[0], num_frames=num_frames, **choosing)
    except (OSError, ImportError) as error:
        raise InputError(str(error)) from error
    return Input(names, frames=video.frames, seconds=video.sample.seconds)


def _read_folder(folder: Path, num_frames: int) -> Input:
    import numpy as np

    from llava.media_kind import is_picture
    from llava.video_utils import uniform_frame_indices

    files = sorted(p for p in folder.iterdir() if p.is_file() and is_picture(p))
    if not files:
        raise InputError(f"{folder} holds no image that could be a frame.")
    frames = [_open(files[i]) for i in uniform_frame_indices(len(files), num_frames)]
    sizes = {frame.size for frame in frames}
    if len(sizes) > 1:
        raise InputError(f"the frames in {folder} differ in size: {', '.join(f'{w} x {h}' for w, h in sorted(sizes))}")
    return Input(folder.name, frames=np.stack([np.asarray(frame) for frame in frames]))


def _open(path: str | Path) -> Image.Image:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")  # as the camera was held
    except Exception as error:  # Pillow raises many kinds for files that are damaged or too large
        raise InputError(f"cannot read image {path}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Choice:
    """One thing to run: anything ``resolve`` takes (None: dense), with parameters.

    Attributes:
        named: whether the user named it; what "all" brings is left out where it cannot act.
    """

    label: str
    method: Any = None
    params: tuple[tuple[str, Any], ...] = ()
    named: bool = True


def choices(words: list[str], family: str, embedded: bool) -> list[Choice]:
    """Dense, then what ``--method`` says: the syntax of comparisons, or the name of a config."""
    from accelerate_methods.registry.settings import settings_of

    out = {"dense": Choice("dense")}
    for word in words:
        word = word.strip()
        if _BARE.fullmatch(word) and word not in ("dense", "all"):  # with its defaults, or as its config says
            out[word] = Choice(word, _with_config(word, embedded))
            continue
        rest = _ALL.sub("", word).strip(" ,")
        named = settings_of(rest, ALL_AT, {}, family) if rest else []
        for setting in settings_of(word, ALL_AT, {}, family):
            if setting.method is not None:
                asked = setting in named or (setting.label in out and out[setting.label].named)
                config = _with_config(setting.method, embedded)
                out[setting.label] = Choice(setting.label, config, setting.params, asked)
    return list(out.values())


def _with_config(method: str, embedded: bool) -> str:
    """The config for the embedded model where there is one: defaults of a few methods need a deeper decoder."""
    from accelerate_methods.registry.configs import CONFIG_DIR

    return f"{method}/embedded" if embedded and (CONFIG_DIR / method / "embedded.yaml").is_file() else method


class Looker:
    """A model, ready to be asked about one input with one method after the other.

    Attributes:
        inputs, call: run parameters of a trained architecture, for the steps that make inputs and for ``generate``.
    """

    inputs: Mapping[str, Any] = MappingProxyType({})
    call: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self, pretrained: str, template: str | None = None, device: str = "auto", dtype: str = "auto", given: str = ""
    ):
        import torch

        from llava.model.builder import load_pretrained_model

        if dtype == "auto" and device in ("auto", "cpu") and not (device == "auto" and torch.cuda.is_available()):
            dtype = "float32"  # half precision is slow on a CPU
        self.tokenizer, self.model, self.processor, _ = load_pretrained_model(
            pretrained, device_map=device, torch_dtype=dtype
        )
        self.template = template or _template(self.model)
        self.inputs, self.call = _run_parameters(self.model.about, given)

    @property
    def family(self) -> str:
        """Key of the model family (``accelerate_methods.registry.families``)."""
        from accelerate_methods.registry.families import FAMILIES
        from llava.model.acceleration import facts_of

        name = facts_of(self.model).name
        return next(family.key for family in FAMILIES if family.name == name)

    def prepare(self, given: Input) -> Prepared:
        """Pixels and panels of an input, as the model's config wants it."""
        from llava.mm_utils import process_images
        from llava.token_places import frame_panels, image_panels, is_anyres

        if self.model.about is not None:
            return self._of_architecture(given)
        if given.is_video:
            pixels = self.processor.preprocess(given.frames, return_tensors="pt")["pixel_values"]
            panels = frame_panels(given.frames, self.processor, given.seconds)
            return Prepared([panels], [self._cast(pixels)], "video", None)
        config = self.model.config
        mode = getattr(config, "image_aspect_ratio", None) or "pad"
        if len(given.images) > 1 and is_anyres(mode):
            mode = "pad"  # as lmms-eval's llava_onevision asks about several images
        pinpoints = getattr(config, "image_grid_pinpoints", None)
        how = SimpleNamespace(image_aspect_ratio=mode, image_grid_pinpoints=pinpoints)
        names = [f"image {n}" if len(given.images) > 1 else "" for n in range(1, len(given.images) + 1)]
        panels = [
            image_panels(image, self.processor, mode, pinpoints, name)
            for image, name in zip(given.images, names, strict=True)
        ]
        sizes = [image.size for image in given.images]
        pixels = process_images(given.images, self.processor, how)
        plain = not isinstance(pixels, list) and pixels.ndim == 4
        tensors = self._cast(pixels) if plain else [self._cast(p) for p in pixels]
        return Prepared(panels, tensors, "plain" if plain else "image", sizes)

    def _of_architecture(self, given: Input) -> Prepared:
        """As the model's own class prepares them; panels as those that it is shown, or the whole pictures."""
        from accelerate_methods.visualize import Panel
        from llava.model.inputs import MediaInputs
        from llava.token_places import frame_panels, image_panels

        model, processor = self.model, self.processor
        if given.is_video:
            if "video" not in model.about.modalities:
                raise InputError(f"{model.about.name} reads images, not videos. {model.about.limits}".strip())
            pixels = model.to_model(model.video_inputs(given.frames, processor, **self.inputs))
            return Prepared([frame_panels(given.frames, processor, given.seconds)], [pixels], "video", None)
        pixels = model.to_model(model.image_inputs(given.images, processor, **self.inputs))
        names = [f"image {n}" if len(given.images) > 1 else "image" for n in range(1, len(given.images) + 1)]
        own = type(model).image_inputs is not MediaInputs.image_inputs or not model.tokens_have_places
        mode, pinpoints = (getattr(model.config, key, None) for key in ("image_aspect_ratio", "image_grid_pinpoints"))
        panels = [
            [Panel(name, image.convert("RGB"))] if own else image_panels(image, processor, mode, pinpoints, name)
            for image, name in zip(given.images, names, strict=True)
        ]
        plain = not isinstance(pixels, list) and pixels.ndim == 4
        return Prepared(panels, pixels, "plain" if plain else "image", [image.size for image in given.images])

    def _cast(self, pixels: Any) -> Any:
        return pixels.to(device=self.model.device, dtype=self.model.dtype)

    def look(self, prepared: Prepared, question: str, choice: Choice, max_new_tokens: int) -> Any:
        """Answer the question with one method; the answer and what became of each token.

        Raises:
            MethodError: the method cannot run on this model, or does nothing with such an input.
        """
        import torch

        import accelerate_methods
        from accelerate_methods.stages.errors import MethodError
        from accelerate_methods.visualize import Overlay, numbered_on
        from llava.token_places import token_cells

        pipeline = accelerate_methods.resolve(choice.method, **dict(choice.params))
        kind = "video" if prepared.kind == "video" else "image"
        if pipeline.methods and not any(kind in m.modalities for m in pipeline.methods):
            acts = " and ".join(sorted(set().union(*(m.modalities for m in pipeline.methods))))
            raise MethodError(f"{choice.label} acts on {acts} only, and the input is {kind}: nothing would change.")
        ids = self._ids(question, len(prepared.panels), kind)
        more = {} if prepared.kind == "plain" else {"modalities": [prepared.kind] * len(prepared.panels)}
        if prepared.sizes:
            more["image_sizes"] = prepared.sizes
        attached = accelerate_methods.accelerate(self.model, pipeline, tokenizer=self.tokenizer)
        with attached as acceleration, torch.inference_mode():
            with accelerate_methods.record() as requests:
                output = self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    images=prepared.images,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    pad_token_id=_pad(self.tokenizer),
                    questions=[self.model.asked_text(question)],
                    **more,
                    **self.call,
                )
            sample = requests[0].samples[0]
            if len(sample.items) < len(prepared.panels):
                raise InputError("the prompt is longer than the model's context; use fewer frames or images.")
            cells = []
            for number, (item, panels) in enumerate(zip(sample.items, prepared.panels, strict=True)):
                size = prepared.sizes[number] if prepared.sizes else None
                cells += numbered_on(token_cells(self.model, item, panels, prepared.kind, size), cells)
            adapted = ", ".join(f"{given} in place of {asked}" for asked, given in acceleration.adaptations.items())
        return Overlay(
            label=choice.label,
            tokens_before=sample.visual_tokens_before,
            tokens_after=sample.visual_tokens_after,
            num_layers=self.model.config.num_hidden_layers,
            cells=cells,
            answer=_printable(self.tokenizer.decode(output[0], skip_special_tokens=True)),
            note="; ".join(filter(None, (f"adaptation: {adapted}" if adapted else "", self._placeless()))),
        )

    def _placeless(self) -> str:
        """What has to be said of tokens that have no place in the picture."""
        return "" if self.model.tokens_have_places else "cells are tokens in the order of the prompt, not places"

    def _ids(self, question: str, items: int, kind: str) -> Any:
        from llava.constants import DEFAULT_IMAGE_TOKEN
        from llava.conversation import SeparatorStyle, conv_templates

        if self.template not in conv_templates:
            from accelerate_methods.stages.errors import UnknownNameError

            raise UnknownNameError("conversation template", self.template, conv_templates)
        if self.model.about is not None:
            question = self.model.question_text(question, kind, items, **self.inputs)
        elif DEFAULT_IMAGE_TOKEN not in question:
            question = " ".join([DEFAULT_IMAGE_TOKEN] * items) + "\n" + question
        if self.model.about is None and question.count(DEFAULT_IMAGE_TOKEN) != items:
            raise InputError(f"the question has {question.count(DEFAULT_IMAGE_TOKEN)} <image>, the input {items}.")
        conversation = conv_templates[self.template].copy()
        if conversation.sep_style is SeparatorStyle.LLAMA_3:  # printed by the checkpoint's own chat template
            conversation.tokenizer = self.tokenizer
        conversation.append_message(conversation.roles[0], question)
        conversation.append_message(conversation.roles[1], None)
        prompt = self.model.whole_prompt(conversation.get_prompt(), **self.inputs)
        return self.model.prompt_ids(prompt, self.tokenizer, **self.inputs)[None].to(self.model.device)


@dataclasses.dataclass
class Prepared:
    """Panels per item, and model inputs: images, their kind ("plain", "image", "video") and sizes (width, height)."""

    panels: list[list[Any]]
    images: Any
    kind: str
    sizes: list[tuple[int, int]] | None


def _printable(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _pad(tokenizer: Any) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _run_parameters(about: Any, given: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """``k=v,k=v`` of a trained architecture: for the steps that make inputs, and for ``generate``."""
    if about is None:
        if given:
            raise InputError(f"--model-args {given}: this model has no run parameters; it is a plain LLaVA model.")
        return {}, {}
    pairs = [word.partition("=") for word in given.split(",") if word.strip()]
    values = about.checked({name.strip(): value.strip() for name, _, value in pairs})
    return about.for_inputs(values), about.for_generate(values)


def _template(model: Any) -> str:
    if model.about is not None:
        return model.prompt_template
    name = type(model).__name__
    return "qwen_1_5" if "Qwen" in name else "mistral_instruct" if "Mistral" in name else "vicuna_v1"


def _choosing(asked: list[Choice], args: argparse.Namespace) -> dict[str, Any]:
    """What chooses the frames of the video. All rows show the same frames, so no two methods may choose them."""
    import accelerate_methods
    from accelerate_methods.hosts.frame_sampler import frame_sampler

    named = [choice for choice in asked if choice.named]
    pipelines = [accelerate_methods.resolve(choice.method, **dict(choice.params)) for choice in named]
    samplers = [sampler for sampler in map(frame_sampler, pipelines) if sampler is not None]
    if len({sampler.method for sampler in samplers}) > 1:
        raise InputError("several methods choose the frames, each its own: draw them one by one.")
    return {"sampler": samplers[0], "question": args.question} if samplers else {}


def _refuse_choosing(choice: Choice) -> None:
    """What "all" brings must not decide which frames the other rows show."""
    import accelerate_methods
    from accelerate_methods.hosts.frame_sampler import frame_sampler
    from accelerate_methods.stages.errors import MethodError

    if frame_sampler(accelerate_methods.resolve(choice.method, **dict(choice.params))) is not None:
        raise MethodError("it chooses the frames that are shown; draw it by its name.")


def visualize(args: argparse.Namespace) -> Path:
    from rich.console import Console
    from rich.text import Text

    from accelerate_methods.engine.devices import named_device
    from accelerate_methods.stages.errors import MethodError, check_writable
    from accelerate_methods.visualize import draw_sheet, write_clip, write_page

    console = Console(stderr=True, markup=False, emoji=False)
    embedded = args.pretrained is None
    if args.output.is_dir():
        raise InputError(f"--output {args.output} is a folder.")
    check_writable(args.output.parent, f"--output {args.output}")
    if args.device != "auto":
        named_device(args.device)
    # before the model is loaded: a misspelt method should cost no time (the family matters to "all" only)
    asked = choices(args.method, "llava_onevision", embedded)
    given = read_input(args.input, args.frames or (16 if embedded else 32), **_choosing(asked, args))
    if args.output.suffix.lower() == ".mp4" and not given.is_video:
        raise InputError(f"{args.output} is a video, but the input is not; write a .png or .html.")
    if embedded and not (EMBEDDED / "config.json").is_file():
        raise InputError(f"the embedded model is missing ({EMBEDDED}); give --pretrained.")
    with console.status("loading the model"):
        looker = Looker(str(args.pretrained or EMBEDDED), args.template, args.device, args.dtype, args.model_args)
    prepared = looker.prepare(given)
    panels = [panel for item in prepared.panels for panel in item]
    overlays = []
    for choice in choices(args.method, looker.family, embedded):
        try:
            if not choice.named:
                _refuse_choosing(choice)
            with console.status(Text(choice.label)):
                overlay = looker.look(prepared, args.question, choice, args.max_new_tokens)
        except MethodError as error:
            if choice.named:
                raise
            console.print(f"{choice.label} is left out: {error}", highlight=False, soft_wrap=True)
            continue
        said = Text(f"{overlay.label}: {overlay.counts()}; answer: {overlay.answer}")  # an answer may look like markup
        said.stylize("bold", 0, len(overlay.label))
        console.print(said)
        overlays.append(overlay)
    if len(overlays) == 1:
        raise InputError("none of the methods can act on this input.")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    shown = overlays[1:] if args.no_dense and len(overlays) > 1 else overlays
    title = f"{given.name}: {args.question}"
    suffix = args.output.suffix.lower()
    if suffix == ".png":
        return draw_sheet(panels, shown, args.output, title, columns=args.columns)
    if suffix == ".html":
        return write_page(panels, shown, args.output, title, model=Path(str(args.pretrained or EMBEDDED)).name)
    return write_clip(panels, shown, args.output, title)


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--input", required=True, nargs="+", help="a video, a folder of frames, or images")
    out.add_argument("--question", required=True)
    out.add_argument(
        "--method",
        action="append",
        default=[],
        help='e.g. fastvid@0.1, "dycoke(k=0.3)", prunevid, visionzip+fastv, a config, or all@0.25; may be repeated',
    )
    out.add_argument("--pretrained", help="checkpoint; default: the embedded model, which knows synthetic shapes only")
    out.add_argument("--model-args", default="", help="run parameters of a trained architecture: k=v,k=v")
    out.add_argument("--frames", type=_positive, help="frames of a video (default: 32; 16 with the embedded model)")
    out.add_argument("--output", required=True, type=_output, help="out.png, out.html or out.mp4")
    out.add_argument("--columns", type=_positive, help="PNG: most frames in a row (default: 8, or 4 for fine grids)")
    out.add_argument("--no-dense", action="store_true", help="run the dense model, but do not draw it")
    out.add_argument("--max-new-tokens", type=_positive, default=32)
    out.add_argument("--template", help="conversation template (default: by the model's class)")
    out.add_argument("--device", default="auto")
    out.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    return out


def _positive(text: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _output(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in OUTPUTS:
        raise argparse.ArgumentTypeError(f"{text!r} must end in {', '.join(OUTPUTS)}")
    return path


def main(argv: list[str] | None = None) -> None:
    arguments = parser()
    args = arguments.parse_args(argv)
    if not args.method:
        arguments.error("give at least one --method, e.g. --method fastvid@0.1")
    from transformers.utils import logging

    from accelerate_methods.stages.errors import MethodError, one_line

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        path = visualize(args)
    except (InputError, MethodError, OSError, ImportError) as error:
        arguments.exit(2, f"error: {one_line(error)}\n")
    except KeyboardInterrupt:
        arguments.exit(130, "interrupted; nothing was drawn\n")
    print(path)


if __name__ == "__main__":
    main()
