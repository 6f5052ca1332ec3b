"""Adapters from golden vectors to `llava`'s text and image utilities (docs/differences.md has what differs).

ADAPTERS: (method, stage) -> fn(inputs, params, context) -> outputs under the golden names without "out.".
TEXT_CHECKS: section of text.json -> fn(section, context) -> one (name, ok, detail) per item.
`context.checkpoint(name)` is the folder of a tiny checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from accelerate_methods.registry.architectures import ARCHITECTURES
from llava.conversation import conv_templates
from llava.image_processing import SigLipImageProcessor, load_clip_image_processor
from llava.mm_utils import (
    KeywordsStoppingCriteria,
    candidate_resolutions,
    get_anyres_image_grid_shape,
    get_model_name_from_path,
    process_images,
    select_best_resolution,
    tokenizer_image_token,
)
from llava.tokenization import load_tokenizer
from llava.video_utils import sample_frames, uniform_frame_indices

Check = tuple[str, bool, str]
Tensors = dict[str, torch.Tensor]

# The folder whose preprocessor_config.json stands for the hub tower of each processor name.
_CLIP_CHECKPOINT = "tiny-llava-1.5"


def anyres_grid(inputs: Tensors, params: dict[str, Any], context: Any) -> Tensors:
    """image_sizes [N,2] (width, height) -> best_resolution [N,2], grid_shape [N,2] (columns, rows)."""
    tile, pinpoints = params["patch_size"], params["grid_pinpoints"]
    sizes = [tuple(size) for size in inputs["image_sizes"].tolist()]
    grids = torch.tensor([get_anyres_image_grid_shape(size, pinpoints, tile) for size in sizes])
    candidates = candidate_resolutions(pinpoints, tile)
    best = torch.tensor([select_best_resolution(size, candidates) for size in sizes])
    return {"best_resolution": best, "grid_shape": grids}


def process_image(inputs: Tensors, params: dict[str, Any], context: Any) -> dict[str, Any]:
    """uint8 images (or their formula) -> shapes, samples and means of every item's pixels."""
    result = process_images(
        golden_images(inputs, params), golden_processor(params["processor"], context), _config(params)
    )
    if torch.is_tensor(result) != params["stacked"]:
        raise AssertionError(f"expected one stacked tensor: {params['stacked']}, got {type(result).__name__}")
    (oy, ox), (sy, sx) = params["sample_offset_yx"], params["sample_stride_yx"]
    out: dict[str, Any] = {}
    for i, pixels in enumerate(result):
        out[f"shape{i}"] = torch.tensor(pixels.shape)
        out[f"samples{i}"] = pixels[..., oy::sy, ox::sx]
        out[f"row_mean{i}"] = pixels.mean(-1)[..., ::2]
        out[f"col_mean{i}"] = pixels.mean(-2)[..., 1::3]
    return out


