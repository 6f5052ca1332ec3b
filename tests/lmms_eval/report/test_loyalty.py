"""Loyalty to the dense run: the divergence against exact values, its properties, and what a run captures of it."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lmms_eval_accelerate.distributions import K, pack, unpack
from lmms_eval_accelerate.report.loyalty import Loyalty, first_token_kl, first_token_kls, kl_text, loyalty

from accelerate_methods import accelerate
from accelerate_methods.stages.errors import MethodError

ROUNDING = 1e-6  # of float32 log-probabilities, summed over a vocabulary


def log_softmax(logits) -> np.ndarray:
    logits = np.asarray(logits, dtype=np.float64)
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def packed(logprobs: np.ndarray, k: int = K) -> str:
    """As a run logs it: the k likeliest tokens and the mass of the others."""
    order = np.argsort(-logprobs, kind="stable")
    others = logprobs[order[k:]]
    with np.errstate(divide="ignore"):
        return pack(order[:k], logprobs[order[:k]], np.log(np.exp(others).sum()))


def exact(p: np.ndarray, q: np.ndarray) -> float:
    there = p > -np.inf
    return float((np.exp(p[there]) * (p[there] - q[there])).sum())


@st.composite
def pairs(draw, max_size: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [V] of two distributions, from flat to peaked, alike or not."""
    size = draw(st.integers(1, max_size))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale, change = draw(st.sampled_from([0.0, 0.5, 3.0, 30.0])), draw(st.sampled_from([0.0, 1e-3, 1.0, 20.0]))
    logits = scale * generator.normal(size=size)
    return log_softmax(logits), log_softmax(logits + change * generator.normal(size=size))


# -- one pair of distributions -----------------------------------------------------------------------------------------


def test_by_hand() -> None:
    dense = pack([7, 3, 5], np.log([0.5, 0.3, 0.1]), math.log(0.1))
    other = pack([3, 7, 9], np.log([0.4, 0.2, 0.2]), math.log(0.2))
    # 7 and 3 are in both lists; the bucket is 5 and the rest (0.2) against 9 and the rest (0.4)
    expected = 0.5 * math.log(0.5 / 0.2) + 0.3 * math.log(0.3 / 0.4) + 0.2 * math.log(0.2 / 0.4)
    kl, unresolved, same = first_token_kls([dense], [other])
    assert (kl[0], unresolved[0], same[0]) == (pytest.approx(expected, abs=1e-6), pytest.approx(0.2, abs=1e-6), False)


@settings(deadline=None, max_examples=200)
@given(pairs())
def test_lists_of_the_whole_vocabulary_give_the_exact_divergence(pair) -> None:
    p, q = pair
    value = first_token_kl(packed(p), packed(q))
    assert value == pytest.approx(exact(p, q), rel=1e-5, abs=ROUNDING)


@settings(deadline=None, max_examples=200)
@given(pairs(), st.data())
def test_it_is_a_lower_bound_that_longer_lists_raise(pair, data) -> None:
    p, q = pair
    short = data.draw(st.integers(1, len(p)))
    longer = data.draw(st.integers(short, len(p)))
    low, high = (first_token_kl(packed(p, k), packed(q, k)) for k in (short, longer))
    tolerance = ROUNDING + 1e-5 * high
    assert 0.0 <= low <= high + tolerance
    assert high <= exact(p, q) + tolerance


@settings(deadline=None, max_examples=100)
@given(pairs(), st.integers(1, 40), st.integers(1, 40))
def test_chain_rule_of_the_unresolved_mass(pair, k, other_k) -> None:
    """What is missing is the divergence inside the bucket times its dense mass; lists may differ in length."""
    p, q = pair
    value, unresolved, _ = first_token_kls([packed(p, k)], [packed(q, other_k)])
    common = set(unpack(packed(p, k))[0]) & set(unpack(packed(q, other_k))[0])
    bucket = np.array([token not in common for token in range(len(p))])
    mass = np.exp(p[bucket]).sum()
    assert unresolved[0] == pytest.approx(mass, abs=ROUNDING)
    inside = exact(log_softmax(p[bucket]), log_softmax(q[bucket])) if bucket.any() and mass > 0 else 0.0
    assert value[0] + mass * inside == pytest.approx(exact(p, q), rel=1e-5, abs=ROUNDING)


