"""Loyalty: how far a compressed model's answers are from those of the dense model. Needs no labels.

Two measures, per document: whether the answer is the same, and the divergence of the distributions that the first token
was taken from, KL(dense || other) in nats. A run logs, for every answer, the :data:`K` most likely first tokens with
their log-probabilities and the mass of all others (``first_token`` in the samples' ``token_counts``).

The divergence of two such lists is that of the *coarse-grained* distributions: every token that stands in both lists is
itself, all others together are one bucket. By the chain rule,

    KL(dense || other) = value + unresolved * KL inside the bucket,    unresolved = dense mass of the bucket,

so the value is a lower bound, exact where the bucket holds no dense mass or the lists hold the whole vocabulary. Longer
lists split the bucket, so they can only raise it. docs/loyalty.md says how to read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from accelerate_methods.stages.errors import MethodError
from lmms_eval_accelerate.distributions import unpack

#: log of the smallest positive float32: the mass of a bucket in which ``other`` has none at all but dense has
_FLOOR = float(np.log(np.finfo(np.float32).smallest_subnormal))
_CHUNK = 2048  # documents compared at once: K * K bytes each
#: two lists are one distribution if no log-probability differs by more, in nats: float32 in another order of the same
#: sums stays below, and a token less in the prompt moves the unlikely ones by far more
_ROUNDING = 1e-3
_COMMON = 0.9  # share of the tokens, or documents, that must be there in both: the last tokens may be ties


class Answer(Protocol):
    """What is known of one document's answer; :class:`lmms_eval_accelerate.report.results.Sample` is one."""

    @property
    def answer(self) -> str: ...

    @property
    def first_token(self) -> str | None: ...


@dataclasses.dataclass(frozen=True)
class Loyalty:
    """One run relative to the dense run, over the documents that both answered.

    Attributes:
        agreement: share of ``documents`` with the same answer; None without documents.
        first_token_kl_mean, first_token_kl_median: of the lower bound of KL(dense || other), in nats; None, as all that
            follow, if no document has both distributions.
        top1_agreement: share of ``distributions`` whose most likely first token is the same.
        unresolved: mean dense probability of the bucket: how much of the mass the divergence takes as one.
        documents: that both runs answered; distributions: of these, those with a distribution in both runs.
        compared: documents with a distribution, or likelihoods, in both runs; unchanged: of these, those with the same
            answer out of the same distribution (of likelihoods: with the same losses).
    """

    agreement: float | None
    first_token_kl_mean: float | None
    first_token_kl_median: float | None
    top1_agreement: float | None
    unresolved: float | None
    documents: int
    distributions: int
    compared: int = 0
    unchanged: int = 0

    @property
    def identical(self) -> bool:
        """Whether nothing tells the two runs apart: the same answers throughout, and enough else that was compared."""
        known = self.compared >= max(1, _COMMON * self.documents)  # documents that could not be read have neither
        return known and self.agreement == 1 and self.unchanged == self.compared


# -- divergence --------------------------------------------------------------------------------------------------------


def first_token_kl(dense: str | None, other: str | None) -> float | None:
    """Lower bound of KL(dense || other) in nats, see the module; None where one of them is missing.

    Never negative: rounding (of the order of 1e-7) is cut at 0. Never infinite: where ``other`` gives the bucket no
    mass at all but dense does, the true divergence is infinite, and the bucket is taken to hold the smallest positive
    float32 (1.4e-45), 103 nats below certainty. An empty bucket of dense adds nothing, as 0 log 0. Lists without a
    common token are one bucket: 0, with an unresolved mass of 1.
    """
    if dense is None or other is None:
        return None
    return float(first_token_kls([dense], [other])[0][0])


