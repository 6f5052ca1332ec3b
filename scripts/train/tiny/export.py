"""Write tower, projector and decoder as a checkpoint in the official LLaVA-OneVision format (fp16 safetensors)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from data import GRID
from generator import SIDE
from safetensors.torch import save_file
from text import CONTEXT, SPECIALS, Text, save_tokenizer
from torch import Tensor
from tower import CONFIG, LAYERS

TOWER_NAME = "tiny-siglip-patch14-182"
TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."


def official_names(decoder: dict[str, Tensor], tower: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys of the official checkpoint: tower without its head, everything else under ``model.`` except the LM head."""
    out = {TOWER_PREFIX + k: v for k, v in tower.items() if not k.startswith("head.") and "position_ids" not in k}
    out |= {k if k.startswith("lm_head") else f"model.{k}": v for k, v in decoder.items()}
    return {k: v.detach().half().contiguous() for k, v in sorted(out.items())}


def hub_tower(tower: dict[str, Tensor]) -> dict[str, Tensor]:
    """The "hub" tower: one more layer, which LLaVA deletes; here it is an identity (its outputs are zero)."""
    out = {f"vision_model.{k}": v.detach().half().clone() for k, v in tower.items() if "position_ids" not in k}
    last = f"vision_model.encoder.layers.{LAYERS - 1}."
    for key in [k for k in out if k.startswith(last)]:
        value = out[key].clone()
        if "out_proj" in key or "fc2" in key:
            value.zero_()
        out[key.replace(last, f"vision_model.encoder.layers.{LAYERS}.")] = value
    return dict(sorted(out.items()))


def vision_config() -> dict:
    config = {**CONFIG, "num_hidden_layers": LAYERS + 1, "model_type": "siglip_vision_model", "num_channels": 3}
    text = {
        "hidden_size": CONFIG["hidden_size"],
        "intermediate_size": CONFIG["intermediate_size"],
        "model_type": "siglip_text_model",
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "vocab_size": 64,
    }
    return {
        "architectures": ["SiglipModel"],
        "initializer_factor": 1.0,
        "model_type": "siglip",
        "text_config": text,
        "torch_dtype": "float16",
        "vision_config": config,
    }


def preprocessor_config() -> dict:
    return {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "SiglipProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": SIDE, "width": SIDE},
    }


def llava_config(decoder: dict[str, Tensor], ids: dict[str, int], shape: dict) -> dict:
    vocab, width = decoder["embed_tokens.weight"].shape
    return {
        "_name_or_path": "tiny-llava-onevision",
        "architectures": ["LlavaQwenForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": ids[SPECIALS[0]],
        "eos_token_id": ids[SPECIALS[2]],
        "hidden_act": "silu",
        "hidden_size": width,
        "image_aspect_ratio": "pad",
        "image_crop_resolution": None,
        "image_split_resolution": None,
        "image_token_index": vocab,
        "initializer_range": 0.02,
        "intermediate_size": shape["mlp"],
        "max_position_embeddings": CONTEXT,
        "max_window_layers": shape["layers"],
        "mm_hidden_size": CONFIG["hidden_size"],
        "mm_newline_position": "one_token",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_lr": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_spatial_pool_mode": "bilinear",
        "mm_spatial_pool_stride": 2,
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": TOWER_NAME,
        "mm_vision_tower_lr": None,
        "model_type": "llava",
        "num_attention_heads": shape["heads"],
        "num_hidden_layers": shape["layers"],
        "num_key_value_heads": shape["groups"],
        "rms_norm_eps": shape["eps"],
        "rope_scaling": None,
        "rope_theta": shape["theta"],
        "sliding_window": None,
        "tie_word_embeddings": False,
        "tokenizer_model_max_length": CONTEXT,
        "tokenizer_padding_side": "right",
        "torch_dtype": "float16",
        "transformers_version": "4.40.0.dev0",
        "use_cache": True,
        "use_mm_proj": True,
        "use_pos_skipping": False,
        "use_sliding_window": False,
        "vision_tower_pretrained": None,
        "vocab_size": vocab,
    }


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def export(work: Path, out: Path) -> None:
    from decoder import Shape  # late: keeps the module importable without a trained decoder

    tower = torch.load(work / "tower.pt")["tower"]
    decoder = torch.load(work / "decoder.pt")["model"]
    (out / "vision_tower").mkdir(parents=True, exist_ok=True)
    save_tokenizer(out)
    text = Text(out)
    assert text.size == len(decoder["embed_tokens.weight"]), "tokenizer and decoder disagree"
    ids = {s: text.tokenizer.convert_tokens_to_ids(s) for s in SPECIALS}
    shape = {k: getattr(Shape(text.size), k) for k in ("mlp", "layers", "heads", "groups", "eps", "theta")}
    save_file(official_names(decoder, tower), out / "model.safetensors", metadata={"format": "pt"})
    save_file(hub_tower(tower), out / "vision_tower" / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", llava_config(decoder, ids, shape))
    write_json(out / "vision_tower" / "config.json", vision_config())
    write_json(out / "vision_tower" / "preprocessor_config.json", preprocessor_config())
    generation = {"bos_token_id": ids[SPECIALS[0]], "eos_token_id": [ids[SPECIALS[2]], ids[SPECIALS[0]]]}
    write_json(out / "generation_config.json", {**generation, "pad_token_id": ids[SPECIALS[0]]})
    for path in out.rglob("*.safetensors"):
        path.chmod(0o644)
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    print(f"{out}: {size / 1e6:.2f} MB, grid {GRID}x{GRID}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    export(args.work, args.out)


if __name__ == "__main__":
    main()
