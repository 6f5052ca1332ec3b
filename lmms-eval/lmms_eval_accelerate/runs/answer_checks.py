"""Warnings about a run whose answers look wrong in a way that an accuracy hides.

A score is a number whatever the answers were. These checks read the answers and name the known traps: NaN that decodes
to "!!!!", documents that were skipped, prompts that lost their question, empty answers, one answer to everything,
answers cut off. None of them is a failure: a method that keeps two tokens may well answer "A" to everything, and that
is a result.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval_accelerate.runs.long_prompts import LongPrompts

_SHARE = 0.01  # of documents, from which on empty and repetitive answers are told
_REPEATED = 4  # times that a unit must stand in an answer ...
_UNIT = 24  # ... of at most so many characters
_EQUAL, _ENOUGH = 0.95, 50  # share of equal answers, and of how many
_ONE_SIDED = 0.8  # share of the most frequent reference above which equal answers are no wonder
_CUT, _SHORTEST = 0.5, 3  # share of answers cut off; a task with less room than this cuts on purpose
_OPTION = re.compile(r"\(?([A-J])(?:[).:,]|$)")
_YES_NO = {"yes", "no"}


def check(task: str, samples: Sequence[Mapping[str, Any]], config: Mapping[str, Any] | None = None) -> list[str]:
    """Warnings about the answers to one task; empty if nothing is suspicious.

    Args:
        task: its name, which every warning starts with.
        samples: lines of lmms-eval's samples file, or what it holds of them in memory (before or after it has written
            the file). Read are ``doc_id``, ``filtered_resps``, ``target`` and ``token_counts``.
        config: the task's description (``results["configs"][task]``); without it nothing is said of answers that are
            cut off.
    """
    lines = list({line.get("doc_id", number): line for number, line in enumerate(samples)}.values())
    costs = [[cost for cost in line.get("token_counts") or [] if cost] for line in lines]
    skipped = [own for own in costs if any(cost.get("skipped") for cost in own)]
    answered = [
        (line, own) for line, own in zip(lines, costs, strict=True) if not any(cost.get("skipped") for cost in own)
    ]
    found = [_skipped(skipped, len(lines))]
    likelihoods = any(_losses(line) for line, _ in answered)
    found.append(_long(answered))
    # what the model never read is no fault of templates, budgets and precision
    answered = [(line, own) for line, own in answered if not _is_long(own)]
    if likelihoods:
        found.append(_bad_losses([_losses(line) for line, _ in answered]))
    else:
        answers = [_text(line.get("filtered_resps", "")) for line, _ in answered]
        targets = [_text(line.get("target", "")) for line, _ in answered]
        limit = _limit(config, [line for line, _ in answered])
        found += [_empty(answers), _repeated(answers), _equal(answers, targets)]
        found.append(_cut([own[0].get("generated_tokens", 0) for _, own in answered if own], limit))
    return [f"{task}: {warning}" for warning in found if warning]


def _skipped(skipped: list[list[dict]], total: int) -> str | None:
    if not skipped:
        return None
    reason = next((cost["error"] for own in skipped for cost in own if cost.get("error")), "no reason logged")
    return (
        f"{_of(len(skipped), total)} documents were skipped because their image or video could not be read, and count "
        f"as wrong (first: {reason}). Likely: data missing or in the wrong folder, or a codec that the reader lacks; "
        "the score is not comparable with one over all documents."
    )


def _is_long(costs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the model could not read a prompt of the document to its end."""
    return any(cost.get("prompt_tokens_cut") or cost.get("prompt_tokens_untrained") for cost in costs)


def _long(answered: Sequence[tuple[Mapping[str, Any], list[dict]]]) -> str | None:
    """Prompts longer than the model's context, or those of the uncompressed model that would be."""
    long = [(line, own) for line, own in answered if _is_long(own)]
    if long:
        cut = sum(any(cost.get("prompt_tokens_cut") for cost in own) for _, own in long)
        prompts = LongPrompts(len(answered), cut, len(long) - cut)
        most = max(_lost(cost) for _, own in long for cost in own)
        answers = [_text(line.get("filtered_resps", "")) for line, _ in long]
        odd = sum(not answer or repeated_unit(answer) is not None for answer in answers)
        told = f" Of the answers to them {odd} are empty or one thing repeated." if odd else ""
        told = " A continuation that was lost counts as infinitely unlikely." if _losses(long[0][0]) else told
        return (
            f"{prompts.described()}, where the question stands (by up to {most} tokens; first: document "
            f"{long[0][0].get('doc_id', '?')}).{told} These answers say nothing about the model. Give fewer frames, a "
            "smaller budget of visual tokens, or a model with a longer context; on_long_prompt=error ends such a run."
        )
    over = sum(any(cost.get("prompt_tokens_over_dense") for cost in own) for _, own in answered)
    if not over:
        return None
    return (
        f"{_of(over, len(answered))} prompts fit into the model's context only because visual tokens were dropped: the "
        "dense model cannot read their questions, and what is relative to it is not comparable."
    )


def _lost(cost: Mapping[str, Any]) -> int:
    return (cost.get("prompt_tokens_cut") or 0) + (cost.get("prompt_tokens_untrained") or 0)


def _bad_losses(losses: list[list[float]]) -> str | None:
    bad = sum(any(not math.isfinite(loss) for loss in own) for own in losses)
    if not bad:
        return None
    return (
        f"the likelihoods of {_of(bad, len(losses))} documents are NaN or infinite. Likely: half precision overflows; "
        "try dtype=bfloat16 or float32, attn_implementation=sdpa."
    )


