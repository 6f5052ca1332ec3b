"""What the scripts of this folder share: options, prompts, and asking a model one question after the other.

Light to import, so that ``--help`` answers at once; torch and the models are loaded when something is asked.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")

#: conversation template of each decoder, where neither the user nor the name of the checkpoint says which
_TEMPLATES = {"qwen": "qwen_1_5", "qwen_moe": "qwen_1_5", "mistral": "mistral_instruct", "gemma": "gemma_instruct"}
#: part of a checkpoint's name -> template; the first that fits counts
_NAMED_TEMPLATES = {
    "llama-2": "llava_llama_2",
    "llama3": "llava_llama_3",
    "llama-3": "llava_llama_3",
    "v1.6-34b": "chatml_direct",
    "qwen2.5": "qwen_2_5",
}


def add_model_options(parser: argparse.ArgumentParser, max_new_tokens: int = 1024) -> None:
    """The options of every script: the model, its device, its template, and how it answers."""
    model = parser.add_argument_group("model")
    model.add_argument("--model-path", required=True, help="folder or hub name")
    model.add_argument("--model-base", default=None, help="base LLM of a checkpoint with a projector or LoRA only")
    model.add_argument("--conv-mode", default=None, help="conversation template (default: that of the checkpoint)")
    model.add_argument("--device", default=None, help="cuda, cuda:1, cpu ... (default: cuda if there is one)")
    model.add_argument("--load-8bit", action="store_true", help="8-bit weights (needs bitsandbytes)")
    model.add_argument("--load-4bit", action="store_true", help="4-bit weights (needs bitsandbytes)")
    model.add_argument("--model-args", default=None, help="run parameters of a trained architecture: k=v,k=v")
    model.add_argument("--method", default=None, help="compress visual tokens: NAME (keeps 25 %%), NAME@0.2 ...")
    answers = parser.add_argument_group("answers")
    answers.add_argument("--temperature", type=float, default=0.2, help="0: the likeliest token (default: 0.2)")
    answers.add_argument("--top_p", "--top-p", type=float, default=None)
    answers.add_argument("--num_beams", "--num-beams", type=int, default=1)
    answers.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=max_new_tokens)


def add_file_options(parser: argparse.ArgumentParser, questions: str) -> None:
    """The options of a script that answers the questions of a file."""
    files = parser.add_argument_group("files")
    files.add_argument("--question-file", required=True, help=questions)
    files.add_argument("--answers-file", default="answer.jsonl", help="JSON lines to write (default: answer.jsonl)")
    files.add_argument("--num-chunks", type=int, default=1, help="parts of the questions, for several processes")
    files.add_argument("--chunk-idx", type=int, default=0, help="which part this process answers, from 0")


@dataclasses.dataclass
class Assistant:
    """A loaded model that answers questions about images.

    ``args`` is any object with some of the options of :func:`add_model_options` (LLaVA's README calls ``eval_model``
    with a class made on the spot). A ``model_name`` in it is not needed: the checkpoint says what it is.
    """

    args: Any

    def __post_init__(self) -> None:
        import torch

        from llava.mm_utils import get_model_name_from_path
        from llava.model.builder import load_pretrained_model

        option = self._option
        self._check_template()
        self.device = option("device") or ("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.float16 if self.device.startswith("cuda") else torch.float32
        path = os.path.expanduser(option("model_path"))
        self.name = get_model_name_from_path(path)
        method, params = _method_of(option("method"))
        self.tokenizer, self.model, self.processor, _ = load_pretrained_model(
            path,
            option("model_base"),
            None,
            load_8bit=bool(option("load_8bit")),
            load_4bit=bool(option("load_4bit")),
            device=self.device,
            torch_dtype=self.dtype,
            method=method,
            method_params=params,
        )
        self.template = self._template()
        self._inputs, self._call = self._run_parameters()

    def _option(self, name: str, default: Any = None) -> Any:
        value = getattr(self.args, name, None)
        return default if value is None else value

    def _check_template(self) -> None:
        """Before a model is loaded."""
        from accelerate_methods.stages.errors import UnknownNameError
        from llava.conversation import conv_templates

        asked = self._option("conv_mode")
        if asked is not None and asked not in conv_templates:
            raise UnknownNameError("conversation template", asked, conv_templates)

    def _template(self) -> str:
        from llava.model.decoders import decoder_of

        asked = self._option("conv_mode")
        if asked is not None:
            return asked
        if self.model.about is not None:  # a trained architecture has one template
            return self.model.prompt_template
        name = self.name.lower()
        for part, template in _NAMED_TEMPLATES.items():
            if part in name:
                return template
        return _TEMPLATES.get(decoder_of(type(self.model)), "llava_v1")

    def _run_parameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of a trained architecture: those of the steps that make inputs, and those of ``generate``. Official scripts
        have them as attributes of their arguments."""
        from accelerate_methods.stages.errors import MethodError

        about, words = self.model.about, self._option("model_args")
        if about is None:
            if words:
                raise MethodError(f"--model-args {words}: {self.name} is plain LLaVA and has no run parameters.")
            return {}, {}
        asked = {argument.name: self._option(argument.name) for argument in about.arguments}
        own = {name: value for name, value in asked.items() if value is not None}
        pairs = [word.partition("=") for word in (words or "").split(",") if word.strip()]
        values = about.checked({**own, **{name.strip(): value.strip() for name, _, value in pairs}})
        return about.for_inputs(values), about.for_generate(values)

    # -- prompts -----------------------------------------------------------------------------------------------------

    def conversation(self) -> Any:
        """An empty one in the template."""
        from llava.conversation import SeparatorStyle, conv_templates

        conversation = conv_templates[self.template].copy()
        if conversation.sep_style is SeparatorStyle.LLAMA_3:  # printed by the checkpoint's own chat template
            conversation.tokenizer = self.tokenizer
        return conversation

    def with_images(self, question: str, count: int = 1) -> str:
        """The question with ``count`` placeholders: where it says <image-placeholder>, or in front."""
        config = self.model.config
        token = DEFAULT_IMAGE_TOKEN
        if getattr(config, "mm_use_im_start_end", False):
            token = DEFAULT_IM_START_TOKEN + token + DEFAULT_IM_END_TOKEN
        if IMAGE_PLACEHOLDER in question:
            return question.replace(IMAGE_PLACEHOLDER, token)
        if self.model.about is not None:
            return self.model.question_text(question, "image", count, **self._inputs)
        return f"{token}\n" * count + question

    def prompt(self, question: str) -> str:
        """The question, with its placeholders, in the template."""
        conversation = self.conversation()
        conversation.append_message(conversation.roles[0], question)
        conversation.append_message(conversation.roles[1], None)
        return conversation.get_prompt()

    # -- answers -----------------------------------------------------------------------------------------------------

    def ask(self, prompt: str, images: Sequence[Image.Image] = (), **generate: Any) -> str:
        """The answer to a whole prompt; ``generate`` goes to the model's ``generate``."""
        model = self.model
        prompt = model.whole_prompt(prompt, **self._inputs)
        ids = model.prompt_ids(prompt, self.tokenizer, **self._inputs)[None].to(model.device)
        if images:
            pixels = model.to_model(model.image_inputs(images, self.processor, **self._inputs))
            generate |= {"images": pixels, "image_sizes": [image.size for image in images], **self._call}
        generate.setdefault("max_new_tokens", self._option("max_new_tokens", 1024))
        output = self.model.generate(ids, **self._sampling(), pad_token_id=self._pad(), use_cache=True, **generate)
        return self.tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip()

    def _sampling(self) -> dict[str, Any]:
        temperature = self._option("temperature", 0)
        chosen = {"do_sample": temperature > 0, "num_beams": self._option("num_beams", 1)}
        if temperature > 0:
            return {**chosen, "temperature": temperature, "top_p": self._option("top_p")}
        return {**chosen, "temperature": None, "top_p": None, "top_k": None}

    def _pad(self) -> int | None:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad


