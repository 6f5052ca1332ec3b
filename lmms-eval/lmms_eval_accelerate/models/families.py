"""LLaVA, LLaVA-OneVision and LLaVA-Video: what the stock classes ``llava``, ``llava_onevision`` and ``llava_vid`` feed.

Prompts, placeholders, image processing and frame sampling are those of the stock classes of lmms-eval 0.7.3; where
theirs answers without the video, crashes or cannot batch, ours says so or does it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from accelerate_methods.stages.errors import MethodError
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.media_kind import is_picture
from llava.mm_utils import process_images
from llava.model.checkpoint import read_config
from llava.model.decoders import checkpoint_decoder
from lmms_eval_accelerate.models.arguments import LLAVA, ONEVISION, VIDEO
from lmms_eval_accelerate.models.base import LlavaAccelerated, Question
from lmms_eval_accelerate.models.generation import OF_SAMPLING, READS
from lmms_eval_accelerate.models.visuals import (
    FRAME_FOLDER_FPS,
    UnsupportedVisual,
    frame_files,
    read_frames,
    read_image,
    read_video,
    videos_of,
)


class Llava(LlavaAccelerated):
    """LLaVA-1.5 and 1.6: images and text."""

    family = "llava"
    defaults: ClassVar[dict[str, Any]] = LLAVA

    def default_template(self) -> str:
        return "vicuna_v1"

    def overwrite_config(self) -> dict[str, Any]:
        if self.args.fixed_resolution is None:
            return {}
        return {"image_grid_pinpoints": [[int(edge) for edge in self.args.fixed_resolution.split("x")]]}

    def question(self, context: str, visuals: list[Any], gen_kwargs: dict, metadata: dict, where: str) -> Question:
        visuals = [read_image(v, where) if isinstance(v, str) and is_picture(v) else v for v in visuals]
        if any(isinstance(v, str) for v in visuals):
            raise UnsupportedVisual(
                f"{where}: the family llava reads images, not videos; use a llava_onevision or llava_video model."
            )
        if visuals and getattr(self.config, "image_aspect_ratio", None) is None:
            self.config.image_aspect_ratio = gen_kwargs.get("image_aspect_ratio")
        return self._image_question(context, visuals, getattr(self.config, "image_aspect_ratio", None))

    def _image_question(self, context: str, images: list[Image.Image], ratio: str | None) -> Question:
        if not images:
            return Question(context)
        if DEFAULT_IMAGE_TOKEN not in context:
            context = " ".join([DEFAULT_IMAGE_TOKEN] * len(images)) + "\n" + context
        tensors = self._processed(images, ratio)
        plain = isinstance(tensors, torch.Tensor) and tensors.ndim == 4
        visuals = self._cast(tensors) if plain else [self._cast(t) for t in tensors]
        return Question(context, visuals, "plain" if plain else "image", [image.size for image in images])

    def _processed(self, images: list[Image.Image], ratio: str | None) -> torch.Tensor | list[torch.Tensor]:
        grid = getattr(self.config, "image_grid_pinpoints", None)
        how = SimpleNamespace(image_aspect_ratio=ratio, image_grid_pinpoints=grid)
        try:
            return process_images(images, self.image_processor, how)
        except Exception as error:
            self._check_setting(how, error)
            raise

    def _check_setting(self, how: SimpleNamespace, error: Exception) -> None:
        """Tell a fault of the model's setting, which concerns all documents, from one of an image."""
        try:
            process_images([Image.new("RGB", (64, 64))], self.image_processor, how)
        except Exception:
            raise MethodError(f"images cannot be prepared for this model: {error}") from error

    def _cast(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.to(device=self._device, dtype=self.model.dtype)

    def _frames(self, frames: np.ndarray) -> torch.Tensor:
        return self._cast(self.image_processor.preprocess(frames, return_tensors="pt")["pixel_values"])


class LlavaOneVision(Llava):
    """LLaVA-OneVision: images, several images (padded to squares), videos by evenly spaced frames."""

    family = "llava_onevision"
    defaults: ClassVar[dict[str, Any]] = ONEVISION

    def default_template(self) -> str:
        return "qwen_1_5"

    def overwrite_config(self) -> dict[str, Any]:
        if self.args.mm_spatial_pool_stride != 2:
            raise MethodError(
                "mm_spatial_pool_stride must be 2: the official model pools video tokens by 2, whatever is asked."
            )
        changes = {
            "mm_spatial_pool_mode": self.args.mm_spatial_pool_mode,
            "mm_spatial_pool_stride": self.args.mm_spatial_pool_stride,
        }
        if self.args.mm_newline_position is not None:
            changes["mm_newline_position"] = self.args.mm_newline_position
        return changes

    def question(self, context: str, visuals: list[Any], gen_kwargs: dict, metadata: dict, where: str) -> Question:
        if not visuals:
            return Question(_turns(context))
        if metadata.get("task_type") == "video" and "sample_frames" in metadata:
            question = self._still_frames(context, visuals, metadata["sample_frames"])
        elif all(isinstance(v, str) for v in visuals):
            videos = [self._video(paths, where, metadata) for paths in videos_of(visuals)]
            question = self._video_question(context, videos)
        elif any(isinstance(v, str) for v in visuals):
            raise UnsupportedVisual(f"{where}: images and videos in one document are not supported.")
        else:
            ratio = getattr(self.config, "image_aspect_ratio", None)
            question = self._image_question(context, visuals, "pad" if len(visuals) > 1 or ratio is None else ratio)
        question.text = _turns(question.text)
        return question

    def sampling(self, gen_kwargs: dict[str, Any]) -> dict[str, Any]:
        """llava_onevision hands on what generate knows, and samples only if ``do_sample`` says so."""
        dropped = {"until", "image_aspect_ratio"}
        if not gen_kwargs.get("do_sample", False):
            dropped |= {"temperature", *OF_SAMPLING}
        handed = {k: v for k, v in gen_kwargs.items() if k in READS[self.family] and k not in dropped}
        return {"max_new_tokens": 1024, **handed}

    def _video(self, paths: list[str], where: str, metadata: dict) -> torch.Tensor:
        count = int(self.args.max_frames_num)
        files = frame_files(paths)
        if files is not None:
            return self._frames(read_frames(files, count, where, metadata.get("sampler"))[0])
        how = {"num_frames": count, "backend": self.args.video_decode_backend, **_choosing(metadata)}
        video = read_video(paths[0], where, **how)
        return self._frames(video.frames)

    def _video_question(self, context: str, videos: list[torch.Tensor]) -> Question:
        if DEFAULT_IMAGE_TOKEN not in context:
            context = " ".join([DEFAULT_IMAGE_TOKEN] * len(videos)) + "\n" + context
        return Question(context, videos, "video")

    def _still_frames(self, context: str, frames: list[Image.Image], count: int) -> Question:
        """A video task whose documents hold frames as images (task metadata ``sample_frames``)."""
        chosen = [frames[i] for i in np.linspace(0, len(frames) - 1, count, dtype=int)]
        return self._video_question(context, [self._cast(self._processed(chosen, "pad"))])


class LlavaVideo(LlavaOneVision):
    """LLaVA-Video: frames by rate up to a limit, or forced to it; optional time instruction."""

    family = "llava_video"
    defaults: ClassVar[dict[str, Any]] = VIDEO

    def default_template(self) -> str:
        # llava_vid's default is vicuna_v1 also for Qwen checkpoints, where every user has to override it
        return "qwen_1_5" if "Qwen" in type(self.model).__name__ else "vicuna_v1"

    def overwrite_config(self) -> dict[str, Any]:
        if not self.args.overwrite:
            return {}
        return {**super().overwrite_config(), **_longer_rope(self.args)}

    def sampling(self, gen_kwargs: dict[str, Any]) -> dict[str, Any]:
        return Llava.sampling(self, gen_kwargs)

    def question(self, context: str, visuals: list[Any], gen_kwargs: dict, metadata: dict, where: str) -> Question:
        images = visuals and not any(isinstance(v, str) for v in visuals)
        if images and metadata["task"] == "seedbench" and len(visuals) > 1:
            frames = torch.cat([self._frames(np.asarray(v.convert("RGB"))[None]) for v in visuals])
            return self._timed_question(context, [(frames, "1.00s", 1.0)])
        if visuals and all(isinstance(v, str) for v in visuals):
            videos = [self._timed_video(paths, where, metadata) for paths in videos_of(visuals)]
            return self._timed_question(context, videos)
        return super().question(context, visuals, gen_kwargs, {}, where)

    def _timed_video(self, paths: list[str], where: str, metadata: dict) -> tuple[torch.Tensor, str, float]:
        """Frames, their times as text, and the length in seconds."""
        args = self.args
        files = frame_files(paths)
        if files is not None:
            frames, indices = read_frames(files, int(args.max_frames_num), where, metadata.get("sampler"))
            times = ",".join(f"{i / FRAME_FOLDER_FPS:.2f}s" for i in indices)
            return self._frames(frames), times, len(files) / FRAME_FOLDER_FPS
        video = read_video(
            paths[0],
            where,
            num_frames=int(args.max_frames_num),
            fps=args.video_fps,
            force_sample=args.force_sample,
            backend=args.video_decode_backend,
            **_choosing(metadata),
        )
        return self._frames(video.frames), video.sample.frame_time, video.sample.video_time

    def _timed_question(self, context: str, videos: list[tuple[torch.Tensor, str, float]]) -> Question:
        if self.args.add_time_instruction:
            if len(videos) > 1:
                raise MethodError("add_time_instruction describes one video; this document has several.")
            frames, times, length = videos[0]
            context = (
                f"The video lasts for {length:.2f} seconds, and {len(frames)} frames are uniformly sampled from it. "
                f"These frames are located at {times}.Please answer the following questions related to this video."
                f"\n{context}"
            )
        if context.count(DEFAULT_IMAGE_TOKEN) != len(videos):  # llava_vid puts them in front in any case
            token = DEFAULT_IMAGE_TOKEN
            if getattr(self.config, "mm_use_im_start_end", False):
                token = DEFAULT_IM_START_TOKEN + token + DEFAULT_IM_END_TOKEN
            context = token * len(videos) + "\n" + context
        return Question(context, [frames for frames, _, _ in videos], "video")


FAMILY_CLASSES: dict[str, type[LlavaAccelerated]] = {c.family: c for c in (Llava, LlavaOneVision, LlavaVideo)}


def _choosing(metadata: dict) -> dict[str, Any]:
    """What chooses the frames of a video, if a method does (``Accelerated.choosing``)."""
    return {key: metadata[key] for key in ("sampler", "question") if "sampler" in metadata}


def _turns(text: Any) -> str | list[str]:
    """A context may be a JSON list of turns ``{"value": text}`` (llava_onevision)."""
    if not isinstance(text, str) or not text.lstrip().startswith("["):
        return text
    try:
        turns = json.loads(text)
    except json.JSONDecodeError:
        return text
    if not turns or not all(isinstance(turn, dict) and "value" in turn for turn in turns):
        return text
    return [turn["value"] for turn in turns]


def _longer_rope(args: Any) -> dict[str, Any]:
    """Linear rotary scaling that llava_vid gives 4k-context Vicuna and Yi checkpoints for long videos."""
    config = read_config(args.pretrained)
    name = Path(str(args.pretrained)).name.lower()
    if not ("vicuna" in name or "yi" in name) or checkpoint_decoder(config) != "llama":
        return {}
    side = 16 if "224" in str(config.get("mm_vision_tower")) else 24
    needed = int(args.max_frames_num) * (side // args.mm_spatial_pool_stride) ** 2 + 1000
    factor = math.ceil(needed / 4096)
    if factor < 2:
        return {}
    length = 4096 * factor
    return {
        "rope_scaling": {"factor": float(factor), "type": "linear"},
        "max_sequence_length": length,
        "tokenizer_model_max_length": length,
    }
