"""Talk with a model about an image, in the terminal: LLaVA's `llava.serve.cli`.

An empty line, Ctrl-D or Ctrl-C ends the talk.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

from llava.eval.asking import Assistant, add_model_options, load_image, run


def main(args: Any) -> None:
    """Read questions until there are no more; the answers are printed while they are written."""
    from transformers import TextStreamer

    image = load_image(args.image_file)
    assistant = Assistant(args)
    streamer = TextStreamer(assistant.tokenizer, skip_prompt=True, skip_special_tokens=True)
    conversation = assistant.conversation()
    user, answerer = conversation.roles
    while question := _read(f"{_shown(user)}: "):
        # the image is in the first question, and with it in all that follow
        text = question if conversation.messages[conversation.offset :] else assistant.with_images(question)
        conversation.append_message(user, text)
        conversation.append_message(answerer, None)
        print(f"{_shown(answerer)}: ", end="", flush=True)
        prompt = conversation.get_prompt()
        conversation.messages[-1][-1] = assistant.ask(prompt, [image], streamer=streamer)
        if getattr(args, "debug", False):
            print({"prompt": prompt, "outputs": conversation.messages[-1][-1]})


def _shown(role: str) -> str:
    """A role without the special tokens of its template."""
    return re.sub(r"<[^>]*>", "", role).strip()


def _read(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m llava.serve.cli", description="Talk with a model about an image.")
    options.add_argument("--image-file", required=True, help="file or address")
    options.add_argument("--debug", action="store_true", help="print each prompt and answer as they are")
    add_model_options(options, max_new_tokens=512)
    return options


if __name__ == "__main__":
    run(main, parser().parse_args())
