"""The model class of LLaVA-Mini: what happens between pixels and embeddings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from accelerate_methods.engine import recording
from accelerate_methods.engine.devices import moved
from accelerate_methods.engine.flops import pieces_macs, projector_macs
from accelerate_methods.engine.recording import SampleRecord
from accelerate_methods.engine.sequences import VisualSequence
from accelerate_methods.hosts.layouts import flat_item, shortened_item
from accelerate_methods.ops.select import on_device
from accelerate_methods.registry.architectures import architecture
from accelerate_methods.stages.compress import VisualItem
from llava.mm_utils import process_images
from llava.model.architectures.llava_mini.compressor import QueryCompressor, position_table, stitched
from llava.model.architectures.llava_mini.media import sample_frames, split_image, squeezed
from llava.model.architectures.llava_mini.prefusion import FusedImages, chunks, read, see, see_and_read
from llava.model.checkpoint import CheckpointError
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM, LlavaLlamaModel
from llava.model.splice import Prompts, samples_of_items
from llava.model.vision import kinds_of

#: attention heads of the released compressor, and the layers of a config that does not count them
HEADS, LAYERS = 8, 4


class LlavaMiniConfig(LlavaConfig):
    model_type = "llava_mini_llama"


class LlavaMiniModel(LlavaLlamaModel):
    """The decoder with the modules in front of it.

    Raises:
        CheckpointError: the config does not say how many tokens the compressor makes.
    """

    config_class = LlavaMiniConfig

    def __init__(self, config: Any):
        super().__init__(config)
        side = getattr(config, "compressor_size", None)
        if not isinstance(side, int) or side < 1:
            raise CheckpointError(f"compressor_size must be a whole number from 1 on, got {side!r}.")
        heads = getattr(config, "compressor_heads", HEADS)
        self.compressor = QueryCompressor(config.mm_hidden_size, side, heads)
        count = getattr(config, "prefusion_layer_num", LAYERS)
        self.prefusion_layers = nn.ModuleList([LlamaDecoderLayer(config, layer) for layer in range(count)])
        self._no_split_modules = {*(self._no_split_modules or ()), QueryCompressor.__name__}


@dataclasses.dataclass(repr=False)
class UnfusedItem(VisualItem):
    """An image or video before pre-fusion, whose ``features`` are zeros until the text is there (``compress``).

    Attributes:
        parts: [F, P, N, K] features of the P views of each frame, the whole one last; or what pre-fusion left earlier.
    """

    parts: Tensor | FusedImages | None = None


class LlavaMiniForCausalLM(LlavaLlamaForCausalLM):
    """``images`` may be, beside what every model of the tree takes, in the official forms: [B, P, 3, S, S] images of
    P = 1 or n*n + 1 views (sub-images in raster order, then the whole), [B, F, P, 3, S, S] videos, or a list of such
    items without the batch; and :class:`.prefusion.FusedImages` of :meth:`prefuse`, which are not looked at again.

    Several images of a prompt stand where their placeholders are, and the text is the mean of what it is with each, as
    it is with the frames of a video.
    """

    config_class = LlavaMiniConfig
    about = architecture("llava_mini")
    tokens_have_places: ClassVar[bool] = False
    unquantised: ClassVar[tuple[str, ...]] = ("compressor",)

    def __init__(self, config: LlavaMiniConfig):
        super(LlamaForCausalLM, self).__init__(config)
        if getattr(config, "image_aspect_ratio", None) is None:
            config.image_aspect_ratio = "square"  # the official default
        self.build(config, LlavaMiniModel)

    # -- the tower ---------------------------------------------------------------------------------------------------

    def encode(
        self,
        images: Any,
        modalities: list[str],
        image_sizes: Any = None,
        request: recording.RequestRecord | None = None,
    ) -> list[VisualItem]:
        """Tower features of every image and video; the rest waits for the text (:meth:`compress`)."""
        tower = self.get_vision_tower()
        tower.check_loaded()
        kinds = kinds_of(modalities, len(images))
        given = [_views(item, kind) for item, kind in zip(images, kinds, strict=True)]
        fresh = [item for item in given if isinstance(item, Tensor)]
        with recording.stage(request, "vision", tower.device):
            features = iter(self._look(fresh))
        items = []
        for image, item, kind in zip(images, given, kinds, strict=True):
            if isinstance(item, FusedImages):
                items.append(self.unfused(item.kind, len(item.tokens), item))
            else:  # five dimensions are frames, whatever is said
                kind = "video" if kind == "video" or image.ndim == 5 else "image"
                items.append(self.unfused(kind, len(item), next(features)))
        return items

    def _look(self, given: Sequence[Tensor]) -> list[Tensor]:
        """[F, P, 3, S, S] views of each item -> [F, P, N, K] features."""
        if not given:
            return []
        tower = self.get_vision_tower()
        pixels = torch.cat([item.flatten(0, 1).to(tower.device) for item in given])
        features = torch.cat([tower(pixels[some]) for some in chunks(len(pixels), tower.num_patches)])
        each = features.split([item.shape[0] * item.shape[1] for item in given])
        return [part.unflatten(0, item.shape[:2]) for part, item in zip(each, given, strict=True)]

    def unfused(self, kind: str, frames: int, parts: Tensor | FusedImages) -> UnfusedItem:
        """The layout of an item: C*C tokens per frame in a row."""
        like = parts.tokens if isinstance(parts, FusedImages) else parts
        count = self.get_model().compressor.side ** 2
        zeros = like.new_zeros(()).expand(frames, count, self.config.hidden_size)
        item = shortened_item(zeros, "video", None) if kind == "video" else flat_item(zeros, None)
        return UnfusedItem(**vars(item), parts=parts)

    # -- compressor and pre-fusion -----------------------------------------------------------------------------------

    def compress(self, items: Sequence[VisualItem], prompts: Prompts) -> list[VisualSequence]:
        """Visual tokens of every item, of which an attached method may leave fewer; ``prompts`` get the fused text."""
        prompts.embeds = self._fuse(items, prompts)
        return super().compress(items, prompts)

    def _fuse(self, items: Sequence[UnfusedItem], prompts: Prompts) -> Tensor:
        """Fills in the features of the items; [B, T, D] text as it is with the images of its sample, their mean."""
        decoder, ids = self.get_model(), prompts.input_ids
        # The released code takes ids from 0 down for padding. "!" has id 0 in LLaMA-3: it stays unfused there and here.
        ignored = ids <= 0
        if prompts.attention_mask is not None:
            ignored = ignored | ~prompts.attention_mask.bool()
        embeds = decoder.embed_tokens(ids.clamp(min=0))
        owners = samples_of_items(prompts, len(items))
        total, frames = torch.zeros(embeds.shape, dtype=torch.float32, device=embeds.device), [0] * len(ids)
        for group in _alike(items):
            own = [owners[number] for number in group for _ in range(items[number].num_frames)]
            for owner in own:
                frames[owner] += 1
            total, tokens = self._fuse_alike([items[n].parts for n in group], own, (embeds, ignored), total)
            for number, part in zip(group, tokens.split([items[n].num_frames for n in group]), strict=True):
                items[number].features, items[number].parts = part, None
        count = on_device(frames, total.device)[:, None, None]
        mean = (total / count.clamp(min=1)).to(embeds.dtype)
        return torch.where((count == 0) | ignored[..., None], embeds, mean)

    def _fuse_alike(
        self, parts: list[Tensor] | list[FusedImages], own: list[int], text: tuple[Tensor, Tensor], total: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Pre-fusion of images of one form.

        Args:
            own: sample of each frame; text: its [B, T, D] embeddings, and [B, T] what of it takes no part.
            total: [B, T, D] sum over frames of the fused text so far, float32.

        Returns:
            The sum with these frames, and their visual tokens [F, C*C, D].
        """
        decoder, tokens = self.get_model(), []
        earlier = FusedImages.joined(parts, "video") if isinstance(parts[0], FusedImages) else None
        features = None if earlier else torch.cat(parts)
        length = earlier.length if earlier else self._rows(features)
        rows = on_device(own, total.device)
        for some in chunks(len(own), length + text[0].shape[1]):
            embeds, ignored = (part[rows[some]] for part in text)
            if earlier is not None:
                seen = earlier.frames(some)
                part = seen.tokens
                fused = read(decoder, seen.cache(), *moved((embeds, ignored), part.device))
            else:
                image, compressed = self._visual_rows(features[some])
                embeds, ignored = moved((embeds, ignored), image.device)
                if decoder.gradient_checkpointing and decoder.training:
                    part, fused = see_and_read(decoder, image, compressed, embeds, ignored)
                else:
                    part, cache = see(decoder, image, compressed)
                    fused = read(decoder, cache, embeds, ignored)
            tokens.append(part)
            total = total.index_add(0, rows[some], fused.to(total.device, torch.float32))
        return total, torch.cat(tokens)

    def _rows(self, features: Tensor) -> int:
        """Rows of an image or frame in pre-fusion."""
        return features.shape[1] * features.shape[2] + self.get_model().compressor.side ** 2

    def _visual_rows(self, parts: Tensor) -> tuple[Tensor, Tensor]:
        """[F, P, N, K] features -> projected patches [F, P*N, D], the whole map before the whole image, and compressed
        tokens [F, C*C, D]. The compressor does not see the whole image of high resolution."""
        compressor = self.get_model().compressor
        whole = parts[:, 0] if parts.shape[1] == 1 else stitched(parts[:, :-1])
        image = self.project(whole)
        if parts.shape[1] > 1:
            image = torch.cat([image, self.project(parts[:, -1])], dim=1)
        tokens = compressor(whole.to(compressor.query.dtype))
        return image, moved(self.project(tokens), image.device)

    @torch.no_grad()
    def prefuse(self, images: Any, modalities: str | list[str] = ("image",)) -> list[FusedImages]:
        """Everything of images and videos that does not depend on the question, to be asked about again and again.

        What comes back is given as ``images=[...]`` in their place, once for each placeholder; answers are those to the
        images themselves. An image of the released model takes 9 MiB in half precision, a video so much per frame.
        """
        modalities = [modalities] * len(images) if isinstance(modalities, str) else list(modalities)
        out = []
        for item in self.encode(images, modalities):
            if isinstance(item.parts, FusedImages):
                out.append(item.parts)
                continue
            seen = []
            for some in chunks(item.num_frames, self._rows(item.parts)):
                seen.append(FusedImages.of(*see(self.get_model(), *self._visual_rows(item.parts[some])), item.modality))
            out.append(FusedImages.joined(seen, item.modality))
        return out

    # -- pictures, videos and prompts --------------------------------------------------------------------------------

    def image_inputs(self, images: Sequence[Image.Image], image_processor: Any, **arguments: Any) -> Any:
        ratio = self._ratio()
        if ratio == 1:
            return process_images(images, image_processor, self.config)
        parts = [split_image(image.convert("RGB"), ratio) for image in images]
        return [process_images(part, image_processor, self.config) for part in parts]

    def video_inputs(self, frames: np.ndarray, image_processor: Any, **arguments: Any) -> Tensor:
        ratio, side = self._ratio(), self.get_vision_tower().image_size
        parts = [part for frame in squeezed(frames, side) for part in split_image(frame, ratio)]
        pixels = process_images(parts, image_processor, self.config)
        return pixels if ratio == 1 else pixels.unflatten(0, (len(frames), -1))

    def made_up(self) -> None:
        compressor = self.get_model().compressor
        width = compressor.query.shape[1]
        table = position_table(width, compressor.side)
        compressor.pos_embed.data.copy_(table)
        nn.init.normal_(compressor.query, std=width**-0.5)

    def own_macs(self, sample: SampleRecord, **call: Any) -> int:
        """Of compressor, projector and pre-fusion, for every image and frame with the text of the prompt."""
        decoder, config = self.get_model(), self.config
        count, width = decoder.compressor.side ** 2, config.mm_hidden_size
        frames = sum(item.tokens_before for item in sample.items) // count
        if not frames:
            return 0
        ratio, patches = self._ratio(), self.get_vision_tower().num_patches
        mapped = patches * ratio**2
        image = mapped + (patches if ratio > 1 else 0)
        text = sample.dense_length + len(sample.items) - sum(item.tokens_before for item in sample.items)
        compressor = 2 * (count + mapped) * width**2 + 2 * count * mapped * width
        projector = projector_macs(image + count, decoder.mm_projector)
        halves = [(image + count, 0), (text, image + count)]
        fusion = pieces_macs(halves, config) // config.num_hidden_layers * len(decoder.prefusion_layers)
        return frames * (compressor + projector + fusion)

    def frame_indices(self, total: int, rate: float, **arguments: Any) -> list[int]:
        return sample_frames(total, rate, arguments.get("max_frames_num"))

    def _ratio(self) -> int:
        return getattr(self.config, "resolution_ratio", None) or 1