def golden_images(inputs: Tensors, params: dict[str, Any]) -> list[Image.Image]:
    """The images of a process_image case: stored ones, or those a formula makes."""
    if params.get("image_formula"):
        arrays = []
        for item in params["image_formula"]:
            y, x, c = np.mgrid[: item["h"], : item["w"], :3]
            k = item["k"]
            arrays.append(((x * k[0] + y * k[1] + c * k[2] + (x * y) // k[3]) % 256).astype(np.uint8))
    else:
        count = sum(name.startswith("image") for name in inputs)
        arrays = [inputs[f"image{i}"].numpy() for i in range(count)]
    return [Image.fromarray(array) for array in arrays]


def golden_processor(name: str, context: Any) -> Any:
    """Processor of a golden name such as "clip_336" or "siglip_384"."""
    kind, side = name.split("_")
    if kind == "siglip":
        return SigLipImageProcessor(size=int(side))
    return load_clip_image_processor(Path(context.checkpoint(_CLIP_CHECKPOINT)) / "vision_tower")


def _config(params: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(
        image_aspect_ratio=params["image_aspect_ratio"], image_grid_pinpoints=params["image_grid_pinpoints"]
    )


ADAPTERS: dict[tuple[str, str], Callable[[Tensors, dict[str, Any], Any], dict[str, Any]]] = {
    ("base", "anyres_grid"): anyres_grid,
    ("base", "process_image"): process_image,
}

# -- text.json ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _tokenizer(folder: str) -> Any:
    return load_tokenizer(folder)


def _equal(name: str, got: Any, expected: Any) -> Check:
    return name, got == expected, "" if got == expected else f"expected {expected!r}, got {got!r}"


def check_tokenizer_image_token(section: dict[str, Any], context: Any) -> list[Check]:
    """Ids of every prompt with every checkpoint's tokenizer."""
    checks = []
    for checkpoint, cases in section["by_checkpoint_tokenizer"].items():
        tokenizer = _tokenizer(str(context.checkpoint(checkpoint)))
        for case in cases:
            ids = tokenizer_image_token(case["prompt"], tokenizer, section["image_token_index"])
            checks.append(_equal(f"{checkpoint}: {case['prompt'][-60:]!r}", ids, case["ids"]))
    return checks


class _ChatTemplate:
    """What a template needs of a tokenizer: render messages with a given chat template."""

    def __init__(self, template: str) -> None:
        self.template = template

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        import jinja2

        assert tokenize is False
        template = jinja2.Environment().from_string(self.template)
        bos = "<|begin_of_text|>"
        return template.render(messages=messages, add_generation_prompt=add_generation_prompt, bos_token=bos)


def check_conversation_prompts(section: list[dict[str, Any]], context: Any) -> list[Check]:
    """Prompt, roles and separators of every template after given turns, or the type of the error."""
    checks = []
    for i, case in enumerate(section):
        conversation = conv_templates[case["template"]].copy()
        if "chat_template" in case:
            conversation.tokenizer = _ChatTemplate(case["chat_template"])
        for question, answer in case["turns"]:
            conversation.append_message(conversation.roles[0], question)
            conversation.append_message(conversation.roles[1], answer)
        got = {"roles": list(conversation.roles), "sep": conversation.sep, "sep2": conversation.sep2}
        got["sep_style"] = conversation.sep_style.name
        try:
            got |= {"prompt": conversation.get_prompt(), "error": None}
        except Exception as error:
            got |= {"prompt": None, "error": type(error).__name__}
        checks.append(_equal(f"{case['template']} [{i}]", got, {key: case.get(key) for key in got}))
    return checks


def check_template_names(section: list[str], context: Any) -> list[Check]:
    """Every template has its name, and there is no other save those of trained architectures."""
    named = [(name, name in conv_templates, "no such template") for name in section]
    own = {entry.template for entry in ARCHITECTURES} - set(section)
    return [*named, _equal("no other template", sorted(set(conv_templates) - own), sorted(section))]


def check_default_template(section: str, context: Any) -> list[Check]:
    """ "vicuna_v0 (keys 'default' and 'v0')": the two keys are one template, the one with example messages."""
    default, v0 = conv_templates["default"], conv_templates["v0"]
    return [_equal("default is v0", default == v0 and default.version == "v0" and len(default.messages) == 2, True)]


def check_model_name_from_path(section: list[dict[str, str]], context: Any) -> list[Check]:
    """Model name of every path."""
    return [_equal(case["path"], get_model_name_from_path(case["path"]), case["name"]) for case in section]


def check_keywords_stopping(section: list[dict[str, Any]], context: Any) -> list[Check]:
    """Stop or go on for given new ids."""
    checks = []
    for i, case in enumerate(section):
        tokenizer = _tokenizer(str(context.checkpoint(case["checkpoint_tokenizer"])))
        prompt = torch.zeros((1, case["prompt_len"]), dtype=torch.long)
        stops = KeywordsStoppingCriteria(case["keywords"], tokenizer, prompt)
        output = torch.tensor([case["output_ids"]])
        checks.append(_equal(f"{case['keywords']} {case['output_ids']} [{i}]", stops(output, None), case["stop"]))
    return checks


def check_frame_sampling(section: dict[str, Any], context: Any) -> list[Check]:
    """Indices, length and time string of sampling at a fixed rate."""
    checks = []
    names = ("total_frames", "avg_fps", "video_fps", "frames_upbound", "force_sample")
    for case in section["cases"]:
        sample = sample_frames(**{name: case[name] for name in names})
        got = {"frame_idx": sample.indices, "video_time": sample.video_time, "frame_time": sample.frame_time}
        checks.append(_equal(str({name: case[name] for name in names}), got, {key: case[key] for key in got}))
    return checks


def check_uniform_sampling(section: list[dict[str, Any]], context: Any) -> list[Check]:
    """Indices of evenly spaced frames."""
    return [
        _equal(f"{c['num']} of {c['total_frames']}", uniform_frame_indices(c["total_frames"], c["num"]), c["frame_idx"])
        for c in section
    ]


TEXT_CHECKS: dict[str, Callable[[Any, Any], list[Check]]] = {
    "tokenizer_image_token": check_tokenizer_image_token,
    "conversation_prompts": check_conversation_prompts,
    "template_names": check_template_names,
    "default_template_is": check_default_template,
    "model_name_from_path": check_model_name_from_path,
    "keywords_stopping": check_keywords_stopping,
    "frame_sampling": check_frame_sampling,
    "uniform_sampling": check_uniform_sampling,
}