@settings(deadline=None, max_examples=100)
@given(pairs(), st.integers(1, 40))
def test_equal_distributions_do_not_diverge(pair, k) -> None:
    p, _ = pair
    assert first_token_kl(packed(p, k), packed(p, k)) == pytest.approx(0.0, abs=ROUNDING)


def test_impossible_tokens_and_empty_buckets_stay_finite() -> None:
    even, first = pack([0, 1], np.log([0.5, 0.5]), -np.inf), pack([0, 1], [0.0, -np.inf], -np.inf)
    assert first_token_kl(first, even) == pytest.approx(math.log(2))  # the bucket of dense is empty: 0 log 0
    # the true divergence is infinite: token 1 is impossible in the other
    assert first_token_kl(even, first) == pytest.approx(0.5 * math.log(0.5) + 0.5 * (math.log(0.5) + 103.28), abs=0.01)
    # nothing in common: all is one bucket, and the unresolved mass says so
    kl, unresolved, same = first_token_kls([pack([0], [0.0], -np.inf)], [pack([1], [0.0], -np.inf)])
    assert (kl[0], unresolved[0], same[0]) == (0.0, 1.0, False)
    # a mass that is tiny and known is no empty bucket, though 1 - sum(p) would be 0
    sure = pack([0], [0.0], -40.0)
    assert first_token_kl(even, sure) == pytest.approx(0.5 * math.log(0.5) + 0.5 * (math.log(0.5) + 40.0), rel=1e-6)


def test_many_documents_are_compared_as_one_by_one(monkeypatch) -> None:
    monkeypatch.setattr("lmms_eval_accelerate.report.loyalty._CHUNK", 3)
    generator = np.random.default_rng(0)
    rows = [(log_softmax(generator.normal(size=90)), log_softmax(generator.normal(size=90))) for _ in range(8)]
    dense = [packed(p, 4 + n) for n, (p, _) in enumerate(rows)]
    other = [packed(q, 12 - n) for n, (_, q) in enumerate(rows)]
    kl, _, same = first_token_kls(dense, other)
    assert kl == pytest.approx([first_token_kl(a, b) for a, b in zip(dense, other, strict=True)])
    assert same.tolist() == [p.argmax() == q.argmax() for p, q in rows]
    assert [len(x) for x in first_token_kls([], [])] == [0, 0, 0]


# -- text form ---------------------------------------------------------------------------------------------------------


def test_text_form_keeps_ids_and_float32_sorted() -> None:
    ids, logprobs = [151645, 4294967295, 2], np.log(np.float32([0.2, 0.2, 0.5]))
    text = pack(torch.tensor(ids), torch.from_numpy(logprobs), rest=math.log(0.1))
    back_ids, back, rest = unpack(text)
    assert back_ids.tolist() == [2, 151645, 4294967295]  # ties by id
    assert back.astype(np.float32).tolist() == logprobs[[2, 0, 1]].tolist() and rest == np.float32(math.log(0.1))
    assert len(packed(log_softmax(np.arange(1000.0) / 100))) == 688


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [-1.0, math.nan], -1.0), "NaN"),
        (([1], [-1.0], math.nan), "NaN"),
        (([1], [0.5], -1.0), "at most 0"),
        (([1, 1], [-1.0, -1.0], -1.0), "2 token ids .1 different"),
        (([1, 2], [-1.0], -1.0), "for 1 probabilities"),
        (([1], [-math.inf], -math.inf), "above 0"),
        (([], [], 0.0), "above 0"),
    ],
)
def test_what_is_no_distribution_is_refused(arguments, message) -> None:
    with pytest.raises(MethodError, match=message):
        pack(*arguments)


@pytest.mark.parametrize("text", ["", "no base 64!", "AAAA", pack([1], [-1.0], -1.0)[:-4], 7])
def test_what_is_no_packed_distribution_is_refused(text) -> None:
    with pytest.raises(MethodError, match="not a packed distribution"):
        unpack(text)


# -- a run -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Said:
    answer: str
    first_token: str | None = None


