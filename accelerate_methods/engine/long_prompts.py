"""Prompts that are longer than the context of their model: told in the log once per request, or refused.

What happens to such a prompt is the model code's affair: the LLaVA tree cuts it and keeps its head, as the official
code does; models of transformers go on at positions for which they were never trained. Either way the question at the
end of the prompt is lost or unreadable, and the answer looks like that of a bad model. So it is told, recorded
(:class:`.recording.SampleRecord`), and with ``config.on_long_prompt = "error"`` refused.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from accelerate_methods.stages.errors import MethodError, UnknownNameError

_logger = logging.getLogger(__name__)

#: values of ``config.on_long_prompt``: go on as the model's code does, and warn; or raise :class:`LongPromptError`
ON_LONG_PROMPT = ("warn", "error")


class LongPromptError(MethodError):
    """A prompt is longer than the model's context, and ``config.on_long_prompt`` says that this is an error.

    Attributes:
        samples: indices in the batch of the prompts that are too long; batch: how many prompts it has.
    """

    def __init__(self, message: str, samples: Sequence[int], batch: int):
        super().__init__(message)
        self.samples, self.batch = list(samples), batch


@dataclasses.dataclass(frozen=True)
class PromptFit:
    """How one prompt of a batch fits into the context.

    Attributes:
        tokens: what the language model would be given of it (text, newlines, visual tokens after compression).
        limit: tokens that the context holds; None: the config does not say.
        cut: tokens at its end that are left out.
        untrained: tokens that are not left out but stand at positions for which the model was not trained.
        over_dense: tokens by which the uncompressed prompt is longer than the context.
        lost_labels, labels: how many of its training targets are cut off, of how many.
    """

    tokens: int
    limit: int | None = None
    cut: int = 0
    untrained: int = 0
    over_dense: int = 0
    lost_labels: int = 0
    labels: int = 0

    @property
    def over(self) -> int:
        """Tokens that the language model does not read, or not as it was trained to."""
        return self.cut + self.untrained


def trained_positions(config: Any) -> int | None:
    """Positions for which a language model was trained; scaled rotary embeddings stretch them. None: not said."""
    stated = getattr(config, "max_position_embeddings", None)
    if not stated:
        return None
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    factor, base = scaling.get("factor") or 1.0, scaling.get("original_max_position_embeddings") or stated
    return max(stated, int(factor * base))


def context_length(config: Any) -> int | None:
    """Tokens of a prompt for which a language model was trained and tuned; None: the config does not say.

    ``tokenizer_model_max_length`` is the length at which LLaVA checkpoints were tuned.
    """
    stated = [trained_positions(config), getattr(config, "tokenizer_model_max_length", None)]
    return min((length for length in stated if length), default=None)


def is_refused(config: Any) -> bool:
    """Whether ``config.on_long_prompt`` asks for an error.

    Raises:
        UnknownNameError: it is neither of :data:`ON_LONG_PROMPT`.
    """
    chosen = getattr(config, "on_long_prompt", None) or ON_LONG_PROMPT[0]
    if chosen not in ON_LONG_PROMPT:
        raise UnknownNameError("value of config.on_long_prompt:", chosen, ON_LONG_PROMPT)
    return chosen == "error"


def tell(fits: Sequence[PromptFit], config: Any) -> None:
    """One warning for a request some of whose prompts are too long, nothing if all fit.

    Raises:
        LongPromptError: in the place of the warning, if ``config.on_long_prompt`` is "error".
    """
    refused = is_refused(config)
    samples = [number for number, fit in enumerate(fits) if fit.over]
    if not samples:
        return
    alike: dict[PromptFit, list[int]] = {}  # beams are rows of a batch, too
    for number in samples:
        alike.setdefault(fits[number], []).append(number)
    text = " ".join([*(_told(fit, numbers, len(fits)) for fit, numbers in alike.items()), _advice(refused)])
    if refused:
        raise LongPromptError(text, samples, len(fits))
    _logger.warning("%s", text)


def _told(fit: PromptFit, numbers: Sequence[int], batch: int) -> str:
    which = f"sample {numbers[0]}" if len(numbers) == 1 else f"each of samples {', '.join(map(str, numbers))}"
    prompt = f"The prompt of {which} (of {batch} in the batch)"
    if fit.cut:
        text = (
            f"{prompt} has {fit.tokens} tokens, the model's context holds {fit.tokens - fit.cut}: its last {fit.cut} "
            "tokens are lost, and with them the end of the prompt, where the question stands; the answer is to what is "
            "left."
        )
    else:
        text = (
            f"{prompt} runs beyond the model's context of {fit.limit} positions: {fit.untrained} of its {fit.tokens} "
            "tokens, the end with the question among them, stand where the model was not trained."
        )
    if fit.lost_labels:
        text += f" Of its {fit.labels} training labels {fit.lost_labels} are lost."
        text += " Without any label the loss is not a number." if fit.lost_labels == fit.labels else ""
    return text


def _advice(refused: bool) -> str:
    advice = (
        "Give fewer frames or images, a smaller budget of visual tokens (retention_ratio), or a model with a longer "
        "limit (config.tokenizer_model_max_length, config.max_position_embeddings)"
    )
    if refused:
        return f"{advice}; config.on_long_prompt = 'warn' goes on with a warning."
    return f"{advice}; config.on_long_prompt = 'error' refuses such prompts."
