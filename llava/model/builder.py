"""``load_pretrained_model``: an official LLaVA checkpoint, ready to use, with a compression method attached if asked.

The signature is LLaVA-NeXT's plus ``method`` and ``method_params``, and LLaVA's own arguments by keyword. What differs:
the model class follows the checkpoint's own config, and a ``model_name`` that says otherwise is an error; float32 and
"auto" are allowed dtypes; CPU works; nothing is swallowed (docs/llava_tree.md).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from accelerate_methods.engine.devices import computes_on, is_offloaded, named_device
from accelerate_methods.engine.long_prompts import trained_positions
from accelerate_methods.hosts.checkpoint_files import check_files, reading
from accelerate_methods.stages.errors import MethodError, UnknownNameError
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.model.architectures import architecture_of
from llava.model.checkpoint import CheckpointError, find_file, load_config, read_config
from llava.model.decoders import check_model_name, checkpoint_decoder, decoder_of, model_class_of
from llava.tokenization import load_tokenizer

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps that are no device


def load_pretrained_model(
    model_path: str,
    model_base: str | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = "auto",
    torch_dtype: Any = "float16",
    attn_implementation: str | None = "flash_attention_2",
    customized_config: Any = None,
    overwrite_config: dict[str, Any] | None = None,
    method: Any = None,
    method_params: dict[str, Any] | None = None,
    *,
    device: str | torch.device | None = None,
    use_flash_attn: bool | None = None,
    **kwargs: Any,
):
    """Load a checkpoint.

    Args:
        model_path: folder or hub name of a checkpoint in the official format.
        model_base: base LLM for checkpoints that hold a projector or a LoRA only.
        model_name: as the official code expects it; only checked against the checkpoint, None skips the check.
        device_map: as in transformers: a device ("cpu", "cuda:0"), "auto" (all visible GPUs; with ``max_memory=`` only
            so much of each), or a dict from module names to devices. See docs/distributed.md.
        torch_dtype: "float16", "bfloat16", "float32", "auto", or a torch dtype.
        attn_implementation: "flash_attention_2" falls back to "sdpa" where flash-attn is not installed or the model
            is not on CUDA; "sdpa", "eager" or None.
        customized_config: a config object used instead of the checkpoint's.
        overwrite_config: config keys set before the model is built.
        method: anything :func:`accelerate_methods.resolve` takes; attached permanently.
        method_params: hyper-parameters for ``method``.
        device: LLaVA's argument: any device but "cuda" holds the whole model, in place of ``device_map``.
        use_flash_attn: LLaVA's argument: whether ``attn_implementation`` is flash-attention or transformers' choice.
        kwargs: ``multimodal`` is accepted and ignored (the config says what the checkpoint is); the rest goes to
            ``from_pretrained``.

    Returns:
        tokenizer, model, image_processor, context_len.

    Raises:
        CheckpointError: not a LLaVA checkpoint, contradicting ``model_name``, files that cannot be reached or read,
            weights that are missing or that the model has no place for.
        MethodError: a device that this machine does not have; ``method_params`` without ``method``; ``tp_plan`` or
            ``tp_size`` (tensor parallelism is not offered), or "auto" finds too little memory and no ``offload_folder``
            says that running from disk is meant.
    """
    kwargs.pop("multimodal", None)
    _check_placement(kwargs)
    if device is not None and str(device) != "cuda":
        device_map = str(device)
    if isinstance(device_map, str) and device_map not in _SPREADS:
        named_device(device_map)
    if use_flash_attn is not None:
        attn_implementation = "flash_attention_2" if use_flash_attn else None
    if method is None and method_params:
        given = ", ".join(sorted(method_params))
        raise MethodError(f"method_params ({given}) given, but no method to apply them to; name one with method=.")
    source = model_base if model_base is not None else model_path
    for path in dict.fromkeys((model_path, source)):
        check_files(path)
    raw = read_config(model_path)
    # asked first: an architecture may have class names of its own, also in what save_pretrained wrote
    model_class = architecture_of(raw, model_path) or model_class_of(checkpoint_decoder(raw, model_path))
    if model_name:
        check_model_name(model_name, decoder_of(model_class), model_path)
    load = {
        "dtype": resolve_dtype(torch_dtype),
        "attn_implementation": _attention(attn_implementation, device_map),
        "device_map": None if _only_cpu(device_map, kwargs) else device_map,
        **_quantisation(load_8bit, load_4bit, model_class.unquantised),
        **kwargs,
    }
    config = customized_config
    if config is None or isinstance(config, (str, Path)):
        config = load_config(model_class.config_class, model_path if config is None else config)
    for key, value in (overwrite_config or {}).items():
        _set_config(config, key, value)
    with reading(source):
        tokenizer = load_tokenizer(source, config)
    if model_base is not None:
        from llava.model.adapters import load_on_base

        model = load_on_base(model_class, model_path, model_base, config, load)
    else:
        model = model_class.from_pretrained(model_path, config=config, **load)
    if isinstance(device_map, str) and "offload_folder" not in kwargs:
        _check_fits(model, model_path)
    image_processor = _finish_vision(model, tokenizer)
    model.prompt_tokenizer = tokenizer
    if method is not None:
        from accelerate_methods import accelerate

        accelerate(model, method, tokenizer=tokenizer, **(method_params or {}))
    return tokenizer, model.eval(), image_processor, _context_length(model.config)


def resolve_dtype(value: Any) -> Any:
    """torch dtype (or "auto") of what a caller gave."""
    if value is None or value == "auto" or isinstance(value, torch.dtype):
        return "auto" if value is None else value
    if value not in DTYPES:
        raise UnknownNameError("torch_dtype", value, [*DTYPES, "auto"])
    return DTYPES[value]


def _attention(wanted: str | None, device_map: Any) -> str:
    if wanted is None:
        return "sdpa"
    if wanted.startswith("flash_attention"):
        on_cpu = device_map is None or str(device_map) == "cpu" or not torch.cuda.is_available()
        if on_cpu or importlib.util.find_spec("flash_attn") is None:
            return "sdpa"
    return wanted


def _only_cpu(device_map: Any, kwargs: dict[str, Any]) -> bool:
    """Whether "auto" has nothing to choose from."""
    return device_map == "auto" and not torch.cuda.is_available() and kwargs.get("max_memory") is None


def _check_placement(kwargs: dict[str, Any]) -> None:
    for name in ("tp_plan", "tp_size", "device_mesh", "distributed_config"):
        if kwargs.get(name) is not None:
            raise MethodError(
                f"{name}: tensor parallelism is not offered: methods read attention over all heads, and each process "
                "would hold only some of them. For models larger than a GPU use device_map='auto', which spreads the "
                "layers over the visible GPUs (lmms-eval: gpus_per_model=N GPUs per process). See docs/distributed.md."
            )


def _check_fits(model: Any, path: str) -> None:
    away = [name for name, device in getattr(model, "hf_device_map", {}).items() if device == "disk"]
    if away:
        raise MethodError(
            f"{path!r} does not fit: {len(away)} of its parts (first: {away[0]}) would be read from disk whenever they "
            "are used. Give it more GPUs (gpus_per_model, max_memory), or an offload_folder if that is meant."
        )


def _quantisation(load_8bit: bool, load_4bit: bool, unquantised: Sequence[str] = ()) -> dict[str, Any]:
    if not (load_8bit or load_4bit):
        return {}
    if load_8bit and load_4bit:
        raise ValueError("choose load_8bit or load_4bit, not both.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("load_8bit / load_4bit need bitsandbytes: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    skip = ["lm_head", "vision_tower", "mm_projector", *unquantised]
    if load_8bit:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.float16,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=skip,
    )
    return {"quantization_config": config}


def _set_config(config: Any, key: str, value: Any) -> None:
    if key == "rope_scaling" and value:
        # transformers 5 keeps scaling and theta together
        kind = value.get("rope_type", value.get("type"))
        config.rope_parameters = {**(config.rope_parameters or {}), **value, "rope_type": kind}
        return
    setattr(config, key, value)


def _finish_vision(model: Any, tokenizer: Any) -> Any:
    """Image tokens, vocabulary size, tower weights and device; returns the image processor."""
    config = model.config
    if getattr(config, "mm_use_im_patch_token", True):
        tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
    if getattr(config, "mm_use_im_start_end", False):
        tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows or (len(tokenizer) < rows and not model.spare_vocabulary):
        _resize_vocabulary(model, len(tokenizer))
    decoder = model.get_model()
    away = [name for name, weight in decoder.named_parameters(recurse=False) if weight.is_meta]
    if away and not is_offloaded(decoder):
        raise CheckpointError(
            f"model.{away[0]} is on disk and no module of its own, so that nothing would load it; "
            f"give it a device in the device_map, for example {{'model.{away[0]}': 0, ...}}."
        )
    tower = model.get_vision_tower()
    if tower is None:
        return None
    if not tower.is_loaded:
        tower.load_model()
        tower.to(device=computes_on(model.get_model().mm_projector), dtype=model.dtype)
    return tower.image_processor


def _resize_vocabulary(model: Any, size: int) -> None:
    """Fit embedding and head to ``size`` tokens. Where they are offloaded, they go to CPU memory for good."""
    offloaded = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if is_offloaded(m)]
    if not offloaded:
        model.resize_token_embeddings(size)
        return
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module
    from accelerate.utils import align_module_device

    devices = [computes_on(module) for module in offloaded]
    for module in offloaded:
        with align_module_device(module):
            weight = module.weight.detach().to("cpu", copy=True)
        remove_hook_from_module(module)
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
    model.resize_token_embeddings(size)
    for module, device in zip((model.get_input_embeddings(), model.get_output_embeddings()), devices, strict=False):
        cpu_offload(module, execution_device=device)


def _context_length(config: Any) -> int:
    """Rows of a prompt; scaled rotary embeddings stretch what the decoder was trained on."""
    stated = getattr(config, "max_sequence_length", None) or trained_positions(config)
    return stated or getattr(config, "tokenizer_model_max_length", None) or 2048


__all__ = ["CheckpointError", "find_file", "load_pretrained_model"]
