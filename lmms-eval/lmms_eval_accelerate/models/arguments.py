"""Reading ``--model_args``: the model's own arguments, the method and its hyper-parameters, and a config's defaults."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from accelerate_methods.bench.matching import Target, parameter_of
from accelerate_methods.engine.long_prompts import ON_LONG_PROMPT
from accelerate_methods.hosts.layouts import NEWLINE_POSITIONS, POOL_MODES
from accelerate_methods.registry import compatibility
from accelerate_methods.registry.architectures import ARCHITECTURES, Architecture, architecture_named
from accelerate_methods.registry.configs import read_config
from accelerate_methods.registry.pipeline import Pipeline, resolve
from accelerate_methods.stages.errors import MethodError, UnknownNameError
from lmms_eval_accelerate.manifest import FAMILIES, any_method, model_ids
from lmms_eval_accelerate.model_args import meant

#: Arguments of every family with their defaults. Families add theirs and change defaults.
COMMON: dict[str, Any] = {
    "pretrained": None,  # checkpoint folder or hub name; needed
    "model_base": None,
    "model_name": None,  # only checked against the checkpoint; None: no check
    "conv_template": None,
    "device": "auto",  # cuda:<local rank> if there is CUDA, else cpu
    "device_map": None,  # default: all on `device`
    "gpus_per_model": None,  # GPUs over which one copy is spread; None: of the environment GPUS_PER_MODEL, else 1
    "dtype": "auto",  # float16 on CUDA (as the stock models), float32 on CPU
    "torch_dtype": None,  # the stock models' name for dtype
    "attn_implementation": "sdpa",
    "use_cache": True,
    "batch_size": 1,
    "max_batch_size": None,  # lmms-eval hands it over; batches are never searched for
    "method": None,
    "match": None,  # "tokens:0.25", "layer_tokens:0.25", "flops:0.25": the method's budget is solved for it
    "config": None,  # YAML of configs/: method, hyper-parameters, defaults of these arguments
    "on_error": "stop",  # "skip": an unreadable image or video gives an empty answer, counted and marked
    "on_long_prompt": "warn",  # "error": a prompt longer than the model's context ends the run, with its document
    "prompt_model": None,  # stock model whose task prompts are used; "none": as lmms-eval built them
    "until": "apply",  # "ignore": do not cut answers at the task's stop strings (the stock models do not)
    "save_provenance": 0,  # documents per task whose kept tokens are saved for the report
}
#: Further arguments of LLaVA-1.5 and LLaVA-NeXT.
LLAVA: dict[str, Any] = {
    "fixed_resolution": None,  # "672x672": this canvas for every any-resolution image, whatever the checkpoint lists
}
#: Further arguments of LLaVA-OneVision.
ONEVISION: dict[str, Any] = {
    "max_frames_num": 32,
    "mm_spatial_pool_mode": "bilinear",
    "mm_spatial_pool_stride": 2,
    "mm_newline_position": None,  # the checkpoint's
    "video_decode_backend": "auto",
}
#: Further arguments of LLaVA-Video.
VIDEO: dict[str, Any] = {
    "max_frames_num": 20,
    "video_fps": 1,
    "force_sample": False,
    "add_time_instruction": False,
    "mm_spatial_pool_mode": "average",
    "mm_spatial_pool_stride": 2,
    "mm_newline_position": "grid",
    "overwrite": True,
    "video_decode_backend": "auto",
}
#: Further arguments of the family ``hf``, named as those of the stock chat classes.
HF: dict[str, Any] = {
    "max_num_frames": 32,
    "fps": None,  # frames per second in place of max_num_frames
    "min_pixels": None,  # of an image or a frame; None: the stock class's
    "max_pixels": None,
    "total_pixels": None,  # of a whole video; None: no limit but that of qwen-vl-utils
    "system_prompt": "auto",  # "auto": the stock class's; "none"
    "chat_template": None,  # file with a Jinja template in place of the processor's
    "video_decode_backend": "auto",
    "until": "ignore",  # an answer of a chat model may begin with more than one paragraph
}
def _of_architecture(entry: Architecture) -> dict[str, Any]:
    """Further arguments of a trained architecture: those of its entry, and how videos are read."""
    frames = {"max_frames_num": entry.frames, "video_decode_backend": "auto"} if "video" in entry.modalities else {}
    return {**frames, **{argument.name: argument.default for argument in entry.arguments}}


#: key of a family -> its further arguments; and the common ones that mean nothing to it
FURTHER: dict[str, dict[str, Any]] = {
    **{"llava": LLAVA, "llava_onevision": ONEVISION, "llava_video": VIDEO, "hf": HF},
    **{entry.key: _of_architecture(entry) for entry in ARCHITECTURES},
}
WITHOUT: dict[str, frozenset[str]] = {"hf": frozenset({"model_base", "model_name", "conv_template"})}
#: name of an argument in other families -> its name in this one
_OTHER_NAMES = {"hf": {"max_frames_num": "max_num_frames"}}
_ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
_SWITCHES = ("use_cache", "force_sample", "add_time_instruction", "overwrite")
_COUNTS = ("max_frames_num", "max_num_frames", "min_pixels", "max_pixels", "total_pixels", "mm_spatial_pool_stride")
_SIZE = re.compile(r"[1-9]\d*x[1-9]\d*")
_RATES = ("fps", "video_fps")
_CHOICES = {
    "dtype": ("auto", "float16", "bfloat16", "float32"),
    "mm_spatial_pool_mode": POOL_MODES,
    "mm_newline_position": (None, *NEWLINE_POSITIONS),
    "on_error": ("stop", "skip"),
    "on_long_prompt": ON_LONG_PROMPT,
    "until": ("apply", "ignore"),
    "video_decode_backend": ("auto", "decord", "pyav"),
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Checked model arguments: ``values`` (every argument), and the methods that will be attached."""

    model_id: str
    family: str
    values: dict[str, Any]
    pipeline: Pipeline

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(name) from None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: everything that can change an answer."""
        return {"family": self.family, "methods": self.pipeline.to_dict(), **self.values}


def defaults_of(family: str) -> dict[str, Any]:
    """All arguments of the family with this key, and their defaults."""
    common = {key: value for key, value in COMMON.items() if key not in WITHOUT.get(family, ())}
    return {**common, "prompt_model": FAMILIES[family], **FURTHER[family]}


def names_of(family: str) -> set[str]:
    """All names that an argument of the family with this key can be given under."""
    return {*defaults_of(family), *_OTHER_NAMES.get(family, ())}


def parse(model_id: str, given: Mapping[str, Any]) -> Arguments:
    """Check arguments for the model of an id without loading anything.

    Raises:
        UnknownNameError, MethodError: with the allowed names or values.
    """
    known = model_ids()
    if model_id not in known:
        raise UnknownNameError("model", model_id, known)
    family, method = known[model_id]
    return parse_arguments(model_id, family, method, defaults_of(family), given)


def parse_arguments(
    model_id: str,
    family: str,
    default_method: str | None,
    defaults: Mapping[str, Any],
    given: Mapping[str, Any],
) -> Arguments:
    """Check what came in as ``--model_args``.

    Args:
        default_method: method of a model id such as ``llava_onevision_fastvid``; None where ``method=`` or ``config=``
            choose it (dense if neither is given).
        defaults: the family's arguments.
        given: keyword arguments; names that are no argument must be hyper-parameters of the method
            (``<method>.<name>`` if several are combined).

    Raises:
        UnknownNameError, MethodError: with the allowed names or values.
    """
    if default_method is not None and isinstance(given.get("method"), str) and meant(given["method"]) is None:
        raise MethodError(f"model {model_id!r} runs {default_method}; without a method it is {any_method(family)}.")
    for key, value in given.items():
        if isinstance(value, str) and not value.strip():
            raise MethodError(f"model argument {key}= is empty; leave it out for its default.")
    given = _one_name({key: meant(value) for key, value in given.items()}, family)
    config = given.get("config")
    section = _model_section(config, family, defaults) if config is not None else {}
    spec = _method_spec(model_id, default_method, given.get("method"), config)
    params = {key: value for key, value in given.items() if key not in defaults}
    pipeline = _resolve(model_id, spec, params, defaults)
    if default_method is not None and default_method not in [m.name for m in pipeline.methods]:
        raise MethodError(f"model {model_id!r} runs {default_method}, but config {config!r} is for {pipeline.name}.")
    compatibility.check(pipeline, family)
    values = {**defaults, **section, **{key: value for key, value in given.items() if key in defaults}}
    values["method"], values["config"] = pipeline.name, config
    _check_values(values, defaults)
    _check_run_parameters(values, family)
    _finish(values)
    if values["match"] is not None:
        for one in pipeline.methods:
            parameter_of(type(one), Target.of(values["match"]).kind)
    return Arguments(model_id, family, values, pipeline)


def _one_name(given: dict[str, Any], family: str) -> dict[str, Any]:
    """An argument under the name that it has in this family."""
    for other, name in _OTHER_NAMES.get(family, {}).items():
        value = given.pop(other, None)
        if value is not None and given.setdefault(name, value) != value:
            raise MethodError(f"{other} and {name} are one argument; give one.")
    return given


def _model_section(config: Any, family: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    section = dict(read_config(config).get("model") or {})
    wanted = section.pop("family", family)
    if wanted != family:
        raise MethodError(f"config {config!r} is for the family {wanted!r}, this model is {family!r}.")
    for key in section:
        if key not in defaults:
            raise UnknownNameError(f"key in the model section of {config!r}:", key, defaults)
    return section


def _method_spec(model_id: str, default: str | None, method: Any, config: Any) -> Any:
    if method is not None and config is not None:
        raise MethodError("give method= or config=, not both; hyper-parameters given as arguments override a config's.")
    if default is not None and method not in (None, default):
        family = model_id[: -len(default) - 1]
        raise MethodError(f"model {model_id!r} runs {default}; for method={method} use {family}_accelerated.")
    return config if config is not None else (method if method is not None else default)


def _resolve(model_id: str, spec: Any, params: dict[str, Any], defaults: Mapping[str, Any]) -> Pipeline:
    """The pipeline; an unknown name is looked up among arguments and hyper-parameters, a typo may be in either."""
    if params and not _names_a_method(spec):
        raise UnknownNameError(f"argument of model {model_id!r} without a method:", next(iter(params)), defaults)
    try:
        return resolve(spec, **params)
    except UnknownNameError as error:
        if error.name not in params:
            raise
        allowed = {*defaults, *error.allowed}
        raise UnknownNameError(f"argument of model {model_id!r}:", error.name, allowed) from None


def _names_a_method(spec: Any) -> bool:
    """Whether ``spec`` names any method (a method may not be built yet: required hyper-parameters come later)."""
    try:
        return bool(resolve(spec).methods)
    except UnknownNameError:
        raise
    except MethodError:
        return True


def _check_values(values: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Make switches, counts and rates what they stand for, or refuse them: text is always true, and 0 often ignored."""
    for key in _SWITCHES:
        if key in values and values[key] not in (True, False):  # 0 and 1 are equal to them
            raise MethodError(f"model argument {key} must be true or false, not {values[key]!r}.")
        if key in values:
            values[key] = bool(values[key])
    for key in _COUNTS:
        if key in values and (values[key] is not None or defaults[key] is not None):
            values[key] = _number(key, values[key], int, "a whole number from 1")
    for key in _RATES:
        if key in values and (values[key] is not None or defaults[key] is not None):
            values[key] = _number(key, values[key], float, "a number above 0")


