"""Assisted decoding: tokens that a draft model or a look-up proposes are checked by the model in one call.

transformers puts the first of them behind the prompt, into the call that also prefills. A prefill method would score
with a draft in the place of the last token of the prompt, so that call is made in two: the prompt, then the drafts.
"""

from __future__ import annotations

from typing import Any

from accelerate_methods.engine.eviction import expect_answer, expect_drafts_on
from accelerate_methods.engine.loop import needs_loop
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.stages.errors import MethodError

_PROMPT = "accelerate_prompt_rows"  # attribute of an empty cache: tokens of the prompt, without drafts
_PER_TOKEN = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids", "cache_position")
_LATER = ("past_key_values", "use_cache", "return_dict", "output_attentions", "output_hidden_states")


def refuse_drafts(pipeline: Pipeline, generation_config: Any) -> None:
    """MethodError where assisted decoding cannot give the answer of greedy decoding."""
    if not needs_loop(pipeline):
        return
    if pipeline.decode is not None and not pipeline.decode.checks_drafts:
        raise MethodError(
            f"{pipeline.name} chooses anew in every decode step what the step sees, or what is left of the cache, so "
            "several drafts cannot be checked at once: assisted decoding is not available with it (leave out "
            "assistant_model, prompt_lookup_num_tokens and the like)."
        )
    if getattr(generation_config, "assistant_early_exit", None) is not None:
        raise MethodError(
            f"assistant_early_exit is not available while {pipeline.name} is attached: the model would draft through "
            "its own layers on a prompt of its own. Use assistant_model or prompt_lookup_num_tokens."
        )


def expect_drafts(cache: Any, prompt: int) -> None:
    """``cache`` is about to be used by assisted decoding, for a prompt of so many tokens."""
    expect_drafts_on(cache)
    if cache is not None and not cache.get_seq_length():
        setattr(cache, _PROMPT, prompt)


def expect_new_tokens(generation_config: Any, model_kwargs: dict[str, Any], longest: int) -> None:
    """``generate`` begins, perhaps on the cache of an earlier turn; ``longest`` sequence that may be cached."""
    expect_answer(model_kwargs.get("past_key_values"), generation_config.max_new_tokens, longest + 1)


def drafts_behind(arguments: dict[str, Any]) -> int:
    """Drafts at the end of the ids of a call that is the first on its cache."""
    cache, ids = arguments.get("past_key_values"), arguments.get("input_ids")
    prompt = getattr(cache, _PROMPT, None)
    if prompt is None:
        return 0
    delattr(cache, _PROMPT)
    return 0 if ids is None else max(0, ids.shape[1] - prompt)


def in_two(arguments: dict[str, Any], drafts: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of ``forward`` for a prompt with so many drafts behind it -> for the prompt, for the drafts."""
    given = {name: arguments[name] for name in _PER_TOKEN if arguments.get(name) is not None}
    prompt = arguments | {name: value[..., :-drafts] for name, value in given.items()}
    later = {name: value if name == "attention_mask" else value[..., -drafts:] for name, value in given.items()}
    later |= {name: arguments[name] for name in _LATER if name in arguments}
    if "logits_to_keep" in arguments:
        prompt["logits_to_keep"], later["logits_to_keep"] = 1, drafts
    return prompt, later
