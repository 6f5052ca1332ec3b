"""InternVL (the ``-hf`` checkpoints) in vLLM: square tiles, of which four patches make one token.

The frames of a video reach the language model as images with text in between, and are compressed as images, each by
itself; methods that compare frames cannot act, as under transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.models import interns1
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import VideoProcessorItems

from accelerate_methods.engine.encoder_attention import ENCODER_SIGNALS, asked_layers, signals_of_layers
from accelerate_methods.engine.sequences import compressed_sequence
from accelerate_methods.hosts.native.internvl import as_clip, block_means
from accelerate_methods.hosts.vllm.layouts import Layout
from accelerate_methods.hosts.vllm.processing import CompressedInfo, CompressedProcessor, with_runs
from accelerate_methods.hosts.vllm.served import Served
from accelerate_methods.hosts.vllm.workers import MethodWorker, groups, most_views
from accelerate_methods.registry import families
from accelerate_methods.registry.pipeline import ModelFacts
from accelerate_methods.stages.compress import VisualItem
from accelerate_methods.stages.errors import MethodError


def tiles_item(features: Tensor) -> VisualItem:
    """[V, N, D] tokens of the tiles of an image, or of a frame."""
    views, tokens, _ = features.shape
    side = int(tokens**0.5)
    index = torch.arange(views * tokens, device=features.device)
    return VisualItem(
        modality="image",
        features=features,
        positions=index.view(views, tokens),
        length=views * tokens,
        layout="grid",  # a tile's tokens stay in raster order
        grid=(side, side),
    )


class CompressedInternVLInfo(CompressedInfo, interns1.InternS1ProcessingInfo):
    about = families.INTERNVL

    def facts(self, method: Served) -> ModelFacts:
        config = self.get_hf_config()
        return ModelFacts(
            name=self.about.name,
            stages=frozenset({"compress"}),
            signals=ENCODER_SIGNALS,
            modalities=self.about.modalities,
            layers=config.text_config.num_hidden_layers,
            limits=self.about.limits,
        )

    def media_ids(self) -> set[int]:
        processor, tokenizer = self.get_hf_processor(), self.get_tokenizer()
        return super().media_ids() | {tokenizer.convert_tokens_to_ids(processor.video_token)}

    def words_around(self, items: Any) -> list[int]:
        processor, counts = self.get_hf_processor(), items.get_all_counts()
        marks = processor.start_image_token + processor.end_image_token
        words = [marks] * counts.get("image", 0)
        if counts.get("video", 0) and isinstance(items["video"], VideoProcessorItems):
            frames = [len(video) for video in items["video"].get_all() if video is not None]
            words += ["\n".join(f"Frame{number + 1}: {marks}" for number in range(count)) for count in frames]
        return [number for text in words for number in self.get_tokenizer().encode(text, add_special_tokens=False)]

    def check(self, method: Served) -> None:
        config = self.get_hf_config()
        if config.vision_feature_layer != -1:
            raise MethodError(
                f"{method.name}: vLLM takes the features of the last vision layer, this checkpoint those of "
                f"{config.vision_feature_layer}."
            )
        depth = config.vision_config.num_hidden_layers
        asked_layers(method.signals, depth, depth - 1)

    def layout(self, modality: str, items: Any, index: int, processed: Any) -> Layout:
        """Of an image; of one frame of a video."""
        tiles = int(processed["image_num_patches"].data) if modality == "image" else 1
        tokens = self.get_hf_processor().image_seq_length
        side = int(tokens**0.5)
        return Layout(tiles_item(torch.zeros(tiles, tokens, 1)), tiles, (side, side))

    def dense_rows(self, modality: str, items: Any, index: int, processed: Any) -> int:
        frames = 1 if modality == "image" else int(processed["video_num_patches"].data)
        return frames * super().dense_rows(modality, items, index, processed)


class CompressedInternVLProcessor(CompressedProcessor, interns1.InternS1MultiModalProcessor):
    def _replaced(self, full: Any, rows: int, layout: Layout, method: Served) -> Any:
        return with_runs(full, rows)


@MULTIMODAL_REGISTRY.register_processor(
    CompressedInternVLProcessor, info=CompressedInternVLInfo, dummy_inputs=interns1.InternS1DummyInputsBuilder
)
class CompressedInternVL(MethodWorker, interns1.InternS1ForConditionalGeneration):
    def _available(self, method: Served) -> frozenset[str]:
        return ENCODER_SIGNALS

    def embed_multimodal(self, **kwargs: Any) -> Any:
        modality, served = self._taken(kwargs)
        if served is None:
            return super().embed_multimodal(**kwargs)
        pixels = kwargs["pixel_values" if modality == "image" else "pixel_values_videos"]
        counts = kwargs[f"{modality}_num_patches"].flatten().tolist()
        out: list[Tensor] = []
        for part in groups(counts, most_views()):
            first, last = sum(counts[: part[0]]), sum(counts[: part[-1] + 1])
            wanted = self._wanted([served[i] for i in part])
            tokens, signals = self._tokens(pixels[first:last], wanted)
            start = 0
            for i in part:
                here = slice(start, start + counts[i])
                start = here.stop
                own = {name: value[here] for name, value in signals.items()}
                each = counts[i] if modality == "image" else 1  # frames are images by themselves
                out.append(torch.cat(self._items(served[i], tokens[here], own, each)))
        return tuple(out)

    def _items(self, method: Served, tokens: Tensor, signals: dict[str, Tensor], each: int) -> list[Tensor]:
        out = []
        for start in range(0, tokens.shape[0], each):
            item = tiles_item(tokens[start : start + each])
            item.signals = {name: value[start : start + each] for name, value in signals.items()}
            out.append(compressed_sequence(item, method, lambda given: given).tokens)
        return out

    def _tokens(self, pixels: Tensor, wanted: frozenset[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """[V, N, D] tokens and the signals over them; the tower gets so many views at a time."""
        layers = self.vision_tower.encoder.layer
        asked = asked_layers(wanted, len(layers), len(layers) - 1)
        tokens, signals = [], []
        for part in torch.split(pixels, most_views()):
            inputs: dict[int, Tensor] = {}
            handles = [layers[i].register_forward_pre_hook(_keeping(inputs, i)) for i in set(asked.values())]
            try:
                tokens.append(self.extract_feature(part))
            finally:
                for handle in handles:
                    handle.remove()
            clip = {index: as_clip(layers[index]) for index in set(asked.values())}
            found = signals_of_layers(clip, inputs, asked, special=1)
            factor = int(1 / self.downsample_ratio)
            signals.append({name: block_means(value, factor) for name, value in found.items()})
        return torch.cat(tokens), {name: torch.cat([found[name] for found in signals]) for name in signals[0]}


def _keeping(inputs: dict[int, Tensor], index: int) -> Any:
    def hook(layer: nn.Module, args: tuple) -> None:
        inputs[index] = args[0]

    return hook
