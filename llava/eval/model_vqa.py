"""Answer a file of questions about images: LLaVA's `llava.eval.model_vqa`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llava.eval.asking import (
    Answers,
    Assistant,
    add_file_options,
    add_model_options,
    get_chunk,
    load_image,
    read_json_lines,
    run,
    shown,
)


def eval_model(args: Any) -> None:
    """Write one line of ``args.answers_file`` for each question of ``args.question_file``."""
    questions = get_chunk(read_json_lines(args.question_file), args.num_chunks, args.chunk_idx)
    assistant = Assistant(args)
    folder = Path(args.image_folder or "").expanduser()
    with Answers(args.answers_file, assistant.name) as answers:
        for question in shown(questions):
            prompt = assistant.prompt(assistant.with_images(question["text"]))
            text = assistant.ask(prompt, [load_image(folder / question["image"])])
            answers.write(question["question_id"], question["text"], text)


def parser(name: str = "model_vqa", max_new_tokens: int = 1024) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog=f"python -m llava.eval.{name}", description="Answer a file of questions.")
    add_file_options(options, "JSON lines with question_id, image and text")
    options.add_argument("--image-folder", default="", help="where the images of the questions are")
    add_model_options(options, max_new_tokens)
    return options


if __name__ == "__main__":
    run(eval_model, parser().parse_args())