def _empty(answers: list[str]) -> str | None:
    count = sum(not answer for answer in answers)
    if not answers or count < _SHARE * len(answers) or not count:
        return None
    return (
        f"{_of(count, len(answers))} answers are empty. Likely: a prompt template that is not the model's "
        "(conv_template), a stop string at the start of the answers (until), too few tokens left by the method, or an "
        "answer filter of the task that found nothing."
    )


def _repeated(answers: list[str]) -> str | None:
    units = [unit for answer in answers if (unit := repeated_unit(answer))]
    nan = any(set(unit) <= {"!", " "} for unit in units)
    if not units or (len(units) < _SHARE * len(answers) and not nan):
        return None
    (most, _), *_ = collections.Counter(units).most_common(1)
    text = f"{_of(len(units), len(answers))} answers are one thing repeated (most often {most * 3!r}...). "
    if nan:
        return text + (
            "Token 0 of Qwen's tokenizers is '!': likely the logits are NaN, because half precision overflows or "
            "weights are damaged; try dtype=bfloat16 or float32, attn_implementation=sdpa."
        )
    return text + (
        "Likely: weights that do not belong together (model_base, a projector of another model), a wrong prompt "
        "template (conv_template), position ids broken by a method, or a budget that is too small."
    )


def repeated_unit(answer: str) -> str | None:
    """What an answer repeats from its first to its last character, at least four times (the last may be cut); or None.

    >>> repeated_unit("!!!!!!"), repeated_unit("the the the the th"), repeated_unit("no, no"), repeated_unit("1 2 3 4")
    ('!', 'the ', None, None)
    """
    text = " ".join(answer.split())
    for length in range(1, min(_UNIT, len(text)) + 1):
        unit = text[:length]
        long_enough = len(text) + unit.endswith(" ") >= _REPEATED * length  # no blank stands behind the last one
        if long_enough and text[length:] == text[:-length]:
            return unit
    return None


def _equal(answers: list[str], targets: list[str]) -> str | None:
    """One answer to nearly everything, where the references are not as one-sided."""
    if len(answers) < _ENOUGH:
        return None
    known = [target for target in targets if target not in ("", "None")]
    if known and collections.Counter(known).most_common(1)[0][1] > _ONE_SIDED * len(targets):
        return None
    answer, count = collections.Counter(map(_choice, answers)).most_common(1)[0]
    if count <= _EQUAL * len(answers) or not answer or repeated_unit(answer):  # the last two are told by others
        return None
    # Without references an equal word may be the truth (yes/no questions about what is never there); a letter is not.
    if not known and not _OPTION.match(answer):
        return None
    return (
        f"{_of(count, len(answers))} answers are {answer!r}, whatever the question. Likely: the model does not see the "
        "image or video (wrong frames, tokens at the wrong place), a prompt that is not the task's, or a budget so "
        "small that only the prior is left."
    )


def _choice(answer: str) -> str:
    """An answer as far as a choice needs it: the letter of an option, or the first word of yes and no."""
    if match := _OPTION.match(answer):
        return match[1]
    word = re.split(r"\W", answer.lower(), maxsplit=1)[0]
    return word if word in _YES_NO else answer.lower()


def _cut(lengths: list[int], limit: int | None) -> str | None:
    if not lengths or limit is None or limit < _SHORTEST:
        return None
    count = sum(length >= limit for length in lengths)
    if count <= _CUT * len(lengths):
        return None
    return (
        f"{_of(count, len(lengths))} answers were cut off at max_new_tokens={limit}. Likely: the model rambles because "
        "the prompt template (conv_template) or the task's instruction (prompt_model) is not its own, its end token is "
        "not known, or it repeats itself; an answer that starts with the choice may still be scored right."
    )


def _limit(config: Mapping[str, Any] | None, lines: Sequence[Mapping[str, Any]]) -> int | None:
    """``max_new_tokens`` as the requests still say in memory, or of the task."""
    arguments = lines[0].get("arguments") or [] if lines else []
    given = next((a for a in arguments if isinstance(a, Mapping)), (config or {}).get("generation_kwargs") or {})
    limit = given.get("max_new_tokens")
    return int(limit) if isinstance(limit, (int, float, str)) and str(limit).isdigit() else None


def _losses(line: Mapping[str, Any]) -> list[float]:
    """The losses of a likelihood task ((loss, is greedy) per choice; as text once the file is written), or nothing."""
    pairs = line.get("filtered_resps")
    if not isinstance(pairs, (list, tuple)):
        return []
    if len(pairs) == 2 and _is_pair(pairs):  # a single choice, unwrapped by lmms-eval
        pairs = [pairs]
    return [float(pair[0]) for pair in pairs] if pairs and all(_is_pair(pair) for pair in pairs) else []


def _is_pair(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 2 or str(value[1]) not in ("True", "False"):
        return False
    try:
        float(value[0])
    except (TypeError, ValueError):
        return False
    return True


def _text(value: Any) -> str:
    """An answer as text; several rounds or responses one after the other."""
    if isinstance(value, (list, tuple)):
        return " ".join(_text(part) for part in value).strip()
    return "" if value is None else str(value).strip()


def _of(count: int, total: int) -> str:
    share = 100 * count / total
    return f"{count} of {total} ({share:.0f} %)" if share >= 1 or not count else f"{count} of {total} ({share:.2g} %)"
