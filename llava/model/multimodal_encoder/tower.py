"""CLIP and SigLIP towers with the interface of LLaVA-NeXT's, on today's transformers modules.

A tower runs only the encoder layers whose output is used. Weights arrive either with the checkpoint (then the tower's
structure is built right away and ``from_pretrained`` fills it) or from the tower's own files by :meth:`load_model`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, SiglipVisionModel

from accelerate_methods.engine.devices import computes_on, own_weights
from accelerate_methods.engine.encoder_attention import Encoded, asked_layers, signals_of_layers
from accelerate_methods.engine.encoder_blocks import run_clip
from accelerate_methods.engine.flops import tower_macs
from accelerate_methods.hosts.tower_files import TowerError, VisionConfig, tower_config, tower_file, tower_weights
from accelerate_methods.stages.encode import EncodeMethod


class VisionTower(nn.Module):
    """Common part. Subclasses say how many layers run and what is returned.

    Args:
        name: hub name or folder (``config.mm_vision_tower``).
        args: the LLaVA config (reads ``mm_vision_select_layer`` / ``mm_vision_select_feature``).
        delay_load: build nothing yet; :meth:`load_model` will.
        checkpoint: folder of the LLaVA checkpoint, whose ``vision_tower`` folder is preferred.
    """

    model_class: type[nn.Module]

    def __init__(self, name: str, args: Any, delay_load: bool = False, checkpoint: str | None = None):
        super().__init__()
        self.vision_tower_name = name
        self.checkpoint = checkpoint
        self.select_layer = getattr(args, "mm_vision_select_layer", -2)
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        self.hub_config: VisionConfig = self._read_config(args)
        self.config = self._used_config(self.hub_config)
        self.config._attn_implementation = "sdpa"
        self.is_loaded = False
        self._processor: Any = None
        if not delay_load:
            self.build()

    def _read_config(self, args: Any) -> VisionConfig:
        """The tower's structure, out of its own files; ``args``: the config of the whole model."""
        return tower_config(self.vision_tower_name, self.checkpoint)

    def _used_config(self, config: VisionConfig) -> VisionConfig:
        return config

    def _layers_to_run(self) -> int:
        raise NotImplementedError

    def build(self) -> None:
        """Create the modules (weights to be filled by the caller)."""
        self.vision_tower = self.model_class(self.config)
        self.vision_tower.requires_grad_(False)
        self.is_loaded = True

    def check_loaded(self) -> None:
        """RuntimeError where the tower has no weights yet."""
        if not self.is_loaded:
            raise RuntimeError("the vision tower is not loaded; call model.get_vision_tower().load_model() first.")

    def load_model(self, device_map: Any = None) -> None:
        """Build and fill from the tower's own files; does nothing if the tower is already there.

        ``device_map`` is accepted for compatibility; move the model as a whole instead.
        """
        if self.is_loaded:
            return
        weights = tower_weights(self.vision_tower_name, self.checkpoint)
        with _fresh_init():
            self.build()
        wanted = self.vision_tower.state_dict()
        missing = sorted(set(wanted) - set(weights))
        if missing:
            raise TowerError(f"vision tower {self.vision_tower_name!r} lacks {len(missing)} weights: {missing[0]} ...")
        self.vision_tower.load_state_dict({k: weights[k] for k in wanted}, strict=True)
        self.vision_tower.eval()

    #: tokens in front of the patches
    special_tokens = 0

    def encode(
        self, pixels: Tensor, interpolate: bool = False, keep: Collection[int] = (),
        method: EncodeMethod | None = None, dense: int | None = None, videos: Sequence[int] | None = None,
    ) -> Encoded:  # fmt: skip
        """Run the encoder up to the selected layer.

        Args:
            pixels: [V, 3, S, S].
            interpolate: fit the position embeddings to another side than the tower's own.
            keep: encoder layers whose inputs are kept, for signals of them.
            method: acts inside the layers; dense: tokens of a view that the language model gets without it.
            videos: frames of each video, where the views are those.
        """
        model = self.vision_tower
        # interpolation reads the position table instead of calling its module
        with own_weights(model.embeddings.position_embedding) if interpolate else contextlib.nullcontext():
            hidden = before = model.embeddings(pixels.to(self.dtype), interpolate_pos_encoding=interpolate)
        if hasattr(model, "pre_layrnorm"):
            hidden = model.pre_layrnorm(hidden)
        layers = model.encoder.layers[: self._layers_to_run()]
        if method is not None:
            depth = self.hub_config.num_hidden_layers
            return run_clip(
                layers, hidden, method, depth=depth, special=self.special_tokens, inputs=keep, dense=dense,
                videos=videos,
            )  # fmt: skip
        inputs = {}
        for index, layer in enumerate(layers):
            if index in keep:
                inputs[index] = hidden
            before, hidden = hidden, layer(hidden, attention_mask=None)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return Encoded(hidden, self.special_tokens, before, inputs)

    def layers_of(self, names: Collection[str]) -> dict[str, int]:
        """Signal -> encoder layer that it is read from, for those of ``names`` that are of a layer.

        Raises:
            MethodError: a layer that is not there, or does not run.
        """
        layers = self._layers_to_run()
        return asked_layers(names, len(self.vision_tower.encoder.layers), layers - 1) if layers else {}

    def signals(self, encoded: Encoded, names: Collection[str]) -> dict[str, Tensor]:
        """The signals ``names`` (of ``engine.encoder_attention``), of the layer that gave ``encoded`` or of others."""
        if encoded.merged is not None:
            return encoded.merged.signals(self.vision_tower.encoder.layers, self.layers_of(names))
        inputs = encoded.around(self._layers_to_run() - 1)
        layers = self.vision_tower.encoder.layers
        return signals_of_layers(layers, inputs, self.layers_of(names), self.special_tokens)

    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Patch features [V, P, M] in the dtype of the input; a list of [3, S, S] gives a list of [1, P, M].

        Views whose side differs from the tower's get interpolated position embeddings.
        """
        if isinstance(images, list):
            return [self.forward(image[None]) for image in images]
        return self.select(self.look(images)).to(images.dtype)

    def look(
        self, images: Tensor, keep: Collection[int] = (), method: EncodeMethod | None = None, dense: int | None = None,
        videos: Sequence[int] | None = None,
    ) -> Encoded:  # fmt: skip
        """:meth:`encode` for views of any side, on the tower's device."""
        side = self.hub_config.image_size
        interpolate = tuple(images.shape[-2:]) != (side, side)
        return self.encode(images.to(self.device), interpolate, keep, method, dense, videos)

    def select(self, encoded: Encoded) -> Tensor:
        """[V, P, M] what the projector gets."""
        return encoded.patches

    # -- what callers read -------------------------------------------------------------------------------------------

    @property
    def image_processor(self) -> Any:
        if self._processor is None:
            self._processor = self._make_processor()
        return self._processor

    def _make_processor(self) -> Any:
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        return computes_on(self.vision_tower)

    @property
    def dummy_feature(self) -> Tensor:
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def num_blocks(self) -> int:
        """Encoder layers that run."""
        return self._layers_to_run()

    def macs(self, views: int, side: int | None = None) -> int:
        """Multiply-accumulates for so many views, of ``side`` pixels instead of the tower's own."""
        return tower_macs(views, self.hub_config, self.num_blocks, self.special_tokens, side)

    @property
    def num_patches_per_side(self) -> int:
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        return self.num_patches_per_side**2


