"""How the prompts of a batch fit into the model's context: told, and given to the recorder (docs/llava_tree.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from accelerate_methods.engine.long_prompts import PromptFit, context_length, tell, trained_positions
from accelerate_methods.stages.compress import VisualItem
from llava.constants import IGNORE_INDEX
from llava.model.splice import Prompts, Spliced


def fits_of(spliced: Spliced, prompts: Prompts, items: Sequence[VisualItem], config: Any) -> list[PromptFit]:
    """A fit for each sample; the device is read only where a prompt is too long.

    A prompt with images is cut at the length of tuning. What is left of one that was compressed may stand at positions
    of the uncompressed prompt, and runs out of those only where the decoder was never trained on them.
    """
    limit, trained = context_length(config), trained_positions(config)
    shrunk = [sum((items[n].full_length or items[n].length) - items[n].length for n in own) for own in spliced.items]
    whole = [dense + more for dense, more in zip(spliced.dense_lengths, shrunk, strict=True)]
    untrained = [0] * len(whole)
    if trained is not None and max(spliced.dense_lengths) > trained:
        untrained = ((spliced.position_ids >= trained) & spliced.mask).sum(1).tolist()
    if limit is not None and spliced.max_length is None:
        untrained = [n if own else max(w - limit, 0) for n, own, w in zip(untrained, spliced.items, whole, strict=True)]
    fits = []
    for number, (length, cut) in enumerate(zip(spliced.lengths, spliced.cut, strict=True)):
        labels = _targets(prompts.labels, number) if cut else 0
        fits.append(
            PromptFit(
                tokens=length + cut,
                limit=trained if untrained[number] and spliced.items[number] else limit,
                cut=cut,
                untrained=untrained[number],
                over_dense=0 if limit is None else max(whole[number] - limit, 0),
                lost_labels=labels - _targets(spliced.labels, number) if labels else 0,
                labels=labels,
            )
        )
    return fits


def _targets(labels: Tensor | None, number: int) -> int:
    return 0 if labels is None else int((labels[number] != IGNORE_INDEX).sum())


def check_text(input_ids: Tensor, attention_mask: Tensor | None, config: Any) -> None:
    """Tell of prompts of text alone that go to the decoder as they are: they are never cut."""
    limit = context_length(config)
    if limit is None or input_ids.shape[1] <= limit:
        return
    whole = attention_mask is not None and attention_mask.ndim == 2
    lengths = attention_mask.sum(1).tolist() if whole else [input_ids.shape[1]] * input_ids.shape[0]
    tell([PromptFit(tokens=n, limit=limit, untrained=max(n - limit, 0)) for n in map(int, lengths)], config)
