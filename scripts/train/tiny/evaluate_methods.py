"""Accuracy of this repository's compression methods on the quick benchmark, loaded and run as a user would.

python evaluate_methods.py --checkpoint ... --tasks ... --method dense --method fastvid:retention_ratio=0.1
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import torch
from evaluate import Scores, clips_of, read_rows
from generator import QUESTION_TYPES
from text import BEFORE


def parse(spec: str) -> tuple[str | None, dict[str, float | int | str]]:
    """``name:key=value,key=value`` -> name and parameters; "dense" means no method."""
    name, _, rest = spec.partition(":")
    params = {}
    for pair in filter(None, rest.split(",")):
        key, value = pair.split("=")
        try:
            params[key] = json.loads(value)
        except json.JSONDecodeError:
            params[key] = value
    return (None if name == "dense" else name), params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--method", action="append", required=True)
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repo", type=Path, default=Path(__file__).resolve().parents[3])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sys.path.insert(0, str(args.repo))
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.mm_utils import tokenizer_image_token
    from llava.model.builder import load_pretrained_model

    rows = read_rows(args.tasks / "shapes_video" / "data" / "quick.jsonl")
    scores = Scores()
    for spec in args.method:
        began = time.time()
        name, params = parse(spec)
        tokenizer, model, processor, _ = load_pretrained_model(
            str(args.checkpoint), None, "llava_qwen", device_map="cpu", torch_dtype="float32",
            attn_implementation="sdpa", method=name, method_params=params,
        )  # fmt: skip
        with torch.inference_mode():
            for frames, questions in itertools.islice(clips_of(args.tasks / "shapes_video", rows), args.clips):
                pixels = processor.preprocess(frames, return_tensors="pt")["pixel_values"].to(model.dtype)
                good = []
                for q in questions:
                    prompt = f"{BEFORE}<image>\n{q.text}<|im_end|>\n<|im_start|>assistant\n"
                    ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
                    out = model.generate(
                        ids, attention_mask=torch.ones_like(ids), pad_token_id=tokenizer.pad_token_id, images=[pixels],
                        modalities=["video"], do_sample=False, max_new_tokens=8, use_cache=True,
                    )  # fmt: skip
                    good.append(tokenizer.batch_decode(out, skip_special_tokens=True)[0].strip() == q.answer)
                scores.add(spec, questions, good)
        print(f"{spec}: {time.time() - began:.0f} s", flush=True)
    scores.table(QUESTION_TYPES)


if __name__ == "__main__":
    main()
