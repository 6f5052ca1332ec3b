"""Check an exported checkpoint against two independent implementations.

1. transformers' own ``LlavaOnevisionForConditionalGeneration`` with the weights renamed: logits and generated answers.
2. ``llava.model.builder.load_pretrained_model`` of this repository (if it can be imported): generated answers.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from data import easy_vqa, enlarge
from evaluate import Checkpoint, clips_of, read_rows
from export import TOWER_PREFIX
from generator import Question
from safetensors.torch import load_file
from text import BEFORE
from torch import Tensor
from tower import normalise
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

RENAMES = (
    (TOWER_PREFIX, "model.vision_tower."),
    ("model.mm_projector.0", "model.multi_modal_projector.linear_1"),
    ("model.mm_projector.2", "model.multi_modal_projector.linear_2"),
    ("model.image_newline", "model.image_newline"),
    ("lm_head", "lm_head"),
    ("model.", "model.language_model."),
)


def native_model(folder: Path) -> LlavaOnevisionForConditionalGeneration:
    """The checkpoint as a transformers model, float32."""
    c = json.loads((folder / "config.json").read_text())
    vision = json.loads((folder / "vision_tower" / "config.json").read_text())["vision_config"]
    text = {k: c[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    text |= {
        k: c[k] for k in ("num_key_value_heads", "vocab_size", "rms_norm_eps", "hidden_act", "max_position_embeddings")
    }
    text |= {"model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": c["rope_theta"]}}
    text |= {"tie_word_embeddings": False, "eos_token_id": c["eos_token_id"], "bos_token_id": None}
    layers = vision["num_hidden_layers"] - 1
    config = LlavaOnevisionConfig(
        vision_config={**vision, "num_hidden_layers": layers, "vision_use_head": False},
        text_config=text,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
        image_token_index=1,
        video_token_index=2,
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    state = {}
    for key, value in load_file(folder / "model.safetensors").items():
        old, new = next(pair for pair in RENAMES if key.startswith(pair[0]))
        state[new + key.removeprefix(old)] = value.float()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all("inv_freq" in k or "position_ids" in k for k in missing), (missing, unexpected)
    return model.eval()


def native_visual(model: LlavaOnevisionForConditionalGeneration, pixels: Tensor, video: bool) -> Tensor:
    """Visual tokens [n, D] (with the newline for a video) by the native code."""
    if video:
        out = model.model.get_video_features(
            pixel_values_videos=pixels[None],
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            output_hidden_states=True,
        )
        return out.pooler_output[0]
    tower = model.model.vision_tower(pixels, output_hidden_states=True)
    return model.model.multi_modal_projector(tower.hidden_states[-1])[0]


@torch.no_grad()
def compare_native(
    ckpt: Checkpoint, folder: Path, cases: list[tuple[np.ndarray, list[Question], bool]]
) -> dict[str, float]:
    model = native_model(folder)
    worst, same, right, total = 0.0, 0, 0, 0
    for pixels, questions, video in cases:
        visual = native_visual(model, normalise(pixels), video)
        ours = ckpt.video(pixels)[0] if video else ckpt.image(pixels[0])[0]
        n = len(ours)
        expected = ckpt.answers(ours, torch.arange(n), n, video, questions)
        table = model.get_input_embeddings()
        for question, mine in zip(questions, expected, strict=True):
            ask = torch.tensor(ckpt.text.ask(question.text))
            embeds = torch.cat([table(torch.tensor(ckpt.text.before)), visual, table(ask)])[None]
            logits = model.lm_head(model.model.language_model(inputs_embeds=embeds).last_hidden_state)
            parts = [ckpt.model.embed_tokens(torch.tensor(ckpt.text.before)), ours]
            parts += [ckpt.model.image_newline[None]] if video else []
            scratch = torch.cat([*parts, ckpt.model.embed_tokens(ask)])[None]
            mine_logits = ckpt.model.logits_full(scratch, torch.arange(scratch.shape[1])[None])
            worst = max(worst, float((logits - mine_logits)[0, -len(ask) :].abs().max()))
            ids = model.generate(
                inputs_embeds=embeds, max_new_tokens=8, do_sample=False, eos_token_id=ckpt.text.end, pad_token_id=0
            )
            answer = ckpt.text.tokenizer.decode(ids[0], skip_special_tokens=True).strip()
            hit = answer == question.answer
            same += hit == mine
            right += hit
            total += 1
    return {"questions": total, "max logit difference": worst, "same verdict": same, "right": right}


@torch.no_grad()
def compare_builder(
    ckpt: Checkpoint, folder: Path, cases: list[tuple[np.ndarray, list[Question], bool]], dtype: str
) -> dict[str, float]:
    """Answers of this repository's LLaVA tree, prompted and fed exactly as lmms-eval's ``llava_onevision`` does it."""
    from PIL import Image

    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model

    tokenizer, model, processor, _ = load_pretrained_model(
        str(folder), None, "llava_qwen", device_map="cpu", torch_dtype=dtype, attn_implementation="sdpa"
    )
    model.eval()
    same, right, total, worst = 0, 0, 0, 0.0
    for pixels, questions, video in cases:
        ours = ckpt.video(pixels)[0] if video else ckpt.image(pixels[0])[0]
        expected = ckpt.answers(ours, torch.arange(len(ours)), len(ours), video, questions)
        if video:
            images = [processor.preprocess(pixels, return_tensors="pt")["pixel_values"].to(model.dtype)]
            extra = {"modalities": ["video"]}
        else:
            picture = Image.fromarray(pixels[0])
            images = process_images([picture], processor, model.config).to(model.dtype)
            extra = {"image_sizes": [picture.size]}
        for question, mine in zip(questions, expected, strict=True):
            prompt = f"{BEFORE}<image>\n{question.text}<|im_end|>\n<|im_start|>assistant\n"
            ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), pad_token_id=tokenizer.pad_token_id, images=images,
                do_sample=False, max_new_tokens=8, use_cache=True, **extra,
            )  # fmt: skip
            answer = tokenizer.batch_decode(out, skip_special_tokens=True)[0].strip()
            logits = model(input_ids=ids, images=images, use_cache=False, **extra).logits[0, -1].float()
            parts = [ckpt.model.embed_tokens(torch.tensor(ckpt.text.before)), ours]
            parts += [ckpt.model.image_newline[None]] if video else []
            parts.append(ckpt.model.embed_tokens(torch.tensor(ckpt.text.ask(question.text))))
            scratch = torch.cat(parts)[None]
            mine_logits = ckpt.model.logits_full(scratch, torch.arange(scratch.shape[1])[None])[0, -1]
            worst = max(worst, float((logits - mine_logits).abs().max()))
            hit = answer == question.answer
            same += hit == mine
            right += hit
            total += 1
    return {"questions": total, "max logit difference": worst, "same verdict": same, "right": right}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--repo", type=Path, default=Path(__file__).resolve().parents[3])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sys.path.insert(0, str(args.repo))
    ckpt = Checkpoint(args.checkpoint)
    rows = read_rows(args.tasks / "shapes_video" / "data" / "quick.jsonl")
    cases = []
    for frames, questions in clips_of(args.tasks / "shapes_video", rows):
        cases.append((frames, questions, True))
        if len(cases) == args.clips:
            break
    for row in easy_vqa("test")[: args.clips]:
        cases.append((enlarge(row["image"])[None], [Question("easy", *qa) for qa in row["qa"][:4]], False))
    print("transformers native (float32):", compare_native(ckpt, args.checkpoint, cases), flush=True)
    for dtype in ("float32", "float16"):
        print(f"load_pretrained_model ({dtype}):", compare_builder(ckpt, args.checkpoint, cases, dtype), flush=True)


if __name__ == "__main__":
    main()
