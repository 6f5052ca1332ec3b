"""Ask a model about one image or several, and print the answer: LLaVA's `llava.eval.run_llava`.

python -m llava.eval.run_llava --model-path assets/tiny-llava-onevision --image-file picture.png --query "..."
"""

from __future__ import annotations

import argparse
from typing import Any

from llava.eval.asking import Assistant, add_model_options, load_image, run


def load_images(image_files: list[str]) -> list[Any]:
    """RGB images of files and addresses."""
    return [load_image(file) for file in image_files]


def image_parser(args: Any) -> list[str]:
    """The parts of ``args.image_file`` between ``args.sep``."""
    return args.image_file.split(getattr(args, "sep", ",") or ",")


def eval_model(args: Any) -> str:
    """Answer ``args.query`` about ``args.image_file``; prints the answer, and returns it.

    Args:
        args: the options of :func:`parser`; only ``model_path``, ``image_file`` and ``query`` have to be there.
    """
    images = load_images(image_parser(args))
    assistant = Assistant(args)
    answer = assistant.ask(assistant.prompt(assistant.with_images(args.query, len(images))), images)
    print(answer)
    return answer


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m llava.eval.run_llava", description="Ask about images.")
    options.add_argument("--image-file", required=True, help="files or addresses, with --sep between them")
    options.add_argument("--query", required=True, help="the question; <image-placeholder> says where images stand")
    options.add_argument("--sep", default=",", help="between images (default: a comma)")
    add_model_options(options, max_new_tokens=512)
    return options


if __name__ == "__main__":
    run(eval_model, parser().parse_args())