def test_a_run_relative_to_dense() -> None:
    a, b = pack([0, 1], np.log([0.75, 0.25]), -np.inf), pack([1, 0], np.log([0.75, 0.25]), -np.inf)
    kl = 0.75 * math.log(3) - 0.25 * math.log(3)
    dense = {0: Said("yes", a), 1: Said("no", a), 2: Said("red", a), 3: Said("3", None), 4: Said("unanswered", a)}
    other = {0: Said("yes", a), 1: Said("yes", b), 2: Said("red", b), 3: Said("4", a), 9: Said("more", a)}
    found = loyalty(dense, other)
    assert (found.agreement, found.documents, found.distributions) == (0.5, 4, 3)
    assert found.first_token_kl_mean == pytest.approx(2 * kl / 3, abs=1e-6)
    assert found.first_token_kl_median == pytest.approx(kl, abs=1e-6)
    assert (found.top1_agreement, found.unresolved) == (pytest.approx(1 / 3), 0.0)


def test_divergences_as_text() -> None:
    values = (None, 0.0, 4e-7, 2e-6, 0.00099, 0.001, 0.6614, 9.999, 10.0, 103.28)
    shown = [kl_text(value) for value in values]
    assert shown == ["", "0.000", "0.000", "2e-06", "1e-03", "0.001", "0.661", "9.999", "10.0", "103.3"]


def test_a_run_without_distributions_or_common_documents() -> None:
    assert loyalty({0: Said("a")}, {0: Said("a")}) == Loyalty(1.0, None, None, None, None, 1, 0)
    assert loyalty({0: Said("a")}, {1: Said("a")}) == Loyalty(None, None, None, None, None, 0, 0)
    assert first_token_kl(None, pack([0], [0.0], -np.inf)) is first_token_kl(pack([0], [0.0], -np.inf), None) is None


def test_needs_neither_harness_nor_transformers() -> None:
    code = (
        "import sys; import lmms_eval_accelerate.report.loyalty\n"
        "print([m for m in ('lmms_eval', 'transformers', 'llava') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- capture in generate -----------------------------------------------------------------------------------------------


def documents(count: int) -> list[tuple[str, int]]:
    return [("quiz", 10 + n) for n in range(count)]


@pytest.fixture(scope="module")
def first_token():
    pytest.importorskip("transformers")
    return pytest.importorskip("lmms_eval_accelerate.models.first_token")


@pytest.fixture(scope="module")
def llava():
    """A tiny OneVision, a batch of two prompts of different length with an image each, and its logits one by one."""
    from llava.model.builder import load_pretrained_model
    from tests.conftest import CHECKPOINTS

    folder = str(CHECKPOINTS / "tiny-llava-onevision")
    _, model, _, _ = load_pretrained_model(folder, device_map="cpu", torch_dtype="float32")
    generator = torch.Generator().manual_seed(0)
    prompts = [[5, -200, 17, 33, 41], [5, -200, 9]]
    videos = [torch.randn(2, 3, 384, 384, generator=generator) for _ in prompts]
    ids = torch.tensor([prompts[0], [*prompts[1], 0, 0]])
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    with torch.no_grad():
        expected = [
            model(torch.tensor([p]), images=[v], modalities=["video"]).logits[0, -1]
            for p, v in zip(prompts, videos, strict=True)
        ]
    given = {
        "attention_mask": mask,
        "images": videos,
        "modalities": ["video"] * 2,
        "max_new_tokens": 3,
        "pad_token_id": 0,
    }
    return model, ids, given, torch.stack(expected).log_softmax(-1)


def check_captured(texts: list[str], expected: torch.Tensor, k: int, tolerance: float = 1e-4) -> None:
    assert len(texts) == len(expected)
    for text, row in zip(texts, expected, strict=True):
        ids, logprobs, rest = unpack(text)
        assert len(ids) == min(k, len(row))
        assert logprobs == pytest.approx(row[ids].numpy(), abs=tolerance)
        assert (
            logprobs[-1] >= np.delete(row.numpy(), ids).max(initial=-np.inf) - tolerance
        )  # no likelier one is missing
        mass = np.exp(np.delete(row.double().numpy(), ids)).sum()
        assert math.exp(rest) == pytest.approx(mass, abs=tolerance)


@pytest.mark.parametrize("k", [K, 5000])
@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "temperature": 0.2, "top_k": 2, "top_p": 0.5},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 1},
    ],
    ids=lambda how: ",".join(f"{key}={value}" for key, value in how.items()),
)
def test_captured_is_what_the_model_says_of_the_prompt(first_token, llava, how, k) -> None:
    model, ids, given, expected = llava
    first = first_token.FirstToken(documents(2), k=k)
    with torch.inference_mode():
        torch.manual_seed(0)
        captured = model.generate(ids, logits_processor=[first], **given, **how)
        torch.manual_seed(0)
        assert torch.equal(captured, model.generate(ids, **given, **how))  # nothing is changed
    check_captured(first.packed(), expected, k)
    if how == {"do_sample": False}:
        assert [unpack(text)[0][0] for text in first.packed()] == captured[:, 0].tolist()


