"""The official models as shapes: their configs, built with random weights right on the device.

Sizes: the config files of the checkpoints on the hub. Time and memory do not depend on the weights,
as long as nothing overflows; what depends on content gets made-up features (``inputs.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from accelerate_methods.stages.errors import UnknownNameError

VICUNA_7B = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
VICUNA_13B = dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)
VICUNA = dict(
    vocab_size=32000, max_position_embeddings=4096, tokenizer_model_max_length=4096, rms_norm_eps=1e-5,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
QWEN2 = dict(
    max_position_embeddings=32768, tokenizer_model_max_length=32768, rms_norm_eps=1e-6, bos_token_id=151643,
    eos_token_id=151645,
)  # fmt: skip
QWEN2_7B = dict(
    hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
    vocab_size=152064, **QWEN2,
)  # fmt: skip
QWEN2_05B = dict(
    hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
    vocab_size=151936, tie_word_embeddings=True, **QWEN2,
)  # fmt: skip
CLIP, SIGLIP = "openai/clip-vit-large-patch14-336", "google/siglip-so400m-patch14-384"
_NEXT = dict(
    mm_patch_merge_type="spatial_unpad",
    image_aspect_ratio="anyres",
    image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
)
_ONEVISION = dict(
    mm_patch_merge_type="spatial_unpad",
    mm_newline_position="one_token",
    mm_spatial_pool_mode="bilinear",
    image_aspect_ratio="anyres_max_9",
    image_grid_pinpoints=[[384 * w, 384 * h] for w in range(1, 7) for h in range(1, 7)],
)
_VIDEO = {**_ONEVISION, "mm_newline_position": "grid"}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model to be built.

    Attributes:
        language: "qwen" or "llama"; decoder: its config values; llava: those of the multimodal part.
        family: key of its model family (``registry.families``).
        tower: hub name of a tower that the tree knows, the config of a made-up one, or None: ``llava`` says it.
        architecture: file of a trained architecture (``llava/model/architectures``), "" for plain LLaVA.
        frames: frames of a video, the setting of the official evaluations; 0 for models of images.
        image_size: (width, height) of the image.
    """

    language: str
    family: str
    decoder: dict[str, Any]
    tower: str | dict[str, Any] | None
    llava: dict[str, Any] = dataclasses.field(default_factory=dict)
    frames: int = 0
    image_size: tuple[int, int] = (672, 672)
    architecture: str = ""


_TINY_TOWER = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
    "num_hidden_layers": 3, "image_size": 112, "patch_size": 14, "num_channels": 3,
    "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
}  # fmt: skip
_TINY = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=256, max_position_embeddings=4096, tokenizer_model_max_length=4096, bos_token_id=1, eos_token_id=2,
)  # fmt: skip

SHAPES = {
    "llava-onevision-7b": Shape("qwen", "llava_onevision", QWEN2_7B, SIGLIP, _ONEVISION, frames=32),
    "llava-onevision-0.5b": Shape("qwen", "llava_onevision", QWEN2_05B, SIGLIP, _ONEVISION, frames=32),
    "llava-video-7b": Shape("qwen", "llava_video", QWEN2_7B, SIGLIP, _VIDEO, frames=64),
    "llava-1.5-7b": Shape("llama", "llava", {**VICUNA_7B, **VICUNA}, CLIP),
    "llava-1.5-13b": Shape("llama", "llava", {**VICUNA_13B, **VICUNA}, CLIP),
    "llava-next-7b": Shape("llama", "llava", {**VICUNA_7B, **VICUNA}, CLIP, _NEXT),
    "llava-next-13b": Shape("llama", "llava", {**VICUNA_13B, **VICUNA}, CLIP, _NEXT),
    "tiny": Shape("qwen", "llava_onevision", _TINY, _TINY_TOWER, _ONEVISION, frames=8, image_size=(112, 112)),
}


def shape_of(name: str, known: Mapping[str, Shape] = SHAPES) -> Shape:
    """The shape called ``name``; :class:`UnknownNameError` with the nearest match otherwise."""
    if name not in known:
        raise UnknownNameError("model shape", name, known)
    return known[name]


def build(shape: Shape, device: torch.device, dtype: torch.dtype, attention: str, folder: Path, seed: int = 0) -> Any:
    """A model of this shape with random weights; no parameter exists anywhere but on ``device`` in ``dtype``.

    Args:
        folder: an empty folder that lives as long as the model. It becomes the checkpoint that the tower and SigLIP's
            pooling head (which FastVID reads) are looked up in.
    """
    llava = {"mm_patch_merge_type": "flat", "image_aspect_ratio": "pad", "mm_projector_type": "mlp2x_gelu"}
    if shape.tower is not None:
        llava["mm_hidden_size"] = write_tower(shape.tower, folder, seed)["hidden_size"]
        llava["mm_vision_tower"] = shape.tower if isinstance(shape.tower, str) else str(folder / "vision_tower")
    model_class = _class_of(shape)
    config = model_class.config_class(
        **shape.decoder,
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        tower_checkpoint=str(folder),
        attn_implementation=attention,
        **llava | shape.llava,
    )
    with _defaults(device, dtype, seed):
        model = model_class(config)
        model.made_up()
    # one that is large enough to keep features apart, small enough for half precision
    projector = model.get_model().mm_projector
    for module in projector.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model.eval().requires_grad_(False)


def _class_of(shape: Shape) -> Any:
    """The class of the llava package for a shape."""
    if shape.architecture:
        return importlib.import_module(f"llava.model.architectures.{shape.architecture}").MODEL
    from llava.model.decoders import model_class_of

    return model_class_of(shape.language)


@contextlib.contextmanager
def _defaults(device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """New tensors are made on ``device`` in ``dtype``; both and the random state are as before afterwards."""
    before = torch.get_default_dtype()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def write_tower(tower: str | dict[str, Any], folder: Path, seed: int = 0) -> dict[str, Any]:
    """A ``vision_tower`` folder: the config and, for SigLIP, a random pooling head (on disk as in the hub's files)."""
    from safetensors.torch import save_file

    from accelerate_methods.hosts.pooling_head import SiglipPoolingHead
    from accelerate_methods.hosts.tower_files import tower_config

    config = tower_config(tower, None).to_dict() if isinstance(tower, str) else tower
    target = folder / "vision_tower"
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if config["model_type"] == "siglip_vision_model":
        with _defaults(torch.device("cpu"), torch.float32, seed):
            head = SiglipPoolingHead(
                config["hidden_size"], config["intermediate_size"], config["num_attention_heads"],
                config["layer_norm_eps"], config["hidden_act"],
            )  # fmt: skip
            torch.nn.init.normal_(head.probe)
        weights = {
            f"vision_model.{name if name.startswith('post_layernorm') else 'head.' + name}": value
            for name, value in head.state_dict().items()
        }
        save_file(weights, target / "model.safetensors")
    return config
