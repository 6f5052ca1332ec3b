"""How many images and videos vLLM encodes in one step: as many as without a method.

vLLM's scheduler fills a step's encoder budget by the rows that items take in the prompt. Under a method that keeps a
tenth it would admit ten times the items, and every request among them would wait until the last one is encoded, though
each is as much work for the encoder as before. Here an item costs the rows that it has without a method.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

from accelerate_methods.hosts.vllm.processing import FIELD, as_bytes
from accelerate_methods.hosts.vllm.spec import dense_rows


class DenseEncoderBudget(EncoderCacheManager):
    """vLLM's encoder cache, whose budget of a step is spent by the work of encoding.

    The space of the cache is counted as by vLLM: by the rows that are kept.
    """

    def __init__(self, cache_size: int):
        super().__init__(cache_size)
        #: (request, number of its item) -> rows that this step encodes beyond those that vLLM counts
        self._uncounted: dict[tuple[str, int], int] = {}
        self._admitted = False

    def can_allocate(
        self, request: Any, input_id: int, encoder_compute_budget: int, num_embeds_to_schedule: int
    ) -> bool:
        key, counted = (request.request_id, input_id), request.get_num_encoder_embeds(input_id)
        dense = max(counted, _dense_rows_of(request.mm_features[input_id]) or counted)
        spent = sum(rows for other, rows in self._uncounted.items() if other != key)
        # an item that is larger than the whole budget is encoded alone, or it never would be
        if self._admitted and dense > encoder_compute_budget - spent:
            return False
        allowed = super().can_allocate(request, input_id, encoder_compute_budget, num_embeds_to_schedule)
        if allowed:
            self._uncounted[key] = dense - counted
            self._admitted = True
        return allowed

    def get_freed_mm_hashes(self) -> list[str]:
        # the scheduler asks once, when it has made up a step
        self._uncounted, self._admitted = {}, False
        return super().get_freed_mm_hashes()


def _dense_rows_of(feature: Any) -> int | None:
    """Rows of an item without the method that came with it; None where none came, or its data are elsewhere."""
    field = (feature.data or {}).get(FIELD + feature.modality)
    return None if field is None else dense_rows(as_bytes(field.data))
