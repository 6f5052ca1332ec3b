"""The distribution of an answer's first token as text: written by a run's model, read by whatever compares runs."""

from __future__ import annotations

import base64
import binascii
from typing import Any

import numpy as np

from accelerate_methods.stages.errors import MethodError

#: tokens that a run logs per answer (the whole vocabulary if it is smaller)
K = 64


def pack(ids: Any, logprobs: Any, rest: float) -> str:
    """The likeliest tokens of a distribution as text: base64 of k ids (uint32) and k + 1 log-probabilities (float32).

    float32, because in half precision (11 bits) the masses are off by 1e-4, as much as the divergence of a mild
    compression; it costs 688 characters per answer instead of 516. Tokens without any mass are left out.

    Args:
        ids: token ids [k], in any order; not one twice.
        logprobs: their natural log-probabilities [k], <= 0.
        rest: log of the mass of all other tokens; -inf if there are none. Not 1 - sum(p), which rounding would spoil.

    Raises:
        MethodError: NaN, a log-probability above 0, unequal lengths, no token with mass, or a token given twice.
    """
    ids, logprobs, rest = np.asarray(ids).reshape(-1), np.asarray(logprobs, dtype=np.float64).reshape(-1), float(rest)
    if ids.shape != logprobs.shape or len(np.unique(ids)) != len(ids):
        raise MethodError(f"{len(ids)} token ids ({len(np.unique(ids))} different) for {len(logprobs)} probabilities.")
    if np.isnan(logprobs).any() or np.isnan(rest):
        raise MethodError("a log-probability is NaN.")
    if max(logprobs.max(initial=-np.inf), rest) > 1e-3:  # rounding of a half-precision softmax stays below
        raise MethodError(f"log-probabilities must be at most 0, found {max(logprobs.max(initial=-np.inf), rest):g}.")
    there = logprobs > -np.inf
    if not there.any():
        raise MethodError("no token has a probability above 0.")
    ids, logprobs = ids[there], logprobs[there]
    order = np.lexsort((ids, -logprobs))  # ties by id, so that the first one does not depend on the device
    numbers = np.append(logprobs[order], rest).astype("<f4")
    return base64.b64encode(ids[order].astype("<u4").tobytes() + numbers.tobytes()).decode("ascii")


def unpack(packed: str) -> tuple[np.ndarray, np.ndarray, float]:
    """What :func:`pack` was given, the most likely first: ids [k] int64, log-probabilities [k] float64, rest.

    Raises:
        MethodError: not such a text.
    """
    try:
        raw = base64.b64decode(packed, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise MethodError(f"not a packed distribution: {packed!r:.60} ({error}).") from None
    k, remainder = divmod(len(raw) - 4, 8)
    if remainder or k < 1:
        raise MethodError(f"not a packed distribution: {len(raw)} bytes, expected 8 k + 4 with k > 0.")
    ids = np.frombuffer(raw, "<u4", count=k).astype(np.int64)
    numbers = np.frombuffer(raw, "<f4", offset=4 * k).astype(np.float64)
    return ids, numbers[:-1], float(numbers[-1])