def test_a_generation_config_of_the_checkpoint_changes_nothing(first_token, llava, monkeypatch) -> None:
    import copy

    model, ids, given, expected = llava
    config = copy.deepcopy(model.generation_config)
    config.update(do_sample=True, repetition_penalty=1.05, temperature=0.7, top_p=0.8, top_k=20)  # that of OneVision-7B
    monkeypatch.setattr(model, "generation_config", config)
    first = first_token.FirstToken(documents(2))
    with torch.inference_mode():
        model.generate(
            ids, logits_processor=[first], do_sample=False, temperature=None, top_p=None, top_k=None, **given
        )
    check_captured(first.packed(), expected, K)


def test_forbidden_tokens_have_no_mass(first_token, llava) -> None:
    model, ids, given, expected = llava
    likeliest = int(expected[0].argmax())
    first = first_token.FirstToken(documents(2), k=5000)
    with torch.inference_mode():
        model.generate(ids, logits_processor=[first], do_sample=False, suppress_tokens=[likeliest], **given)
    listed = unpack(first.packed()[0])[0]
    assert likeliest not in listed and len(listed) == expected.shape[1] - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_captured_in_float32(first_token, dtype) -> None:
    logits = (4 * torch.randn(3, 500, generator=torch.Generator().manual_seed(0))).to(dtype)
    first = first_token.FirstToken(documents(3))
    assert first(torch.zeros(3, 0, dtype=torch.long), logits) is logits
    first(torch.zeros(3, 1, dtype=torch.long), torch.full_like(logits, math.nan))  # later steps are not looked at
    check_captured(first.packed(), logits.float().log_softmax(-1), K, tolerance=1e-6)


def test_dense_and_compressed_are_compared(first_token, llava) -> None:
    """The whole way: the same distribution diverges by nothing, another one by what the logits say."""
    model, ids, given, expected = llava
    dense, other = first_token.FirstToken(documents(2), k=5000), first_token.FirstToken(documents(2), k=5000)
    with torch.inference_mode():
        model.generate(ids, logits_processor=[dense], do_sample=False, **given)
        with accelerate(model, "fastv", retention_ratio=0.1, k=1):
            model.generate(ids, logits_processor=[other], do_sample=False, **given)
    found = dense.packed(), other.packed()
    same, _, _ = first_token_kls(found[0], found[0])
    kl, _, _ = first_token_kls(*found)
    assert same == pytest.approx([0.0, 0.0], abs=ROUNDING) and (kl > 1e-5).all()
    lists = [dict(zip(*unpack(text)[:2], strict=True)) for text in found[1]]
    compressed = np.array([[row[token] for token in range(expected.shape[1])] for row in lists])
    assert kl == pytest.approx(
        [exact(p, q) for p, q in zip(expected.double().numpy(), compressed, strict=True)], rel=1e-3
    )


def test_nan_is_an_error_that_names_its_documents(first_token) -> None:
    logits = torch.randn(4, 9)
    logits[1, 3], logits[2, 0], logits[3] = math.nan, math.inf, -math.inf
    first = first_token.FirstToken(documents(4))
    first(torch.zeros(4, 0, dtype=torch.long), logits)
    with pytest.raises(
        first_token.NotANumber, match=r"\(task quiz, doc 11, task quiz, doc 12, task quiz, doc 13\): half"
    ) as e:
        first.packed()
    assert (
        "dtype=bfloat16" in str(e.value) and "attn_implementation=sdpa" in str(e.value) and "doc 10" not in str(e.value)
    )


def test_rows_and_calls_that_do_not_fit_are_errors(first_token) -> None:
    with pytest.raises(ValueError, match="3 rows of logits for 2 samples"):
        first_token.FirstToken(documents(2))(torch.zeros(3, 0, dtype=torch.long), torch.zeros(3, 9))
    with pytest.raises(MethodError, match="generate was not called"):
        first_token.FirstToken(documents(2)).packed()
