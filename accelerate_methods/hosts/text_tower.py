"""Text towers of CLIP and SigLIP, for methods that compare images with the question.

LLaVA checkpoints hold the vision tower alone; the text tower and the projections into the space that both share come
from the tower's own checkpoint.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    SiglipTextConfig,
    SiglipTextModel,
)

from accelerate_methods.hosts.checkpoint_files import CheckpointError, read_json
from accelerate_methods.hosts.tower_files import (
    TowerError,
    tower_config,
    tower_file,
    tower_folder,
    weight_files,
    weights_named,
)
from accelerate_methods.stages.errors import MethodError

_CONFIGS = {"clip": CLIPTextConfig, "siglip": SiglipTextConfig}
_OFFICIAL = "openai/clip-vit-large-patch14-336"
_STRUCTURE = ("hidden_size", "image_size", "patch_size", "num_hidden_layers")


class TextTower(nn.Module):
    """The text half of a CLIP or SigLIP checkpoint, and CLIP's projection of image patches.

    Args:
        model: ``CLIPTextModelWithProjection`` or ``SiglipTextModel``.
        visual_projection: [C, M] CLIP's, float32; None for SigLIP, which has no linear one.
        tokenize: text -> ids, for CLIP with one BOS and one EOS, uncut.
    """

    def __init__(self, model: nn.Module, visual_projection: Tensor | None, tokenize: Callable[[str], Sequence[int]]):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.register_buffer("visual_projection", visual_projection)
        self.tokenize = tokenize

    @classmethod
    def from_files(cls, name: str) -> TextTower:
        """Read the text half of the tower ``name``, a folder or a name on the hub.

        Raises:
            TowerError: there is none, or it cannot be read.
        """
        path = tower_file(name, None, "config.json")
        raw = read_json(path)
        kind = str(raw.get("model_type", ""))
        if kind not in _CONFIGS:
            raise TowerError(f"{path}: model_type {kind!r} has no text tower that is known here (clip, siglip).")
        weights = weights_named(weight_files(name, None), ("text_model.", "text_projection.", "visual_projection."))
        if not any(key.startswith("text_model.") for key in weights):
            raise TowerError(f"the files of {name!r} hold a vision tower without its text tower.")
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except Exception as error:
            raise TowerError(f"the tokenizer of text tower {name!r} cannot be loaded: {error}") from error
        return cls.built(kind, dict(raw.get("text_config") or {}), weights, lambda text: tokenizer(text).input_ids)

    @classmethod
    def built(
        cls, kind: str, config: dict[str, Any], weights: dict[str, Tensor], tokenize: Callable[[str], Sequence[int]]
    ) -> TextTower:
        """From a text config and weights under the names of a full checkpoint; ``kind``: "clip" or "siglip"."""
        weights = dict(weights)
        projection = weights.pop("visual_projection.weight", None)
        if kind == "clip" and "text_projection.weight" in weights:
            config["projection_dim"] = weights["text_projection.weight"].shape[0]
        text_config = _CONFIGS[kind].from_dict(config)
        text_config._attn_implementation = "sdpa"
        with torch.device("meta"):  # no random initial values: they would draw from the global generator
            model = CLIPTextModelWithProjection(text_config) if kind == "clip" else SiglipTextModel(text_config)
        if kind == "siglip":
            weights = {key.removeprefix("text_model."): value for key, value in weights.items()}
        wanted = model.state_dict()
        missing = sorted(set(wanted) - set(weights))
        if missing:
            raise TowerError(f"the text tower lacks {len(missing)} weights: {missing[0]} ...")
        model.load_state_dict({key: weights[key] for key in wanted}, assign=True)
        for module in model.modules():  # not among the weights
            if isinstance(getattr(module, "position_ids", None), Tensor):
                module.position_ids = torch.arange(text_config.max_position_embeddings)[None]
        return cls(model, None if projection is None else projection.float(), tokenize)

    @property
    def is_clip(self) -> bool:
        return isinstance(self.model, CLIPTextModelWithProjection)

    def on_device(self, device: torch.device, dtype: torch.dtype) -> TextTower:
        """On a device; the text model in ``dtype``, the projection of patches in float32."""
        self.to(device)
        self.model.to(dtype)
        return self

    @torch.no_grad()
    def embed(self, text: str) -> Tensor:
        """[M, C] embedding of each row of a text (see :func:`text_chunks`)."""
        config = self.model.config
        ids = torch.as_tensor(list(self.tokenize(text)))
        if self.is_clip:
            rows, mask, _ = text_chunks(ids, config.max_position_embeddings)
            device = self.model.device
            return self.model(input_ids=rows.to(device), attention_mask=mask.to(device)).text_embeds
        pad = config.pad_token_id if config.pad_token_id is not None else 1
        rows, _, _ = text_chunks(ids, config.max_position_embeddings, pad)
        return self.model(input_ids=rows.to(self.model.device)).pooler_output  # SigLIP was trained without a mask

    @torch.no_grad()
    def embed_patches(self, patches: Tensor, norm: nn.Module) -> Tensor:
        """[V, P, M] patch features -> [V, P, C] in CLIP's image-text space; ``norm``: the tower's post_layernorm."""
        if self.visual_projection.device != patches.device:  # the model was moved after attaching
            self.to(patches.device)
        return functional.linear(norm(patches).float(), self.visual_projection)


def text_chunks(ids: Tensor, width: int, pad: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A tokenised text in rows that fit a text tower.

    Args:
        ids: [n].
        width: positions of the tower.
        pad: id in the rest of the last row; the mask is 0 there.

    Returns:
        ids [M, width], attention mask [M, width] and, for towers whose config says ``eos_token_id`` 2, the position [M]
        that is pooled: that of the largest id.
    """
    count = max(1, -(-ids.shape[0] // width))
    space = count * width - ids.shape[0]
    rows = functional.pad(ids, (0, space), value=pad).view(count, width)
    mask = functional.pad(torch.ones_like(ids), (0, space)).view(count, width)
    return rows, mask, rows.argmax(1)


# -- which one belongs to a model --------------------------------------------------------------------------------------


def text_tower_name(name: str | None, checkpoint: str | None, config: Any) -> str | None:
    """Where the text tower of a CLIP vision tower is to be had; None if nowhere that is known.

    Args:
        name: of the tower (hub or folder), None if the model does not say; then a tower of the official structure is
            taken for the official one.
        checkpoint: folder of the model, whose ``vision_tower`` comes first.
        config: of the vision tower.
    """
    if not isinstance(config, CLIPVisionConfig):
        return None
    folder = tower_folder(name or "", checkpoint)
    if folder is not None:
        return str(folder) if _has_text(folder) else None
    if name is None:
        official = tower_config(_OFFICIAL, None)
        same = all(getattr(config, key) == getattr(official, key) for key in _STRUCTURE)
        return _OFFICIAL if same else None
    return name


def _has_text(folder: Path) -> bool:
    """Whether a folder holds more than the vision half."""
    try:
        paths = weight_files(str(folder), None)
        if read_json(folder / "config.json").get("model_type") not in _CONFIGS:
            return False
    except CheckpointError:
        return False
    for path in paths:
        if path.suffix != ".safetensors":
            return True  # found out when it is loaded
        with safe_open(path, framework="pt") as source:
            if any(key.startswith("text_model.") for key in source.keys()):
                return True
    return False


_loaded: weakref.WeakKeyDictionary[Any, dict[str, TextTower]] = weakref.WeakKeyDictionary()


def text_tower_of(model: Any, name: str, width: int, method: str) -> TextTower:
    """The text tower ``name`` for a model object, loaded once.

    Args:
        width: M, of the vision tower's patch features.
        method: who asks, for errors.

    Raises:
        MethodError: it cannot be loaded, or belongs to another vision tower.
    """
    towers = _loaded.setdefault(model, {})
    if name in towers:
        return towers[name]
    hint = "Say where with text_tower=... (a folder, or a name on the hub)."
    try:
        tower = TextTower.from_files(name)
    except CheckpointError as error:
        raise MethodError(f"{method} needs the text tower of {name!r}. {hint} {error}") from error
    have = None if tower.visual_projection is None else tower.visual_projection.shape[1]
    if have != width:
        what = "has no projection of patches" if have is None else f"is for patches of width {have}"
        raise MethodError(f"{method}: text tower {name!r} {what}, this model's have {width}. {hint}")
    towers[name] = tower
    return tower