def _views(item: Tensor | FusedImages, kind: str) -> Tensor | FusedImages:
    """One item of ``images`` as [F, P, 3, S, S], or what was fused earlier as it is.

    Raises:
        ValueError: a number of views that no image has.
    """
    if isinstance(item, FusedImages):
        return item
    if item.ndim == 3:
        return item[None, None]
    if item.ndim == 4:
        item = item[:, None] if kind == "video" else item[None]
    if item.ndim != 5:
        raise ValueError(f"an image or video has 3 to 5 dimensions ([frames, views, 3, S, S]), got {item.ndim}.")
    tiles = item.shape[1] - 1
    if tiles and (tiles < 4 or math.isqrt(tiles) ** 2 != tiles):
        raise ValueError(
            f"LLaVA-Mini: an image has 1 view, or n*n sub-images and then the whole one (5, 10, ...), got {tiles + 1}. "
            "Frames of a video need modalities=['video']."
        )
    return item


def _alike(items: Sequence[UnfusedItem]) -> list[list[int]]:
    """Numbers of the items that can share a call: new ones with as many views, or those that were fused before."""
    groups: dict[Any, list[int]] = {}
    for number, item in enumerate(items):
        new = isinstance(item.parts, Tensor)
        groups.setdefault((new, item.parts.shape[1:3] if new else item.parts.length), []).append(number)
    return list(groups.values())


AutoConfig.register("llava_mini_llama", LlavaMiniConfig, exist_ok=True)
AutoModelForCausalLM.register(LlavaMiniConfig, LlavaMiniForCausalLM, exist_ok=True)
