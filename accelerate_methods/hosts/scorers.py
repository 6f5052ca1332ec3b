"""Scorers of video frames: how well each frame fits the question, by an image-text model of transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from accelerate_methods.stages.errors import MethodError, UnknownNameError

_BLIP_TOKENS = 35  # of the question, as LAVIS cuts it


def match_scores(logits: Tensor) -> Tensor:
    """[n, 2] logits of an image-text matching head (no, yes) -> [n] probability of yes, float64."""
    return logits.float().softmax(-1)[:, 1].double()


def cosine_scores(text: Tensor, images: Tensor) -> Tensor:
    """[1, D] and [n, D] features -> [n] cosines, float64."""
    return functional.cosine_similarity(images.float(), text.float(), dim=-1).double()


class Scorer(ABC):
    """An image-text model, loaded when it is made.

    Args:
        checkpoint: name on the hub or folder, None for :attr:`default`.
        device: where it computes.

    Raises:
        MethodError: it cannot be loaded.
    """

    default: str

    def __init__(self, checkpoint: str | None, device: torch.device | str = "cpu"):
        self.checkpoint, self.device = checkpoint or self.default, torch.device(device)
        try:
            self.load()
        except Exception as error:
            raise MethodError(
                f"frames are scored by {self.checkpoint!r}, which cannot be loaded: {error} Say where it is with "
                "scorer_checkpoint=... (a folder, or a name on the hub)."
            ) from error

    @abstractmethod
    def load(self) -> None:
        """Make model and processor out of ``self.checkpoint``."""

    @abstractmethod
    def read(self, question: str) -> Any:
        """The question as :meth:`score` wants it."""

    @abstractmethod
    def score(self, frames: np.ndarray, question: Any) -> Tensor:
        """[n] float64 scores of frames [n, height, width, 3], uint8 RGB."""


class ClipScorer(Scorer):
    """Cosine of image and text in the space of CLIP, or of another model that transformers loads like it (SigLIP)."""

    default = "openai/clip-vit-base-patch32"

    def load(self) -> None:
        from transformers import AutoModel, AutoProcessor

        self.model = AutoModel.from_pretrained(self.checkpoint).to(self.device).eval()
        self.processor = AutoProcessor.from_pretrained(self.checkpoint)

    @torch.no_grad()
    def read(self, question: str) -> Tensor:
        longest = self.model.config.text_config.max_position_embeddings
        padding = "max_length" if "siglip" in self.model.config.model_type else True
        text = self.processor(
            text=[question], return_tensors="pt", padding=padding, truncation=True, max_length=longest
        )
        return _pooled(self.model.get_text_features(**text.to(self.device)))

    @torch.no_grad()
    def score(self, frames: np.ndarray, question: Tensor) -> Tensor:
        pixels = self.processor(images=list(frames), return_tensors="pt").to(self.device)
        return cosine_scores(question, _pooled(self.model.get_image_features(**pixels))).cpu()


class BlipScorer(Scorer):
    """Probability that image and text match, by the matching head of BLIP."""

    default = "Salesforce/blip-itm-large-coco"

    def load(self) -> None:
        from transformers import AutoProcessor, BlipForImageTextRetrieval

        self.model = BlipForImageTextRetrieval.from_pretrained(self.checkpoint).to(self.device).eval()
        self.processor = AutoProcessor.from_pretrained(self.checkpoint)

    def read(self, question: str) -> dict[str, Tensor]:
        text = self.processor.tokenizer([question], return_tensors="pt", truncation=True, max_length=_BLIP_TOKENS)
        return {name: text[name].to(self.device) for name in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def score(self, frames: np.ndarray, question: dict[str, Tensor]) -> Tensor:
        pixels = self.processor.image_processor(images=list(frames), return_tensors="pt")["pixel_values"]
        text = {name: value.expand(len(frames), -1) for name, value in question.items()}
        out = self.model(pixel_values=pixels.to(self.device, self.model.dtype), use_itm_head=True, **text)
        return match_scores(out.itm_score).cpu()


SCORERS: dict[str, type[Scorer]] = {"clip": ClipScorer, "blip": BlipScorer}


def scorer_class(name: str) -> type[Scorer]:
    """The scorer called ``name``."""
    if name not in SCORERS:
        raise UnknownNameError("scorer of frames", name, SCORERS)
    return SCORERS[name]


def _pooled(features: Any) -> Tensor:
    """Newer releases of transformers wrap what older ones gave as a tensor."""
    return features if isinstance(features, Tensor) else features.pooler_output
