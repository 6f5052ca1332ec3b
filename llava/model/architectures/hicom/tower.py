"""SigLIP with both halves: features of patches, patches in the space of texts, and the instruction there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import SiglipVisionConfig

from accelerate_methods.hosts.tower_files import TowerError, VisionConfig
from llava.model.architectures.hicom.grammar import mode_of
from llava.model.architectures.text_towers import TextTokens, build_text_model, fill_text_model
from llava.model.multimodal_encoder.tower import SigLipVisionTower


class GuidedSigLipTower(SigLipVisionTower):
    """The whole vision model with its head, whose MLP brings patches into the space of texts, and the text model.

    Args: those of every tower. ``use_guide`` of the config says whether there is an instruction.

    Raises:
        TowerError: another tower than SigLIP, or features of another kind than patches.
    """

    def __init__(self, name: str, args: Any, delay_load: bool = False, checkpoint: str | None = None):
        self.guided = mode_of(getattr(args, "use_guide", None)) != "off"
        self.tokens: TextTokens | None = None
        super().__init__(name, args, delay_load, checkpoint)
        if self.select_feature != "patch":
            raise TowerError(f"mm_vision_select_feature {self.select_feature!r}: SigLIP has patches only ('patch').")

    def _used_config(self, config: VisionConfig) -> VisionConfig:
        if not isinstance(config, SiglipVisionConfig):
            raise TowerError(
                f"HICom with the tower {self.vision_tower_name!r} is not supported: released is a model with SigLIP."
            )
        used = type(config).from_dict(config.to_dict())
        used.vision_use_head = True
        return used

    def build(self) -> None:
        super().build()
        if self.guided:
            self.guide_encoder = build_text_model("siglip", self.vision_tower_name, self.checkpoint)
            limit = self.guide_encoder.config.max_position_embeddings
            asker = ("HICom", f"guided_input=<ids [n, {limit}] of the question, padded>")
            self.tokens = TextTokens(self.vision_tower_name, self.checkpoint, limit, asker)

    def load_model(self, device_map: Any = None) -> None:
        if self.is_loaded:
            return
        super().load_model(device_map)
        if self.guided:
            fill_text_model(self.guide_encoder, self.vision_tower_name, self.checkpoint)
            self.guide_encoder.eval()

    def _selected(self) -> int:
        """Index of the layer whose input is the feature; the number of layers for the output of the last one."""
        states = self.config.num_hidden_layers + 1
        return self.select_layer + states if self.select_layer < 0 else self.select_layer

    def _layers_to_run(self) -> int:
        return self.config.num_hidden_layers if self.guided else self._selected()

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """[V, 3, S, S] -> features [V, h, w, C], and the patches in the space of texts; None without instruction."""
        index, last = self._selected(), self._layers_to_run()
        encoded = self.look(pixels, keep=() if index == last else (index,))
        features = encoded.hidden if index == last else encoded.inputs[index]
        side = (pixels.shape[-2] // self.config.patch_size, pixels.shape[-1] // self.config.patch_size)
        if not self.guided:
            return features.unflatten(1, side), None
        model = self.vision_tower
        states = model.post_layernorm(encoded.hidden)
        embeds = states + model.head.mlp(model.head.layernorm(states))
        return features.unflatten(1, side), embeds.unflatten(1, side)

    def read(self, ids: Tensor, words: bool) -> Tensor:
        """[B, L] ids of instructions, padded to all positions -> [B, L, K]; without ``words`` [B, 1, K], the pooled.

        Padding is read, too: SigLIP was trained without a mask.
        """
        out = self.guide_encoder(input_ids=ids.to(self.device))
        return self.guide_encoder.head(out.last_hidden_state) if words else out.pooler_output[:, None]

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype
