"""Small vLLM engines, and this project's transformers host beside them: the same checkpoint, method and prompt."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

TOKENS = 6
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "DO_NOT_TRACK": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclasses.dataclass
class Answer:
    """Greedy ids, the log-probability of each, and how long the prompt was."""

    ids: list[int]
    log_probs: list[float]
    prompt: int

    def __eq__(self, other: object) -> bool:
        return self.ids == other.ids and self.prompt == other.prompt and self.near(other, 1e-4)

    def near(self, other: Answer, tolerance: float) -> bool:
        return bool(np.allclose(self.log_probs, other.log_probs, atol=tolerance, rtol=0))


class Served:
    """A checkpoint in a vLLM engine of this process.

    Args:
        marks: what stands in a prompt for an image and a video.
    """

    def __init__(self, checkpoint: Path, marks: dict[str, str], **arguments: Any):
        from vllm import LLM

        from accelerate_methods.hosts.vllm import register

        register()  # where the checkout's metadata hide those of the installed package
        self.checkpoint, self.marks = checkpoint, marks
        defaults = {
            "enforce_eager": True,
            "dtype": "float32",
            "max_model_len": 2048,
            "max_num_seqs": 4,
            "block_size": 32,
            "limit_mm_per_prompt": dict.fromkeys(marks, 2),
        }
        self.llm = LLM(model=str(checkpoint), **{**defaults, **arguments})

    def prompt(self, media: Sequence[Any], text: str = "What is it?", method: Any = None) -> dict[str, Any]:
        """A request; ``media`` are pictures, or videos [F, H, W, 3] with or without what vLLM calls metadata."""
        marks = "".join(self.marks[kind_of(medium)] for medium in media)
        data: dict[str, list[Any]] = {}
        for medium in media:
            data.setdefault(kind_of(medium), []).append(medium)
        found = {"prompt": f"<user>{marks}{text}\n<assistant>", "multi_modal_data": data}
        return found if method is None else {**found, "mm_processor_kwargs": {"visual_compression": method}}

    def ask(self, *prompts: dict[str, Any], tokens: int = TOKENS) -> list[Answer]:
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0, max_tokens=tokens, logprobs=1, ignore_eos=True)
        outputs = self.llm.generate(list(prompts), parameters, use_tqdm=False)
        return [
            Answer(
                list(output.outputs[0].token_ids),
                [
                    step[token].logprob
                    for token, step in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
                ],
                len(output.prompt_token_ids),
            )
            for output in outputs
        ]

    def one(self, *media: Any, **rest: Any) -> Answer:
        return self.ask(self.prompt(media, **rest))[0]

    def counted(self, metric: str) -> float:
        """What vLLM has counted since the process began."""
        return sum(found.value for found in self.llm.get_metrics() if found.name == metric)

    def close(self) -> None:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()


class Reference:
    """The same checkpoint in transformers, with this project's host."""

    def __init__(self, checkpoint: Path):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(checkpoint)

    @torch.no_grad()
    def answer(self, prompt: dict[str, Any]) -> Answer:
        """What ``Served.ask`` of the same prompt should give."""
        from accelerate_methods import accelerate
        from accelerate_methods.hosts.vllm.spec import merged, method_of

        inputs = self.inputs(prompt)
        method = method_of(merged([prompt.get("mm_processor_kwargs", {}).get("visual_compression")]))
        with accelerate(self.model, method, tokenizer=self.processor.tokenizer) as attached:
            output = self.model.generate(
                **inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, output_logits=True,
                return_dict_in_generate=True, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
            del attached
        ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        log_probs = [
            step[0].float().log_softmax(-1)[token].item() for token, step in zip(ids, output.logits, strict=True)
        ]
        return Answer(ids, log_probs, inputs["input_ids"].shape[1])

    def inputs(self, prompt: dict[str, Any]) -> Any:
        data = prompt["multi_modal_data"]
        more: dict[str, Any] = {"images": data["image"]} if "image" in data else {}
        if "video" in data:
            more["videos"] = [video[0] if isinstance(video, tuple) else video for video in data["video"]]
            more["do_sample_frames"] = False
            metadata = [video[1] for video in data["video"] if isinstance(video, tuple)]
            if metadata:
                names = ("fps", "duration", "total_num_frames", "frames_indices", "video_backend")
                more["video_metadata"] = [{name: one[name] for name in names} for one in metadata]
        return self.processor(text=prompt["prompt"], return_tensors="pt", **more)


def kind_of(medium: Any) -> str:
    return "image" if isinstance(medium, Image.Image) else "video"


def picture(width: int = 96, height: int = 72, seed: int = 0) -> Image.Image:
    """Coloured blocks: noise would look alike to a random model."""
    return Image.fromarray(_blocks(np.random.default_rng(seed), width, height))


def clip(frames: int = 8, side: int = 48, seed: int = 0) -> np.ndarray:
    """[F, side, side, 3] frames, no two alike: among equal tokens rounding decides."""
    generator = np.random.default_rng(seed)
    return np.stack([_blocks(generator, side, side) for _ in range(frames)])


def described(frames: np.ndarray, fps: float = 8.0) -> tuple[np.ndarray, dict[str, Any]]:
    """A video with what Qwen-VL models want to know of it.

    Of many frames per second: where a video is longer, in position ids, than its frames are wide, transformers 5.19
    lets the text begin among the video's ids, and vLLM behind them, as transformers did before.
    """
    count = len(frames)
    more = {"frames_indices": list(range(count)), "video_backend": "opencv", "do_sample_frames": False}
    return frames, {"fps": fps, "duration": count / fps, "total_num_frames": count, **more}


def _blocks(generator: np.random.Generator, width: int, height: int) -> np.ndarray:
    colours = generator.integers(0, 255, (4, 4, 3), dtype=np.uint8)
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    return colours[rows[:, None], columns]


def engine(checkpoint: Path, marks: dict[str, str], **arguments: Any) -> Iterator[Served]:
    """For a fixture: an engine that is closed afterwards. Skips where vLLM is not installed."""
    pytest.importorskip("vllm", reason="vLLM is not installed; scripts/test.sh makes an environment of its own for it")
    served = Served(checkpoint, marks, **arguments)
    try:
        yield served
    finally:
        served.close()
