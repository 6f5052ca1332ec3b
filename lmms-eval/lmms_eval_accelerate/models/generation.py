"""Generation arguments of tasks and of ``--gen_kwargs``: which ones a family reads, and what they may be.

What would be ignored, or would change what ``generate`` returns, is one clear error, whatever the stock model does with
it: it would read none of them (``llava``) or hand all of them on (``llava_onevision``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from accelerate_methods.stages.errors import MethodError, UnknownNameError
from lmms_eval_accelerate.manifest import TRAINED
from lmms_eval_accelerate.model_args import split_arguments
from lmms_eval_accelerate.models.arguments import defaults_of

_COMMON = frozenset({"until", "max_new_tokens", "do_sample", "temperature", "top_p", "num_beams"})
_HANDED_ON = frozenset(
    {
        *("top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "min_new_tokens", "repetition_penalty"),
        *("no_repeat_ngram_size", "length_penalty", "early_stopping"),
    }
)
#: key of a family -> the generation arguments that it reads
READS: dict[str, frozenset[str]] = {
    "llava": _COMMON | {"image_aspect_ratio"},
    "llava_video": _COMMON | {"image_aspect_ratio"},
    "llava_onevision": _COMMON | {"image_aspect_ratio"} | _HANDED_ON,
    "hf": _COMMON | {"top_k"},
    **dict.fromkeys(sorted(TRAINED), _COMMON),
}
#: families that sample if ``do_sample`` says so; the others sample as soon as the temperature is above 0
_BY_DO_SAMPLE = frozenset({"llava_onevision"})
#: arguments that mean nothing in greedy decoding
OF_SAMPLING = ("top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")

_ONE_ANSWER = "a document has one answer; --repeats N asks a document several times"
_ONLY_TEXT = "answers are text, and what else generate could return is read nowhere"
_DRAFTS = "answers are generated without drafts"
_CACHE = "methods that drop tokens choose the KV cache; the model argument use_cache=false does without one"
#: arguments of generate that no family can follow -> (values that change nothing, why)
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "guidance_scale": ((1,), "a document has no negative prompt to be guided away from"),
    "num_return_sequences": ((1,), _ONE_ANSWER),
    **dict.fromkeys(("return_dict_in_generate", "output_scores", "output_logits"), ((False,), _ONLY_TEXT)),
    **dict.fromkeys(("output_attentions", "output_hidden_states"), ((False,), _ONLY_TEXT)),
    **dict.fromkeys(("assistant_model", "assistant_tokenizer", "prompt_lookup_num_tokens"), ((), _DRAFTS)),
    **dict.fromkeys(("max_matching_ngram_size", "num_assistant_tokens", "assistant_early_exit"), ((), _DRAFTS)),
    **dict.fromkeys(("cache_implementation", "cache_config"), ((), _CACHE)),
    "use_cache": ((True,), _CACHE),
    "max_length": ((), "prompts differ in length; max_new_tokens counts the answer alone"),
    "min_length": ((), "prompts differ in length; min_new_tokens counts the answer alone"),
}


def check(values: Mapping[str, Any], where: str) -> None:
    """Refuse values that no family can follow, whoever gave them.

    Args:
        where: whose they are, for errors.

    Raises:
        MethodError: with what is allowed.
    """
    for key, value in values.items():
        if key in _REFUSED and value is not None:
            neutral, why = _REFUSED[key]
            if value not in neutral:
                raise MethodError(f"{where}: {key}={value!r} is not possible: {why}.")
        if key in _RULES and value is not None and not _RULES[key][0](value):
            raise MethodError(f"{where}: {key} must be {_RULES[key][1]}, not {value!r}.")


def check_requests(requests: Iterable[Any]) -> None:
    """:func:`check` for the generation arguments of a task's requests.

    Raises:
        MethodError: see there.
    """
    seen: set[str] = set()
    for request in requests:
        for values in (argument for argument in request.args if isinstance(argument, dict)):
            if repr(values) not in seen:
                seen.add(repr(values))
                check(values, f"generation arguments of task {request.task_name}")


def check_given(text: str, family: str, model_args: Mapping[str, Any]) -> None:
    """Check ``--gen_kwargs`` for a model of ``family``: also what would be read nowhere.

    Args:
        model_args: the model's arguments as far as they are given.

    Raises:
        UnknownNameError: an argument that the family does not read.
        MethodError: a value that is not possible, or that would change nothing.
    """
    where = "--gen_kwargs"
    values = _pairs(text)
    check({key: value for key, value in values.items() if key in _REFUSED}, where)
    for key in values:
        if key not in READS[family] and key not in _REFUSED:
            raise UnknownNameError(f"{where}: argument that the family {family} reads:", key, READS[family])
    until = values.get("until")
    if "until" in values and (until is None or str(until).startswith("[")):
        raise MethodError(f"{where}: until is one text here, not {until!r}; several can only stand in a task's file.")
    if "until" in values and model_args.get("until", defaults_of(family)["until"]) == "ignore":
        raise MethodError(f"{where}: until={until!r} is ignored as long as the model argument until is 'ignore'.")
    check(values, where)
    _check_sampling(values, family, where)


def _check_sampling(values: Mapping[str, Any], family: str, where: str) -> None:
    """Refuse values of sampling that contradict each other, or change nothing in greedy decoding."""
    sample, temperature = values.get("do_sample"), values.get("temperature")
    if sample is False and temperature:
        raise MethodError(f"{where}: temperature={temperature} means nothing with do_sample=false; give one of them.")
    if sample and (temperature == 0 or (temperature is None and family not in _BY_DO_SAMPLE)):
        raise MethodError(f"{where}: do_sample=true needs a temperature above 0.")
    if temperature and sample is None and family in _BY_DO_SAMPLE:
        raise MethodError(f"{where}: temperature={temperature} needs do_sample=true; {family} is greedy without it.")
    if temperature is None and not sample:
        for key in OF_SAMPLING:
            if values.get(key):
                raise MethodError(
                    f"{where}: {key}={values[key]} means nothing without sampling; give a temperature, too."
                )


def _pairs(text: str) -> dict[str, Any]:
    """``k=v,k=v`` as lmms-eval 0.7.3 reads it."""
    found: dict[str, Any] = {}
    for piece in split_arguments(text.strip()) if text.strip() else ():
        key, equals, value = piece.partition("=")
        if not equals:
            raise MethodError(f"--gen_kwargs: {piece!r} is not of the form name=value.")
        found[key.strip()] = _read(value)
    return found


def _read(value: str) -> Any:
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    if value.isnumeric():
        return int(value)
    try:
        return float(value)
    except ValueError:
        return None if value.lower() in ("", "none") else value


def _number(low: float, high: float = math.inf) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) and low <= v <= high


def _whole(low: int) -> Callable[[Any], bool]:
    return lambda v: _number(low)(v) and isinstance(v, int)


def _stops(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value))


#: argument -> (whether a value is possible, what is)
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (_whole(1), "a whole number from 1"),
    "min_new_tokens": (_whole(0), "a whole number from 0"),
    "num_beams": (_whole(1), "a whole number from 1"),
    "temperature": (_number(0), "a number from 0"),
    "top_p": (_number(0, 1), "a number from 0 to 1"),
    "top_k": (_whole(0), "a whole number from 0"),
    "do_sample": (lambda v: v in (True, False), "true or false"),
    "until": (_stops, "text, or a list of texts"),
}
