"""LLaVA's `llava.eval.model_vqa_loader`: :mod:`.model_vqa` for short answers (128 tokens)."""

from __future__ import annotations

from llava.eval.asking import run
from llava.eval.model_vqa import eval_model
from llava.eval.model_vqa import parser as parser_of

__all__ = ["eval_model", "parser"]


def parser():
    return parser_of("model_vqa_loader", max_new_tokens=128)


if __name__ == "__main__":
    run(eval_model, parser().parse_args())