def _check_run_parameters(values: dict[str, Any], family: str) -> None:
    """Those of a trained architecture, by the rules of its entry; text of numbers and switches is read."""
    entry = architecture_named(family)
    for argument in () if entry is None else entry.arguments:
        value = values[argument.name]
        if value is not None or argument.default is not None:
            values[argument.name] = argument.checked(entry.name, value)


def _number(key: str, value: Any, kind: type, wanted: str) -> Any:
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        number = kind(value)
        same = not isinstance(value, bool) and (isinstance(value, str) or number == value)
        if same and 0 < number < math.inf:
            return value if isinstance(value, (int, float)) and kind is float else number
    raise MethodError(f"model argument {key} must be {wanted}, not {value!r}.")


def _finish(values: dict[str, Any]) -> None:
    if not values["pretrained"]:
        raise MethodError("model argument pretrained= is needed: a checkpoint folder or hub name.")
    if values.get("fixed_resolution") is not None and not _SIZE.fullmatch(str(values["fixed_resolution"])):
        raise MethodError(f"fixed_resolution must be WIDTHxHEIGHT, as 672x672, not {values['fixed_resolution']!r}.")
    other = values.pop("torch_dtype")
    if other is not None:
        if values["dtype"] not in ("auto", other):
            raise MethodError(f"dtype={values['dtype']} and torch_dtype={other} contradict each other; give one.")
        values["dtype"] = other
    for key, allowed in _CHOICES.items():
        if key in values and values[key] not in allowed:
            raise UnknownNameError(f"value of model argument {key}:", values[key], map(str, allowed))
    if values.get("conv_template") is not None:
        from llava.conversation import conv_templates  # needed by few, and slow

        if values["conv_template"] not in conv_templates:
            raise UnknownNameError("value of model argument conv_template:", values["conv_template"], conv_templates)
    if values["match"] is not None:
        Target.of(values["match"])  # says what is wrong with it
    attention = values["attn_implementation"]
    if attention not in (None, *_ATTENTION) and "/" not in str(attention):  # a name with a slash is a kernel of the hub
        raise UnknownNameError("value of model argument attn_implementation:", attention, _ATTENTION)
    values.pop("max_batch_size")
    try:
        values["batch_size"] = int(values["batch_size"])
    except ValueError:
        values["batch_size"] = 0
    if values["batch_size"] < 1:
        raise MethodError("batch_size must be a number from 1; automatic batch sizes are not supported.")
    spread = values["gpus_per_model"]
    spread = (os.environ.get("GPUS_PER_MODEL") or "1") if spread is None else str(spread)
    if not spread.isdecimal() or int(spread) < 1:
        raise MethodError(f"gpus_per_model must be a number of GPUs from 1, not {spread!r}.")
    values["gpus_per_model"] = int(spread)
    if not str(values["save_provenance"]).isdecimal():
        raise MethodError(f"save_provenance must be a number of documents from 0, not {values['save_provenance']!r}.")
    values["save_provenance"] = int(values["save_provenance"])