def _method_of(words: str | None) -> tuple[str | None, dict[str, Any] | None]:
    """``NAME@0.25`` or ``NAME(k=0.3)`` as name and parameters."""
    if words is None:
        return None, None
    from accelerate_methods.registry.settings import settings_of
    from accelerate_methods.stages.errors import MethodError

    settings = settings_of(words, 0.25, {}, "")
    if len(settings) != 1:
        raise MethodError(f"--method {words!r}: one method is wanted, as in --method NAME@0.2.")
    return settings[0].method, dict(settings[0].params)


# -- files -------------------------------------------------------------------------------------------------------------


def load_image(source: str | os.PathLike[str]) -> Image.Image:
    """An RGB image, upright, from a file or an address (http, https).

    Raises:
        OSError: it cannot be read; the message names it.
    """
    import io
    import urllib.request

    from PIL import Image, ImageOps

    text = os.fspath(source)
    try:
        if text.startswith(("http://", "https://")):
            with urllib.request.urlopen(text, timeout=30) as answer:
                file: Any = io.BytesIO(answer.read())
        else:
            file = os.path.expanduser(text)
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except OSError as error:
        raise OSError(f"cannot read image {text}: {error.strerror or error}") from error


def get_chunk(items: Sequence[T], count: int, number: int) -> Sequence[T]:
    """Part ``number`` (from 0) of ``count`` parts of about the same length, in order.

    Raises:
        ValueError: there is no such part.
    """
    if not 0 <= number < count:
        raise ValueError(f"--chunk-idx {number}: with --num-chunks {count} it is 0 to {count - 1}")
    size = math.ceil(len(items) / count)
    return items[number * size : (number + 1) * size]


def read_json_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The objects of a JSONL file, or of a JSON file that holds a list.

    Raises:
        ValueError: not JSON; the message names file and line.
    """
    text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        return json.loads(text)
    out = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from error
    return out


class Answers:
    """A JSONL file of answers, written line by line."""

    def __init__(self, path: str | os.PathLike[str], model: str):
        self.path, self.model = Path(path).expanduser(), model

    def __enter__(self) -> Answers:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "w", encoding="utf-8")
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def write(self, question_id: Any, prompt: str, text: str, **more: Any) -> None:
        line = {"question_id": question_id, **more, "prompt": prompt, "text": text}
        line |= {"answer_id": uuid.uuid4().hex[:22], "model_id": self.model}
        line.setdefault("metadata", {})
        print(json.dumps(line, ensure_ascii=False), file=self._file, flush=True)


def shown(items: Sequence[T], what: str = "questions") -> Iterator[T]:
    """The items with a progress bar."""
    from tqdm import tqdm

    yield from tqdm(items, desc=what)


def run(eval_model: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """A script's work, with what a user can mend told in one line instead of a traceback."""
    from accelerate_methods.stages.errors import one_line

    try:
        eval_model(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error).__name__ not in ("CheckpointError", "TowerError"):
            raise
        sys.exit(f"error: {one_line(error)}")