def first_token_kls(dense: Sequence[str], other: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of packed distributions, n each: :func:`first_token_kl` [n], unresolved dense mass [n], same top-1 [n]."""
    if len(dense) != len(other):
        raise MethodError(f"{len(dense)} distributions of the dense model and {len(other)} of the other.")
    parts = [
        _divergence(_stack(dense[begin : begin + _CHUNK], -1), _stack(other[begin : begin + _CHUNK], -2))
        for begin in range(0, len(dense), _CHUNK)
    ]
    if not parts:
        return np.zeros(0), np.zeros(0), np.zeros(0, dtype=bool)
    kl, unresolved, same = (np.concatenate(column) for column in zip(*parts, strict=True))
    return kl, unresolved, same


def _stack(packed: Sequence[str], filler: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids [n, k], log-probabilities [n, k] and rest [n]; short lists are filled up with no mass."""
    lists = [unpack(text) for text in packed]
    ids = np.full((len(lists), max(len(i) for i, _, _ in lists)), filler, dtype=np.int64)
    logprobs = np.full(ids.shape, -np.inf)
    for row, (own_ids, own_logprobs, _) in enumerate(lists):
        ids[row, : len(own_ids)], logprobs[row, : len(own_ids)] = own_ids, own_logprobs
    return ids, logprobs, np.array([rest for _, _, rest in lists])


def _divergence(p: tuple[np.ndarray, ...], q: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    (p_ids, p_log, p_rest), (q_ids, q_log, q_rest) = p, q
    match = p_ids[:, :, None] == q_ids[:, None, :]  # [n, kp, kq]; fillers differ, so they match nothing
    p_common, q_common = match.any(2), match.any(1)
    of_q = np.take_along_axis(q_log, match.argmax(2), axis=1)  # log q of the tokens of p, where they are common
    terms = np.exp(p_log) * np.where(p_common, p_log - of_q, 0.0)
    p_mass = np.exp(p_rest) + np.where(p_common, 0.0, np.exp(p_log)).sum(1)
    q_mass = np.exp(q_rest) + np.where(q_common, 0.0, np.exp(q_log)).sum(1)
    with np.errstate(divide="ignore"):
        q_bucket = np.maximum(np.log(q_mass), _FLOOR)
        bucket = np.where(p_mass > 0, p_mass * (np.log(np.where(p_mass > 0, p_mass, 1.0)) - q_bucket), 0.0)
    return np.maximum(terms.sum(1) + bucket, 0.0), np.minimum(p_mass, 1.0), p_ids[:, 0] == q_ids[:, 0]


def kl_text(value: float | None) -> str:
    """A divergence in five characters: ``12.3``, ``0.661``, ``3e-05``; ``0.000`` below the rounding; "" for None."""
    if value is None:
        return ""
    if value < 1e-6:
        return "0.000"
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


# -- a run -------------------------------------------------------------------------------------------------------------


def loyalty(dense_samples: Mapping[Any, Answer], other_samples: Mapping[Any, Answer]) -> Loyalty:
    """How loyal ``other_samples`` are to ``dense_samples`` (document -> :class:`Answer`), over common documents."""
    common = [document for document in dense_samples if document in other_samples]
    same = [dense_samples[d].answer == other_samples[d].answer for d in common]
    pairs = [(dense_samples[d].first_token, other_samples[d].first_token) for d in common]
    pairs = [pair for pair in pairs if None not in pair]
    kl, unresolved, top1 = first_token_kls([a for a, _ in pairs], [b for _, b in pairs])
    found = [_unchanged(dense_samples[d], other_samples[d]) for d in common]

    def mean(values: Any) -> float | None:
        return float(np.mean(values)) if len(values) else None

    return Loyalty(
        agreement=mean(same),
        first_token_kl_mean=mean(kl),
        first_token_kl_median=float(np.median(kl)) if len(kl) else None,
        top1_agreement=mean(top1),
        unresolved=mean(unresolved),
        documents=len(common),
        distributions=len(pairs),
        compared=sum(same is not None for same in found),
        unchanged=sum(same is True for same in found),
    )


def _unchanged(dense: Answer, other: Answer) -> bool | None:
    """None where one of the runs kept nothing but the answer."""
    losses = [getattr(sample, "losses", None) for sample in (dense, other)]
    if None not in losses:
        alike = len(losses[0]) == len(losses[1]) and np.allclose(*losses, rtol=0, atol=_ROUNDING)
        return dense.answer == other.answer and bool(alike)
    if dense.first_token is None or other.first_token is None:
        return None
    same = dense.first_token == other.first_token or _same_distribution(dense.first_token, other.first_token)
    return same and dense.answer == other.answer


def _same_distribution(dense: str, other: str) -> bool:
    (ids, logprobs, _), (other_ids, other_logprobs, _) = unpack(dense), unpack(other)
    common, at, there = np.intersect1d(ids, other_ids, assume_unique=True, return_indices=True)
    if len(common) < _COMMON * max(len(ids), len(other_ids)):
        return False
    return bool(np.abs(logprobs[at] - other_logprobs[there]).max() <= _ROUNDING)
