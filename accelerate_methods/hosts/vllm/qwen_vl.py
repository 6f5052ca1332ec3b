"""Qwen2-VL and Qwen2.5-VL in vLLM, and what Qwen3-VL shares: tokens on a grid, three position ids each.

Where tokens are missing, the ids of those that are left are known only when they are encoded. vLLM's runners have a
way for that (``recompute_mrope_positions``, made for its own video pruning), which is opened here for every method, and
only where the engine was told that methods may come. vLLM's own use of it counts text from another row, loses the ids
where an item lies in the prefix cache, and holds them in bfloat16 up to 256 only; ``grids`` does none of that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.models import qwen2_5_vl, qwen2_vl
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.platforms import current_platform

from accelerate_methods.engine.sequences import compressed_sequence
from accelerate_methods.hosts.vllm import grids
from accelerate_methods.hosts.vllm.blocks import ServedBlocks, asked_blocks
from accelerate_methods.hosts.vllm.layouts import Layout
from accelerate_methods.hosts.vllm.processing import CompressedInfo, CompressedProcessor, configured
from accelerate_methods.hosts.vllm.served import Served
from accelerate_methods.hosts.vllm.spec import KEY
from accelerate_methods.hosts.vllm.workers import MethodWorker, groups, most_views
from accelerate_methods.registry import families
from accelerate_methods.registry.pipeline import ModelFacts
from accelerate_methods.stages.compress import VisualItem
from accelerate_methods.stages.errors import MethodError

_ATTENTION = frozenset({"pooling_attention", "received_attention"})
_FROM_BLOCK = _ATTENTION | {"key_states"}
_PATCHES = 1024  # of a view, where the number of views that are encoded at a time is limited


def vision_signals(vision: Any) -> frozenset[str]:
    """What a vision encoder of this config gives."""
    whole = getattr(vision, "fullatt_block_indexes", None)
    sees_frames = whole is None or vision.depth - 1 in whole
    return (_FROM_BLOCK if sees_frames else _FROM_BLOCK - _ATTENTION) | {"frame_features"}


def grid_item(features: Tensor, modality: str, shape: tuple[int, int, int]) -> VisualItem:
    """[T*h*w, D] tokens of an image or video of ``shape`` (T, h, w)."""
    frames, rows, columns = shape
    index = torch.arange(features.shape[0], device=features.device)
    return VisualItem(
        modality=modality,
        features=features.unflatten(0, (frames, rows * columns)),
        positions=index.view(frames, -1),
        length=features.shape[0],
        layout="grid",  # a token's place is part of its position ids: methods leave it where it was
        grid=(rows, columns),
    )


class QwenInfo(CompressedInfo):
    """What the front end knows of a Qwen-VL model."""

    about = families.QWEN_VL

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)
        asked = any(source is not None for source in configured(ctx.model_config))
        if asked and ctx.model_config.multimodal_config.video_pruning_rate:
            raise MethodError(
                f"{KEY} and vLLM's own --video-pruning-rate both shorten videos; give one of them (its method is among "
                "ours, too)."
            )

    def facts(self, method: Served) -> ModelFacts:
        config = self.get_hf_config()
        return ModelFacts(
            name=self.about.name,
            stages=frozenset({"compress"}),
            signals=vision_signals(config.vision_config),
            modalities=self.about.modalities,
            layers=config.get_text_config().num_hidden_layers,
            limits=self.about.limits,
        )

    def check(self, method: Served) -> None:
        model_config = self.ctx.model_config
        if all(source is None for source in configured(model_config)):
            raise MethodError(
                f"{method.name}: on {self.about.name} models a request can name a method only where the server was "
                f'told so at its start. Start it with --hf-overrides \'{{"{KEY}": "none"}}\' (or a method).'
            )
        vision = self.get_hf_config().vision_config
        from_blocks = asked_blocks(method.signals, vision.depth, getattr(vision, "fullatt_block_indexes", None))
        if from_blocks and model_config.multimodal_config.mm_encoder_tp_mode == "data":
            raise MethodError(
                f"{method.name} reads vision blocks, which --mm-encoder-tp-mode data spreads over the ranks; use "
                "'weights', or a method that reads features only."
            )

    def shape(self, modality: str, grid: Tensor) -> tuple[int, int, int]:
        side = self.get_hf_config().vision_config.spatial_merge_size
        frames, rows, columns = grid.tolist()
        return frames, rows // side, columns // side

    def layout(self, modality: str, items: Any, index: int, processed: Any) -> Layout:
        shape = self.shape(modality, processed[f"{modality}_grid_thw"].data)
        tokens = shape[0] * shape[1] * shape[2]
        return Layout(grid_item(torch.zeros(tokens, 1), modality, shape), shape[0], shape[1:])


class QwenEncoding(MethodWorker):
    """Mixin in front of a Qwen-VL model of vLLM: encodes under methods, and says where tokens stand."""

    supports_multimodal_pruning: ClassVar[bool] = True

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        model_config = vllm_config.model_config
        carries = any(source is not None for source in configured(model_config))
        if carries:
            if getattr(vllm_config.compilation_config, "compile_mm_encoder", False):
                raise MethodError(f"{KEY} reads the vision encoder while it runs; leave compile_mm_encoder off.")
            # what vLLM's runners ask, and decoder layers that have to hold ids beyond the prompt's length; its own
            # video pruning stays off
            model_config.multimodal_config.__dict__["is_multimodal_pruning_enabled"] = _always
            tell_the_cpu_runner()
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        #: whether embeddings carry the columns of their positions
        self._carries = carries
        self._served_blocks = ServedBlocks(self.visual, self.config.vision_config)
        if carries:
            self.is_multimodal_pruning_enabled = True

    # -- encoding ----------------------------------------------------------------------------------------------------

    def embed_multimodal(self, **kwargs: Any) -> Any:
        if not self._carries:
            return super().embed_multimodal(**kwargs)
        _, served = self._taken(kwargs)
        modality = "image" if kwargs.get("image_grid_thw") is not None else "video"
        grid = kwargs[f"{modality}_grid_thw"]
        return tuple(self._encoded(modality, [None] * len(grid) if served is None else served, grid, kwargs))

    def _available(self, method: Served) -> frozenset[str]:
        return vision_signals(self.config.vision_config)

    def _encoded(
        self, modality: str, methods: list[Served | None], grid: Tensor, kwargs: dict[str, Any]
    ) -> list[Tensor]:
        pixels = "pixel_values" if modality == "image" else "pixel_values_videos"
        patches = grid.prod(-1).tolist()
        side = self.config.vision_config.spatial_merge_size
        shapes = [(frames, rows // side, columns // side) for frames, rows, columns in grid.tolist()]
        places = [self._place(modality, shape, kwargs, i) for i, shape in enumerate(shapes)]
        out: list[Tensor] = []
        for part in groups(patches, most_views() * _PATCHES):
            first, last = sum(patches[: part[0]]), sum(patches[: part[-1] + 1])
            own = {**kwargs, f"{modality}_grid_thw": grid[part[0] : part[-1] + 1]}
            if kwargs.get(pixels) is not None:
                own[pixels] = kwargs[pixels][first:last]
            wanted = self._wanted([methods[i] for i in part])
            with self._served_blocks.watch(wanted) as kept:
                embeds = self._embeds(modality, own)
            signals = self._served_blocks.signals(kept, wanted, [shapes[i] for i in part])
            for i, rows, found in zip(part, embeds, signals, strict=True):
                if "frame_features" in wanted:
                    main = rows[:, : self._width(rows)]
                    found["frame_features"] = main.unflatten(0, (shapes[i][0], -1)).mean(1)
                out.append(self._item(modality, methods[i], rows, shapes[i], found, places[i]))
        return out

    def _embeds(self, modality: str, kwargs: dict[str, Any]) -> Sequence[Tensor]:
        """vLLM's own embeddings [n, D] of each item."""
        parsed = getattr(self, f"_parse_and_validate_{modality}_input")(**kwargs)
        return getattr(self, f"_process_{modality}_input")(parsed)

    def _place(self, modality: str, shape: tuple[int, int, int], kwargs: dict[str, Any], index: int) -> Any:
        """What :meth:`_item` has to know of where an item's tokens stand: their coordinates [3, T*h*w]."""
        seconds = kwargs.get("second_per_grid_ts")
        if modality == "image":
            return grids.coordinates(*shape)
        each = 1.0 if seconds is None else float(seconds[index])
        return grids.coordinates(*shape, each * getattr(self.config.vision_config, "tokens_per_second", 1.0))

    def _width(self, rows: Tensor) -> int:
        """How many numbers of a row are what the language model gets at its first layer."""
        return rows.shape[-1]

    def _item(
        self,
        modality: str,
        method: Served | None,
        rows: Tensor,
        shape: tuple[int, int, int],
        signals: dict[str, Tensor],
        place: Any,
    ) -> Tensor:
        """[K, D + ...] what the prompt's rows of an item hold, with their columns."""
        where = place.to(rows.device)
        if method is None:
            return torch.cat([rows, grids.packed(where, rows)], dim=1)
        item = self._visual_item(modality, rows, shape, signals)
        found = compressed_sequence(item, method, lambda tokens: tokens)
        # what goes to further layers: that of the place at which a token stands
        deeper = rows[found.positions, self._width(rows) :]
        return torch.cat([found.tokens, deeper, grids.packed(where[:, found.positions], rows)], dim=1)

    def _visual_item(
        self, modality: str, rows: Tensor, shape: tuple[int, int, int], signals: dict[str, Tensor]
    ) -> VisualItem:
        """What a method gets of the encoder's ``rows`` [T*h*w, D + ...]."""
        item = grid_item(rows[:, : self._width(rows)], modality, shape)
        item.signals = signals
        return item

    def get_encoder_cudagraph_config(self) -> Any:
        found = super().get_encoder_cudagraph_config()
        return dataclasses.replace(found, modalities=[]) if self._carries else found

    # -- positions ---------------------------------------------------------------------------------------------------

    def get_mrope_input_positions(self, input_tokens: Any, mm_features: Any) -> tuple[Tensor, int]:
        if not self._carries:
            return super().get_mrope_input_positions(input_tokens, mm_features)
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        return grids.prompt_positions(len(input_tokens), self._standing(features))

    def _standing(self, features: Sequence[Any]) -> list[tuple[int, int, Tensor]]:
        """For ``grids.prompt_positions``, of the images and videos of a prompt in their order."""
        return [
            (offset, feature.mm_position.length, grids.coordinates(frames, rows, columns, per_frame))
            for feature, (offset, frames, rows, columns, per_frame) in zip(
                features, self.iter_mm_grid_thw(features), strict=True
            )
        ]

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Any, mrope_positions: Tensor, num_computed_tokens: int
    ) -> tuple[Any, Tensor, int]:
        if not self._carries:
            return super().recompute_mrope_positions(
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
            )
        ids = torch.as_tensor(input_ids, device=mrope_positions.device)
        parts = [part[:, -grids.COLUMNS :] for part in multimodal_embeddings]
        media = (self.config.image_token_id, self.config.video_token_id)
        positions = grids.with_encoded(ids, media, mrope_positions, num_computed_tokens, parts)
        delta = int(positions[:, -1].max()) + 1 - ids.shape[0]
        return [part[:, : -grids.COLUMNS] for part in multimodal_embeddings], positions, delta


