"""Answer MMBench's questions out of its TSV files: LLaVA's `llava.eval.model_vqa_mmbench`."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

from llava.eval.asking import Answers, Assistant, add_file_options, add_model_options, get_chunk, run, shown

_LETTERS = ("A", "B", "C", "D")
#: as the checkpoints were tuned
_LETTER_ONLY = {
    "en": "Answer with the option's letter from the given choices directly.",
    "cn": "请直接回答选项字母。",
}


def read_table(path: str | Path) -> list[dict[str, str]]:
    """Rows of a TSV file with a header; absent values are ""."""
    csv.field_size_limit(sys.maxsize)  # the images are columns
    with open(Path(path).expanduser(), encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return [{name: _text(value) for name, value in row.items() if name is not None} for row in rows]


def _text(value: Any) -> str:
    return "" if not isinstance(value, str) or value.strip().lower() in ("nan", "none") else value


def eval_model(args: Any) -> None:
    """Write one line for each question, or with ``args.all_rounds`` one for each rotation of its options."""
    from llava.mm_utils import load_image_from_base64

    rows = get_chunk(read_table(args.question_file), args.num_chunks, args.chunk_idx)
    assistant = Assistant(args)
    with Answers(args.answers_file, assistant.name) as answers:
        for row in shown(rows):
            letters = [letter for letter in _LETTERS if row.get(letter)]
            options = [row[letter] for letter in letters]
            image = load_image_from_base64(row["image"]).convert("RGB")
            for turn in range(len(options) if args.all_rounds else 1):
                turned = options[turn:] + options[:turn]
                question = _question(row, letters, turned)
                asked = f"{question}\n{_LETTER_ONLY[args.lang]}" if args.single_pred_prompt else question
                text = assistant.ask(assistant.prompt(assistant.with_images(asked)), [image])
                answers.write(
                    row["index"],
                    question,
                    text,
                    round_id=turn,
                    options=turned,
                    option_char=letters[turn:] + letters[:turn],
                )


def _question(row: dict[str, str], letters: list[str], options: list[str]) -> str:
    lines = [row["hint"]] if row.get("hint") else []
    lines += [row["question"], *(f"{letter}. {option}" for letter, option in zip(letters, options, strict=True))]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m llava.eval.model_vqa_mmbench", description="Answer MMBench.")
    add_file_options(options, "MMBench's TSV file: index, question, hint, A, B, C, D, image (base64)")
    options.add_argument("--all-rounds", action="store_true", help="ask with every rotation of the options")
    options.add_argument("--single-pred-prompt", action="store_true", help="ask for the option's letter alone")
    options.add_argument("--lang", choices=sorted(_LETTER_ONLY), default="en", help="of that request (default: en)")
    add_model_options(options)
    return options


if __name__ == "__main__":
    run(eval_model, parser().parse_args())