class CLIPVisionTower(VisionTower):
    """CLIP: hidden state ``select_layer`` (counted with the embeddings as number 0), CLS dropped for "patch"."""

    model_class = CLIPVisionModel
    special_tokens = 1

    def __init__(self, name: str, args: Any, delay_load: bool = False, checkpoint: str | None = None):
        super().__init__(name, args, delay_load, checkpoint)
        if self.select_feature not in ("patch", "cls_patch"):
            raise TowerError(
                f"mm_vision_select_feature {self.select_feature!r} is not supported; allowed: patch, cls_patch."
            )

    def _layers_to_run(self) -> int:
        states = self.config.num_hidden_layers + 1
        return self.select_layer + states if self.select_layer < 0 else self.select_layer

    def select(self, encoded: Encoded) -> Tensor:
        return encoded.patches if self.select_feature == "patch" else encoded.hidden

    def _make_processor(self) -> Any:
        from llava.image_processing import load_clip_image_processor

        path = tower_file(self.vision_tower_name, self.checkpoint, "preprocessor_config.json")
        return load_clip_image_processor(path.parent)


class SigLipVisionTower(VisionTower):
    """SigLIP without its last encoder layer and without post-layernorm and head (docs/llava_tree.md, "Towers")."""

    model_class = SiglipVisionModel

    def _used_config(self, config: VisionConfig) -> VisionConfig:
        used = type(config).from_dict(config.to_dict())
        used.num_hidden_layers = config.num_hidden_layers - 1
        used.vision_use_head = False
        return used

    def _layers_to_run(self) -> int:
        return self.config.num_hidden_layers

    def _make_processor(self) -> Any:
        from llava.image_processing import SigLipImageProcessor

        return SigLipImageProcessor(size=self.image_size)


@contextlib.contextmanager
def _fresh_init():
    """Modules made here are real tensors in float32, whatever meta-device context is active around us."""
    with torch.device("cpu"):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
