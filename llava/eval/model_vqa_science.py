"""Answer ScienceQA's questions, with or without an image: LLaVA's `llava.eval.model_vqa_science`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
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

_LETTER_ONLY = "Answer with the option's letter from the given choices directly."  # as the checkpoints were tuned


def eval_model(args: Any) -> None:
    """Write one line of ``args.answers_file`` for each question of ``args.question_file``."""
    questions = get_chunk(read_json_lines(args.question_file), args.num_chunks, args.chunk_idx)
    assistant = Assistant(args)
    folder = Path(args.image_folder or "").expanduser()
    with Answers(args.answers_file, assistant.name) as answers:
        for line in shown(questions):
            question = line["conversations"][0]["value"].replace(DEFAULT_IMAGE_TOKEN, "").strip()
            if args.single_pred_prompt:
                question = f"{question}\n{_LETTER_ONLY}"
            images = [load_image(folder / line["image"])] if line.get("image") else []
            text = assistant.ask(assistant.prompt(assistant.with_images(question, len(images))), images)
            answers.write(line["id"], f"{DEFAULT_IMAGE_TOKEN}\n" * len(images) + question, text)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m llava.eval.model_vqa_science", description="Answer ScienceQA.")
    add_file_options(options, "a JSON list with id, conversations and perhaps image")
    options.add_argument("--image-folder", default="", help="where the images of the questions are")
    options.add_argument("--single-pred-prompt", action="store_true", help="ask for the option's letter alone")
    add_model_options(options)
    return options


if __name__ == "__main__":
    run(eval_model, parser().parse_args())
