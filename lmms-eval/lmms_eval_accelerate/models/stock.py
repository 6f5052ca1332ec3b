"""What the stock chat classes of lmms-eval 0.7.3 do for a class of transformers models."""

from __future__ import annotations

import dataclasses
from typing import Any

from accelerate_methods.stages.errors import MethodError
from lmms_eval_accelerate.models.arguments import Arguments
from lmms_eval_accelerate.models.clips import Sampling

#: defaults of the stock Qwen classes
QWEN_MIN_PIXELS, QWEN_MAX_PIXELS = 256 * 28 * 28, 1605632


@dataclasses.dataclass(frozen=True)
class Stock:
    """
    Attributes:
        model: id of the stock model; tasks may hold prompts for it.
        max_new_tokens: where a task does not say.
        system_prompt: put in front of a chat without one.
        qwen: images and frames are resized by qwen-vl-utils.
        limited_images: images are limited by the processor; otherwise they only come in whole tokens.
        fps_capped: ``max_num_frames`` also limits what ``fps`` takes.
        videos: whether it reads videos.
        middles: see :class:`.clips.Sampling`.
    """

    model: str
    max_new_tokens: int
    system_prompt: str | None = None
    qwen: bool = False
    limited_images: bool = True
    fps_capped: bool = True
    videos: bool = True
    middles: bool = False


_LLAVA = Stock("llava_hf", 1024)
_IMAGES_ONLY = dataclasses.replace(_LLAVA, videos=False)
_QWEN2 = Stock("qwen2_5_vl", 128, qwen=True, fps_capped=False)
_STOCK = {
    "LlavaForConditionalGeneration": _IMAGES_ONLY,
    "LlavaNextForConditionalGeneration": _IMAGES_ONLY,
    "LlavaNextVideoForConditionalGeneration": _LLAVA,
    "LlavaOnevisionForConditionalGeneration": _LLAVA,
    "Qwen2VLForConditionalGeneration": dataclasses.replace(_QWEN2, model="qwen2_vl"),
    "Qwen2_5_VLForConditionalGeneration": _QWEN2,
    "Qwen3VLForConditionalGeneration": Stock(
        "qwen3_vl", 128, system_prompt="You are a helpful assistant.", qwen=True, limited_images=False
    ),
    "InternVLForConditionalGeneration": Stock("internvl_hf", 1024, middles=True),
}


def stock_of(model_class: str) -> Stock:
    """Of the class of that name; of the stock class ``huggingface`` where there is no better."""
    return _STOCK.get(model_class, Stock("huggingface", 4096))


def sampling_of(args: Arguments, stock: Stock, patch: int | None) -> tuple[Sampling, Sampling]:
    """How images and videos are read: by the arguments, and by what the stock class does where they are silent.

    Args:
        patch: pixels per side of a patch of the vision encoder.

    Raises:
        MethodError: pixel limits for a model whose processor has none.
    """
    given = {name: getattr(args, name) for name in ("min_pixels", "max_pixels", "total_pixels")}
    count, rate = int(args.max_num_frames), args.fps
    if not stock.qwen:
        named = [name for name, value in given.items() if value is not None]
        if named:
            raise MethodError(f"{', '.join(named)}: only models of the Qwen-VL family have such limits.")
        sampling = Sampling(count, rate, backend=args.video_decode_backend, middles=stock.middles)
        return sampling, sampling
    limits: dict[str, Any] = {
        "min_pixels": QWEN_MIN_PIXELS if given["min_pixels"] is None else int(given["min_pixels"]),
        "max_pixels": QWEN_MAX_PIXELS if given["max_pixels"] is None else int(given["max_pixels"]),
    }
    if limits["min_pixels"] > limits["max_pixels"]:
        raise MethodError(f"min_pixels={limits['min_pixels']} is more than max_pixels={limits['max_pixels']}.")
    images = {k: int(v) for k, v in given.items() if v is not None} if not stock.limited_images else {}
    if given["total_pixels"] is not None:
        limits["total_pixels"] = int(given["total_pixels"])
        if given["max_pixels"] is None:
            del limits["max_pixels"]
    frames = count if rate is None or stock.fps_capped else None
    return (
        Sampling(None, patch=patch, **images),
        Sampling(frames, rate, patch=patch, backend=args.video_decode_backend, **limits),
    )
