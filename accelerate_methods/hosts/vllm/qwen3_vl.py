"""Qwen3-VL in vLLM: videos with words between their frames, and features for several decoder layers.

Before every frame of a video stand its time and a mark, behind it another. How many of a frame's tokens a method keeps
is known only when the video is encoded, and with it where those words stand. So the words come from the encoder, too,
as embeddings in their places among the tokens: the prompt has the first time as text, and behind it as many
placeholders as there are tokens and words. vLLM's own video pruning does it so. What goes to further decoder layers
("deepstack") travels in the same rows, zeros for words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import qwen3_vl
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import VideoProcessorItems
from vllm.multimodal.processing import PromptUpdateDetails

from accelerate_methods.engine.sequences import compressed_sequence
from accelerate_methods.hosts.native.prompt import PromptItem, cut_prompt
from accelerate_methods.hosts.vllm import grids
from accelerate_methods.hosts.vllm.layouts import Layout
from accelerate_methods.hosts.vllm.processing import CompressedProcessor
from accelerate_methods.hosts.vllm.qwen_vl import QwenEncoding, QwenInfo
from accelerate_methods.hosts.vllm.served import Served


@dataclasses.dataclass(frozen=True)
class TimedVideo:
    """A video with the words between its frames, as it stands in a prompt of which nothing is missing.

    Attributes:
        ids: [R] words and placeholders.
        media: [T*h*w] rows of the placeholders.
        marks: [2T] rows of the words right before and behind each frame.
        lead: rows before the first of those: the first frame's time, which stays text.
    """

    ids: Tensor
    media: Tensor
    marks: Tensor
    lead: int

    @classmethod
    def of(cls, ids: Sequence[int], config: Any) -> TimedVideo:
        words = torch.tensor(list(ids))
        around = torch.tensor([config.vision_start_token_id, config.vision_end_token_id])
        marks = torch.isin(words, around).nonzero().squeeze(1)
        return cls(words, (words == config.video_token_id).nonzero().squeeze(1), marks, int(marks[0]))

    def coordinates(self, rows: int, columns: int) -> Tensor:
        """[3, R - lead] of what stands behind the first time, from there on; a frame has rows x columns tokens."""
        first = self.media[:: rows * columns] - self.lead
        frames = [(start, rows * columns, grids.coordinates(1, rows, columns)) for start in first.tolist()]
        return grids.prompt_positions(len(self.ids) - self.lead, frames)[0]

    def shortened(self, tokens: int, marks: bool) -> list[int]:
        """The ids of a prompt with so many tokens left, with or without the marks."""
        words = len(self.ids) - len(self.media) - (0 if marks else len(self.marks))
        placeholder = int(self.ids[self.media[0]])
        return self.ids[: self.lead].tolist() + [placeholder] * (words - self.lead + tokens)


def video_ids(per_frame: Sequence[int], timestamps: Sequence[float], tokenizer: Any, config: Any) -> list[int]:
    """The ids of a video with so many placeholders per frame, as vLLM writes them."""
    return qwen3_vl.Qwen3VLMultiModalProcessor.get_video_repl(
        tokens_per_frame=list(per_frame),
        timestamps=timestamps,
        tokenizer=tokenizer,
        vision_start_token_id=config.vision_start_token_id,
        vision_end_token_id=config.vision_end_token_id,
        video_token_id=config.video_token_id,
    ).full


class CompressedQwen3VLInfo(QwenInfo, qwen3_vl.Qwen3VLProcessingInfo):
    def words_around(self, items: Any) -> list[int]:
        if "video" not in items or not isinstance(items["video"], VideoProcessorItems):
            return []
        words: list[int] = []
        for video in items["video"].get_all():
            if video is not None:
                times = self._get_video_second_idx(video[1])
                words += video_ids([0] * len(times), times, self.get_tokenizer(), self.get_hf_config())
        return words


class CompressedQwen3VLProcessor(CompressedProcessor, qwen3_vl.Qwen3VLMultiModalProcessor):
    def _replaced(self, full: Any, rows: int, layout: Layout, method: Served) -> Any:
        if not isinstance(full, PromptUpdateDetails):
            return super()._replaced(full, rows, layout, method)
        config = self.info.get_hf_config()
        ids = TimedVideo.of(full.full, config).shortened(rows, method.marks_stay(layout.item.shape))
        return PromptUpdateDetails.select_token_id(ids, config.video_token_id)


@MULTIMODAL_REGISTRY.register_processor(
    CompressedQwen3VLProcessor, info=CompressedQwen3VLInfo, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder
)
class CompressedQwen3VL(QwenEncoding, qwen3_vl.Qwen3VLForConditionalGeneration):
    def _width(self, rows: Tensor) -> int:
        return self.visual_dim

    def _timed(self, timestamps: Sequence[float], shape: tuple[int, int, int]) -> TimedVideo:
        frames, rows, columns = shape
        ids = video_ids([rows * columns] * frames, timestamps, self._tokenizer, self.config)
        return TimedVideo.of(ids, self.config)

    def _place(self, modality: str, shape: tuple[int, int, int], kwargs: dict[str, Any], index: int) -> Any:
        if modality == "image":
            return super()._place(modality, shape, kwargs, index)
        return self._timed(kwargs["timestamps"][index], shape)

    def _item(
        self,
        modality: str,
        method: Served | None,
        rows: Tensor,
        shape: tuple[int, int, int],
        signals: dict[str, Tensor],
        place: Any,
    ) -> Tensor:
        if modality == "image":
            return super()._item(modality, method, rows, shape, signals, place)
        if method is None:  # all words are in the prompt, and a frame begins behind its own
            frame = grids.coordinates(1, *shape[1:])
            return super()._item(modality, None, rows, shape, signals, frame.repeat(1, shape[0]))
        width, media = self._width(rows), place.media.to(rows.device)
        item = self._visual_item(modality, rows, shape, signals)
        sequence = compressed_sequence(item, method, lambda tokens: tokens)
        whole = rows.new_zeros(len(place.ids), rows.shape[1])
        whole[:, :width] = self.get_language_model().embed_input_ids(place.ids.to(rows.device))
        whole[media] = rows
        start, end = int(place.media[0]), int(place.media[-1]) + 1
        video = PromptItem(0, media, start, end, item, marks=place.marks)
        cut = cut_prompt(whole[None, :, :width], None, None, [video], [sequence], original=False)
        tokens, source = cut.embeds[0, place.lead :], cut.source[0, place.lead :]
        where = place.coordinates(*shape[1:]).to(rows.device)[:, source - place.lead]
        return torch.cat([tokens, whole[source, width:], grids.packed(where, rows)], dim=1)

    def _embeds(self, modality: str, kwargs: dict[str, Any]) -> Sequence[Tensor]:
        return super()._embeds(modality, {name: value for name, value in kwargs.items() if name != "timestamps"})

    def _standing(self, features: Sequence[Any]) -> list[tuple[int, int, Tensor]]:
        out = []
        for feature in features:
            at, length, side = feature.mm_position.offset, feature.mm_position.length, self.visual.spatial_merge_size
            frames, rows, columns = feature.data[f"{feature.modality}_grid_thw"].data.tolist()
            shape = frames, rows // side, columns // side
            if feature.modality == "image":
                out.append((at, length, grids.coordinates(*shape)))
                continue
            video = self._timed(feature.data["timestamps"].data, shape)
            out.append((at + video.lead, length - video.lead, video.coordinates(*shape[1:])))
        return out