def _always() -> bool:
    return True


def tell_the_cpu_runner() -> None:
    """Let vLLM's runner for CPUs, which never asks, learn that embeddings carry columns (its GPU runners ask)."""
    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    def asked(runner: Any) -> bool:
        return runner.__dict__.get("_pruning", False) or getattr(runner.__dict__.get("model"), "_carries", False)

    def told(runner: Any, value: bool) -> None:
        runner.__dict__["_pruning"] = value

    if "is_multimodal_pruning_enabled" not in CPUModelRunner.__dict__:
        CPUModelRunner.is_multimodal_pruning_enabled = property(asked, told)


class CompressedQwen2VLInfo(QwenInfo, qwen2_vl.Qwen2VLProcessingInfo):
    pass


class CompressedQwen2VLProcessor(CompressedProcessor, qwen2_vl.Qwen2VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    CompressedQwen2VLProcessor, info=CompressedQwen2VLInfo, dummy_inputs=qwen2_vl.Qwen2VLDummyInputsBuilder
)
class CompressedQwen2VL(QwenEncoding, qwen2_vl.Qwen2VLForConditionalGeneration):
    pass


class CompressedQwen25VLInfo(QwenInfo, qwen2_5_vl.Qwen2_5_VLProcessingInfo):
    pass


class CompressedQwen25VLProcessor(CompressedProcessor, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    CompressedQwen25VLProcessor, info=CompressedQwen25VLInfo, dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder
)
class CompressedQwen25VL(QwenEncoding, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    pass
