"""Write the embedded LLaVA-OneVision (assets/) as a transformers checkpoint, which is what vLLM serves.

    python scripts/serve/embedded_checkpoint.py FOLDER
    python scripts/serve/embedded_checkpoint.py FOLDER --decoder 640x12    # behind the tower a random one of this size

Two rows are added to the vocabulary for the placeholders of images and videos. Pictures are laid out as transformers
does it, the whole image and one tile with newlines; the model was trained on the whole image alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)

EMBEDDED = Path(__file__).parents[2] / "assets" / "tiny-llava-onevision"
RENAMED = {
    "model.vision_tower.vision_tower.vision_model.": "model.vision_tower.",
    "model.vision_tower.vision_tower.": "model.vision_tower.",
    "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
    "model.layers.": "model.language_model.layers.",
    "model.embed_tokens.": "model.language_model.embed_tokens.",
    "model.norm.": "model.language_model.norm.",
}
TEXT = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "eos_token_id", "bos_token_id"),
)
TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<{{ part['type'] }}>\n{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def renamed(name: str) -> str:
    """A weight's name in transformers."""
    return next((new + name.removeprefix(old) for old, new in RENAMED.items() if name.startswith(old)), name)


def widened(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """[V, D] with ``rows`` more that are never preferred to what stands at the end of the vocabulary."""
    return torch.cat([weight, weight[-3:-2].expand(rows, -1)])


def decoder(text: str) -> dict[str, int]:
    """Sizes of a decoder: "WIDTHxLAYERS", heads of 64."""
    width, _, layers = text.partition("x")
    if not (width.isdecimal() and layers.isdecimal() and int(layers) and int(width) and int(width) % 64 == 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a width that 64 divides and a number of layers, as 640x12")
    heads = int(width) // 64
    sizes = {"hidden_size": int(width), "intermediate_size": 3 * int(width), "num_hidden_layers": int(layers)}
    return {**sizes, "num_attention_heads": heads, "num_key_value_heads": heads}


def write(folder: Path, sizes: dict[str, int] | None = None) -> None:
    """Write the checkpoint; with ``sizes``, a decoder of these and the projector have random weights."""
    own = {**json.loads((EMBEDDED / "config.json").read_text()), **(sizes or {})}
    words = own["vocab_size"]
    image, video = words, words + 1
    tower = json.loads((EMBEDDED / "vision_tower" / "config.json").read_text())["vision_config"]
    vision = SiglipVisionConfig(**{**tower, "num_hidden_layers": tower["num_hidden_layers"] - 1})
    text = Qwen2Config(
        vocab_size=words + 2,
        rope_parameters={"rope_type": "default", "rope_theta": own["rope_theta"]},
        **{name: own[name] for name in TEXT},
    )
    side = vision.image_size
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image,
        video_token_index=video,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[side, side]],
        vision_aspect_ratio="anyres_max_9",
    )
    torch.manual_seed(0)
    model = LlavaOnevisionForConditionalGeneration(config)
    weights = {renamed(name): value.float() for name, value in load_file(EMBEDDED / "model.safetensors").items()}
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = widened(weights[name], 2)
    if sizes:
        weights = {name: value for name, value in weights.items() if ".vision_tower." in name}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    left = [name for name in missing if "post_layernorm" not in name and ".head." not in name]
    if sizes:
        left = [name for name in left if ".vision_tower." in name]
    if left or unexpected:
        raise SystemExit(f"error: the embedded checkpoint does not fit: missing {left}, unexpected {unexpected}")
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<image>", "<video>"]})
    if tokenizer.convert_tokens_to_ids(["<image>", "<video>"]) != [image, video]:
        raise SystemExit("error: the placeholders did not come behind the vocabulary")
    size = {"height": side, "width": side}
    normal = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": size}
    LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(**normal, image_grid_pinpoints=[[side, side]]),
        tokenizer,
        LlavaOnevisionVideoProcessor(**normal),
        num_image_tokens=(side // vision.patch_size) ** 2,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
        vision_aspect_ratio="anyres_max_9",
    ).save_pretrained(folder)
    shutil.copytree(EMBEDDED / "vision_tower", folder / "vision_tower", dirs_exist_ok=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--decoder", type=decoder, metavar="WIDTHxLAYERS", help="a random one instead, to measure with")
    options = parser.parse_args()
    write(options.folder, options.decoder)
