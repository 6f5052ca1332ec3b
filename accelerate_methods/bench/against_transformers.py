"""The dense model beside transformers' own class of the same shape, on the same weights and input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from accelerate_methods.bench.inputs import Inputs
from accelerate_methods.bench.measure import is_out_of_memory, now
from accelerate_methods.stages.errors import MethodError


def native_of(model: Any, inputs: Inputs) -> Any:
    """LlavaOnevisionForConditionalGeneration (videos) or LlavaForConditionalGeneration on ``model``'s own tensors."""
    import transformers

    config, tower = model.config, model.get_vision_tower()
    onevision = tower.config.model_type == "siglip_vision_model"
    merge = getattr(config, "mm_patch_merge_type", "flat")
    newline = getattr(config, "mm_newline_position", "one_token")
    pool = getattr(config, "mm_spatial_pool_mode", "average")
    if onevision and (inputs.modality != "video" or newline != "one_token" or pool != "bilinear"):
        raise MethodError("transformers' LlavaOnevision is compared on videos of llava-onevision shapes only")
    if not onevision and merge != "flat":
        raise MethodError("transformers' Llava is compared on llava-1.5 shapes only")
    kind = "qwen2" if config.model_type == "llava_qwen" else "llama"
    text_class = transformers.Qwen2Config if kind == "qwen2" else transformers.LlamaConfig
    known = text_class().to_dict().keys() - {"model_type", "architectures", "transformers_version", "dtype"}
    text = text_class(**{k: v for k, v in config.to_dict().items() if k in known})
    name = "LlavaOnevision" if onevision else "Llava"
    extra = {"vision_feature_layer": -1} if onevision else {"vision_feature_layer": tower.select_layer}
    extra |= {"vision_feature_select_strategy": "full" if onevision else "default"}
    extra |= {"image_token_index": 1, **({"video_token_index": 2} if onevision else {})}
    native_config = getattr(transformers, f"{name}Config")(
        vision_config=tower.config, text_config=text, tie_word_embeddings=config.tie_word_embeddings, **extra
    )
    native_config._attn_implementation = config._attn_implementation
    with torch.device("meta"):
        native = getattr(transformers, f"{name}ForConditionalGeneration")(native_config)
    _share(model, native)
    return native.eval()


def _native_name(name: str) -> str:
    """Name of one of our tensors in transformers' class."""
    for ours, theirs in (
        ("model.vision_tower.vision_tower.", "model.vision_tower."),
        ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
        ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
        ("model.image_newline", "model.image_newline"),
        ("model.", "model.language_model."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _share(model: Any, native: Any) -> None:
    """Give ``native``, which is on the meta device, the tensors of ``model``; nothing is copied."""
    state = {_native_name(name): value for name, value in model.state_dict().items()}
    wanted = set(native.state_dict())
    missing = wanted - set(state)
    if missing:
        raise MethodError(f"transformers' class has weights that ours lacks: {sorted(missing)[0]} ...")
    native.load_state_dict({name: state[name] for name in wanted}, assign=True)
    buffers = {_native_name(name): value for name, value in model.named_buffers()}
    for name, value in list(native.named_buffers()):
        if value.is_meta:
            owner, _, leaf = name.rpartition(".")
            native.get_submodule(owner)._buffers[leaf] = buffers[name]


def compare(
    model: Any, inputs: Inputs, repeats: int, warmup: int, advance: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Prefill of the LLM and the whole forward to the logits of the last position, ours and native in turn.

    ``inputs.patches`` play no part: both run their towers on the pixels.
    """
    try:
        return _compare(model, native_of(model, inputs), inputs, repeats, warmup, advance)
    except MethodError as error:
        return {"status": f"error: {error}"}
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return {"status": "out of memory"}


@torch.inference_mode()
def _compare(
    model: Any, native: Any, inputs: Inputs, repeats: int, warmup: int, advance: Callable[[], None]
) -> dict[str, Any]:
    ids, visual = inputs.ids, 2 if inputs.modality == "video" else 1
    spliced = model.prepare_multimodal(ids, None, None, **inputs.arguments())
    count = spliced.lengths[0] - (ids.shape[1] - 1)
    at = int((ids[0] < 0).nonzero()[0, 0])  # the same in every sample
    native_ids = torch.cat([ids[:, :at], ids.new_full((len(ids), count), visual), ids[:, at + 1 :]], dim=1)
    pixels = torch.stack(inputs.pixels) if inputs.modality == "video" else torch.cat(inputs.pixels)
    images = {"pixel_values_videos" if inputs.modality == "video" else "pixel_values": pixels}
    if inputs.modality == "image":
        arguments = {**inputs.arguments(), "images": pixels}  # a 4-D tensor: plain images, as in LLaVA-1.5
    else:
        arguments = inputs.arguments()
    embeds, common = spliced.inputs_embeds, {"use_cache": True, "logits_to_keep": 1}
    calls = {
        "ours_prefill_ms": lambda: model(inputs_embeds=embeds, **common).logits,
        "native_prefill_ms": lambda: native(inputs_embeds=embeds, **common).logits,
        "ours_forward_ms": lambda: model(input_ids=ids, **arguments, **common).logits,
        "native_forward_ms": lambda: native(input_ids=native_ids, **images, **common).logits,
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    logits = {}
    for index in range(warmup + repeats):
        for name, call in calls.items():
            start = now(ids.device)
            logits[name] = call()
            end = now(ids.device)
            if index >= warmup:
                samples[name].append(1000 * (end - start))
        advance()
    difference = (logits["ours_forward_ms"].float() - logits["native_forward_ms"].float()).abs().max()
    return {
        "status": "ok",
        "class": type(native).__name__,
        "prompt_tokens": spliced.lengths[0],
        "samples": samples,
        "max_logit_difference": float(difference),
    }
