"""EVA-ViT-g as LLaMA-VID uses it: a CLIP encoder with a bias in the patch embedding and no norm before or behind.

Its blocks are transformers' CLIP layers (exact GELU, a key bias of zero), so that whatever reads or runs a CLIP tower
reads and runs this one. The weights are BLIP-2's file ``eva_vit_g.pth``; checkpoints name it by a path of the machine
on which they were trained. Follows `dvlab-research/LLaMA-VID@b3d3ae2b`, ``multimodal_encoder/eva_vit.py``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoder, CLIPVisionEmbeddings

from accelerate_methods.hosts.tower_files import TowerError
from accelerate_methods.stages.errors import one_line
from llava.model.multimodal_encoder.tower import VisionTower

#: blocks that run; the file holds more than BLIP-2 and LLaMA-VID use
DEPTH = 39
HEADS = 16
#: BLIP-2's file, and what its own code would download it as
FILE = "eva_vit_g.pth"
WHERE = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth"


class EvaVisionModel(nn.Module):
    """The encoder, with the names of transformers' CLIP vision model."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.embeddings = CLIPVisionEmbeddings(config)
        patch = config.patch_size
        self.embeddings.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, patch, patch)
        self.encoder = CLIPEncoder(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.patch_embedding.weight.dtype


class EvaVisionTower(VisionTower):
    """The tower. Its features [V, 1 + P, C] begin with the CLS token, which the Q-Former reads.

    Args:
        name: path of the weights (``config.mm_vision_tower``); where it leads nowhere the file is looked for in the
            checkpoint, and where BLIP-2's own code keeps it.
        args: the config; reads ``image_processor`` (pixels of a side), ``eva_heads`` and ``eva_depth``.
        checkpoint: folder of the LLaMA-VID checkpoint.

    Raises:
        TowerError: heads that do not fit, and on loading, if the file is nowhere or is no EVA-ViT.
    """

    model_class = EvaVisionModel
    special_tokens = 1

    def __init__(self, name: str, args: Any, delay_load: bool = True, checkpoint: str | None = None):
        super().__init__(name, args, delay_load=True, checkpoint=checkpoint)  # the checkpoint never holds it
        self.select_feature = "patch"

    def _read_config(self, args: Any) -> CLIPVisionConfig:
        self.heads, self.depth = getattr(args, "eva_heads", HEADS), getattr(args, "eva_depth", DEPTH)
        self._processor_name = getattr(args, "image_processor", None)
        self._side = self._make_processor().crop_size["height"]
        # as released; what the file says replaces it
        return self._described(args.mm_hidden_size, 14, self.depth, int(args.mm_hidden_size * 4.3637))

    def _described(self, width: int, patch: int, depth: int, mlp: int) -> CLIPVisionConfig:
        if width % self.heads:
            raise TowerError(f"EVA tower: a width of {width} cannot be divided among {self.heads} heads (eva_heads).")
        return CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=depth,
            num_attention_heads=self.heads,
            image_size=self._side,
            patch_size=patch,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
            attn_implementation="sdpa",
        )

    def load_model(self, device_map: Any = None) -> None:
        """Build and fill from the file; does nothing if the tower is already there."""
        if self.is_loaded:
            return
        path = find_weights(self.vision_tower_name, self.checkpoint)
        weights = read_weights(path)
        width, _, patch, _ = weights["patch_embed.proj.weight"].shape
        blocks = {int(found[1]) for key in weights if (found := re.match(r"blocks\.(\d+)\.", key))}
        mlp = weights["blocks.0.mlp.fc1.weight"].shape[0]
        self.hub_config = self.config = self._described(width, patch, min(self.depth, max(blocks) + 1), mlp)
        with torch.device("meta"):  # no random initial values for a billion weights
            self.build()
        self.vision_tower.load_state_dict(self._renamed(weights, path), assign=True)
        embeddings = self.vision_tower.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions)[None]  # not among the weights
        self.vision_tower.eval()

    def _renamed(self, weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
        """The file's weights under the names of :class:`EvaVisionModel`, the position table at the tower's size."""
        own = self.config
        own_names = {
            "embeddings.class_embedding": ("cls_token", lambda value: value.flatten()),
            "embeddings.patch_embedding.weight": ("patch_embed.proj.weight", None),
            "embeddings.patch_embedding.bias": ("patch_embed.proj.bias", None),
            "embeddings.position_embedding.weight": (
                "pos_embed",
                lambda value: resized_positions(value[0], own.image_size // own.patch_size),
            ),
        }
        for i in range(own.num_hidden_layers):
            layer, block = f"encoder.layers.{i}", f"blocks.{i}"
            for number, which in enumerate("qkv"):
                part = slice(number * own.hidden_size, (number + 1) * own.hidden_size)
                own_names[f"{layer}.self_attn.{which}_proj.weight"] = (
                    f"{block}.attn.qkv.weight",
                    lambda value, part=part: value[part],
                )
            own_names[f"{layer}.self_attn.q_proj.bias"] = (f"{block}.attn.q_bias", None)
            own_names[f"{layer}.self_attn.v_proj.bias"] = (f"{block}.attn.v_bias", None)
            own_names[f"{layer}.self_attn.k_proj.bias"] = (f"{block}.attn.v_bias", torch.zeros_like)
            for ours, theirs in {
                "layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj",
                "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
            }.items():  # fmt: skip
                own_names |= {f"{layer}.{ours}.{w}": (f"{block}.{theirs}.{w}", None) for w in ("weight", "bias")}
        missing = sorted({theirs for theirs, _ in own_names.values()} - set(weights))
        if missing:
            raise TowerError(f"{path} lacks {len(missing)} weights of EVA-ViT (first: {missing[0]}).")
        found = {
            ours: (weights[theirs] if change is None else change(weights[theirs])).to(torch.float32, copy=True)
            for ours, (theirs, change) in own_names.items()
        }
        wanted = self.vision_tower.state_dict()
        wrong = [name for name, value in found.items() if value.shape != wanted[name].shape]
        if wrong:
            shape = list(found[wrong[0]].shape)
            raise TowerError(f"{path} is no EVA-ViT that fits: {wrong[0]} would be {shape}.")
        return found

    def _layers_to_run(self) -> int:
        return self.config.num_hidden_layers

    def select(self, encoded: Any) -> Tensor:
        """[V, 1 + P, C], the CLS token in front."""
        return encoded.hidden

    def _make_processor(self) -> Any:
        return make_processor(self._processor_name, self.checkpoint)


def resized_positions(table: Tensor, side: int) -> Tensor:
    """[1 + p*p, C] positions -> [1 + side*side, C]; the patches bicubically in float32, the CLS token as it is."""
    old = round((table.shape[0] - 1) ** 0.5)
    if old == side:
        return table
    grid = table[1:].float().view(1, old, old, -1).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    return torch.cat([table[:1].float(), grid.flatten(2)[0].T])


def find_weights(name: str, checkpoint: str | None) -> Path:
    """The file of the tower's weights.

    Raises:
        TowerError: it is nowhere; says where it was looked for and where it is to be had.
    """
    file = Path(name).name or FILE
    tried = [Path(name), Path(torch.hub.get_dir()) / "checkpoints" / file]
    if checkpoint and Path(checkpoint).is_dir():
        tried[1:1] = [Path(checkpoint) / file, Path(checkpoint) / "vision_tower" / file]
    for path in tried:
        if path.is_file():
            return path
    raise TowerError(
        f"cannot find the weights of the EVA tower, which LLaMA-VID checkpoints do not hold: looked for "
        f"{', '.join(map(str, tried))}. Download {WHERE} to one of these places, or give its path as mm_vision_tower "
        "(overwrite_config)."
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights, read without executing anything.

    Raises:
        TowerError: it cannot be read, or holds something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickles that are cut or no pickles raise anything
        raise TowerError(f"cannot read {path}: {one_line(error)}") from error
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    needed = ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "pos_embed")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), Tensor) for key in needed):
        raise TowerError(f"{path} holds no EVA-ViT: it lacks {', '.join(needed)}.")
    return content


def make_processor(name: str | None, checkpoint: str | None) -> Any:
    """The CLIP image processor that ``config.image_processor`` names: its side is the tower's.

    Official configs give a folder inside the official repository ("./llamavid/processor/clip-patch14-224"). A folder
    that is there is read, also below the checkpoint's ``processor``; otherwise the number at the end of the name says
    all that its file would.

    Raises:
        TowerError: there is no such folder, and no number.
    """
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    from llava.image_processing import clip_image_processor, load_clip_image_processor

    name = name or "clip-patch14-224"
    folders = [Path(name)]
    if checkpoint:
        folders.append(Path(checkpoint) / "processor" / Path(name).name)
    for folder in folders:
        if (folder / "preprocessor_config.json").is_file():
            return load_clip_image_processor(folder)
    side = re.search(r"-(\d+)/?$", name)
    if side is None:
        raise TowerError(f"image_processor {name!r} is no folder with a preprocessor_config.json and names no side.")
    return clip_image_processor(int(side[1]), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
